"""compose.yaml and the files it mounts: valid to the tools that read them, and fitting each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ops.boards import BOARDS, ROOT
from support.waiting import wait_until_sync

from agx.embedded.child import Child
from dashboards.preview.stack import Stack

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


@pytest.mark.prometheus
def test_the_demo_service_shows_up_in_prometheus(stack: Stack, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, str(ROOT / "deploy" / "demo_service.py")]
    service = Child(command, log=log, home=tmp_path, environment=os.environ | {"AGX_REDIS_URL": stack.redis_url})
    shown = 'agx_runs_total{outcome="completed", agent=~"travel|analyst"} > 0'
    try:
        wait_until_sync(lambda: service.ended or stack.query(shown), what=shown)
    finally:
        code = service.end()
    assert code == 0, log.read_text()
