"""The sidecar's image: its Dockerfile linted; built, run locked down, scraped and stopped (`make image-check`)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
from ops.image import ROOT, USER, Image, build, process_inside, run, sandbox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.waiting import wait_until_sync

from agx import __version__
from agx.embedded.child import draw_ports
from agx.embedded.server import EmbeddedServer

DOCKERFILE = (ROOT / "sidecar" / "Dockerfile").read_text()
LOCKED = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "sidecar" / "requirements.txt").read_text(), re.MULTILINE))


def test_the_dockerfile_has_no_findings() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")  # a package's, whatever the PATH says
    subprocess.run([hadolint, ROOT / "sidecar" / "Dockerfile"], check=True, timeout=60)


def test_the_image_says_where_it_comes_from() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]+)"', DOCKERFILE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels["source"] == project["urls"]["Repository"]
    assert labels["licenses"] == project["license"]
    assert labels["version"] == __version__
    assert labels["base.name"] == "${BASE}"
    page = labels["documentation"].removeprefix(f"{labels['source']}/blob/main/")
    assert (ROOT / page).is_file()


def test_the_image_has_the_locked_versions_that_the_package_allows() -> None:
    assert "--require-hashes --requirement requirements.txt" in DOCKERFILE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"] + project["optional-dependencies"]["sidecar"]):
        assert wanted.specifier.contains(LOCKED[wanted.name]), f"{wanted}: run `make lock`"


@pytest.fixture(scope="module")
def image() -> Image:
    """The image, built once."""
    assert os.geteuid() == 0, "building in a chroot needs root: run `sudo make image-check`"
    return build()


pytestmark = pytest.mark.timeout(1500)


@pytest.mark.image
def test_the_image_runs_as_nobody_and_says_when_it_is_well(image: Image) -> None:
    assert image.config["User"] == f"{USER}:{USER}"
    assert image.config["Entrypoint"] == ["agx-sidecar"]
    assert image.config["Healthcheck"]["Test"][0] == "CMD"
    print(f"the image adds {image.size / 1e6:.0f} MB to its base")


@pytest.mark.image
def test_the_image_holds_the_wheel_and_no_tools(image: Image) -> None:
    packages = next(image.files.glob("opt/agx/lib/python3*/site-packages"))
    assert (packages / "agx_sidecar" / "app.py").exists()
    assert not (packages / "sidecar").exists()
    assert not (packages / "pip").exists()
    assert not (image.files / "source").exists()
    assert not (image.files / "wheels").exists()


@pytest.mark.image
def test_the_bill_of_materials_has_what_is_in_the_image(image: Image) -> None:
    bill = json.loads((image.files / "opt" / "agx" / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    found = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    assert found.pop("opale-agent-stream") == __version__
    assert found.items() <= LOCKED.items()
    packages = next(image.files.glob("opt/agx/lib/python3*/site-packages"))
    assert len(found) + 1 == len(list(packages.glob("*.dist-info")))


@pytest.mark.image
def test_its_root_cannot_be_written(image: Image) -> None:
    code, said = run(image, ["python", "-c", "open('/opt/agx/x', 'w')"])
    assert code == 1
    assert "Read-only file system" in said


@pytest.mark.image
def test_a_wrong_setting_ends_it_with_a_message(image: Image) -> None:
    code, said = run(image, image.config["Entrypoint"], {"AGX_REDIS_URL": "http://x"})
    assert code == 2
    assert "AGX_REDIS_URL" in said


@pytest.mark.image
def test_it_is_scraped_found_healthy_and_stops_on_sigterm(image: Image) -> None:
    port = str(draw_ports(1)[0])
    with EmbeddedServer() as server:
        settings = {"AGX_REDIS_URL": server.url, "AGX_HTTP_PORT": port}
        with sandbox(image, image.config["Entrypoint"], settings) as process:
            base = f"http://127.0.0.1:{port}"

            def ready() -> bool:
                assert process.poll() is None, process.communicate()
                try:
                    return httpx.get(f"{base}/readyz").is_success
                except httpx.TransportError:
                    return False

            wait_until_sync(ready)
            metrics = httpx.get(f"{base}/metrics").text
            assert re.search(r'^agx_build_info\{version="[0-9.]+"\} 1', metrics, re.MULTILINE)
            assert "agx_redis_up 1" in metrics

            status = Path(f"/proc/{process_inside(process)}/status").read_text()
            for line in (f"Uid:\t{USER}", f"Gid:\t{USER}", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "NSpid:"):
                assert line in status
            assert re.search(r"^CapPrm:\t0+$", status, re.MULTILINE)

            assert run(image, image.config["Healthcheck"]["Test"][1:], {"AGX_HTTP_PORT": port})[0] == 0

            os.kill(process_inside(process), signal.SIGTERM)
            said, _ = process.communicate(timeout=30)
            assert process.returncode == 0, said
            assert "stopped" in said
    # And when nothing answers, the health check says so.
    assert run(image, image.config["Healthcheck"]["Test"][1:], {"AGX_HTTP_PORT": port})[0] == 1
