"""compose.yaml and the files it mounts: valid to the tools that read them, and fitting each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ops.boards import BOARDS, ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKER_COMPOSE = Path(sys.executable).with_name("docker-compose")  # a package's, whatever the PATH says
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"


def test_compose_itself_finds_the_file_valid() -> None:
    command = [DOCKER_COMPOSE, "-f", ROOT / "compose.yaml", "config", "--quiet"]
    subprocess.run(command, check=True, timeout=60)


def test_compose_refuses_what_is_not_in_its_schema(tmp_path: Path) -> None:
    broken = tmp_path / "compose.yaml"
    broken.write_text("services: { a: { image: x, portz: [] } }")
    done = subprocess.run([DOCKER_COMPOSE, "-f", broken, "config"], check=False, timeout=60, capture_output=True)
    assert done.returncode != 0
    assert b"portz" in done.stderr


def test_everything_that_is_mounted_is_there() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), f"{name}: {volume}"


def test_nothing_is_open_to_other_machines() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.prometheus
def test_promtool_finds_the_scrape_file_valid() -> None:
    command = ["promtool", "check", "config", "--syntax-only", ROOT / "deploy" / "prometheus.yml"]
    subprocess.run(command, check=True, timeout=30)


def test_grafana_finds_its_data_sources_and_the_boards() -> None:
    sources = yaml.safe_load((PROVISIONING / "datasources" / "agx.yaml").read_text())["datasources"]
    by_type = {source["type"]: source for source in sources}
    wanted = {
        variable["query"]
        for board in BOARDS.values()
        for variable in board["templating"]["list"]
        if variable["type"] == "datasource"
    }
    assert wanted == set(by_type)
    (link,) = by_type["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert link == {"name": "trace_id", "datasourceUid": by_type["tempo"]["uid"]}
    for source in sources:
        assert source["url"].split("//")[1].split(":")[0] in COMPOSE["services"]
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "agx.yaml").read_text())["providers"]
    assert f"./dashboards/json:{provider['options']['path']}:ro" in COMPOSE["services"]["grafana"]["volumes"]


def test_every_part_is_limited_restarted_and_checked() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["restart"] == "unless-stopped", name
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory"}, name
        # What is built from our Dockerfile has the check of the image, which another entry point does not have.
        if "build" not in service:
            assert service["healthcheck"]["test"][0] == "CMD", name


def test_parts_wait_for_what_is_healthy() -> None:
    for name, service in COMPOSE["services"].items():
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}, f"{name}: {other}"
