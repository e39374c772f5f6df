"""docs/reference/configuration.md has every setting of the code, with its default."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from agx import Config
from agx.embedded.server import BINARY_VARIABLE
from agx.redis.address import read_address, read_prefix
from agx.telemetry.conventions import CAPTURE_CONTENT
from agx_sidecar.settings import read_settings

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"
INTERNAL = {"AGX_LEADER_LEASE", "AGX_CLAIM_IDLE", "AGX_DRAIN"}  # tests shorten them


class Asked(dict[str, str]):
    """An environment that records which variables are read."""

    def __init__(self, **variables: str) -> None:
        super().__init__(variables)
        self.names: set[str] = set()

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override] # what is used of it
        self.names.add(name)
        return super().get(name, default)


def rows(heading: str) -> dict[str, list[str]]:
    """Return the rows of a section's table by their first cell; every cell of a row is there."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    head, _, *lines = [line[1:-1].split("|") for line in section.splitlines() if line.startswith("|")]
    assert lines
    assert all(len(line) == len(head) for line in lines)
    return {line[0].strip(" `"): [cell.strip() for cell in line[1:]] for line in lines}


def test_every_setting_of_the_config_has_its_default() -> None:
    documented = rows("`agx.Config`")
    fields = {one.name: one for one in dataclasses.fields(Config)}
    assert list(documented) == list(fields)
    for name, (default, *_) in documented.items():
        one = fields[name]
        if default == "required":
            assert one.default is one.default_factory is dataclasses.MISSING
            continue
        made = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        assert ast.literal_eval(default.strip("`")) == made, name


def test_every_variable_of_an_address_is_there() -> None:
    asked = Asked()
    read_address(asked)
    read_prefix(asked)
    assert set(rows("Redis's address")) == asked.names


def test_every_variable_of_the_sidecar_is_there_and_its_default_means_the_same_as_nothing() -> None:
    documented = rows("The sidecar's environment")
    asked = Asked(AGX_CONSOLE="full", AGX_METRICS_EXPORT="otlp")
    read_settings(asked)
    # The exporter itself reads this one.
    assert set(documented) == asked.names - INTERNAL - set(rows("Redis's address")) | {"OTEL_EXPORTER_OTLP_HEADERS"}
    given = {name: found[1] for name, (default, *_) in documented.items() if (found := re.match(r"`([^`]+)`", default))}
    assert len(given) > 10
    for name, default in given.items():
        for others in ({}, {"AGX_CONSOLE": "full"}, {"AGX_METRICS_EXPORT": "otlp"}):
            assert read_settings({name: default} | others) == read_settings(others), name


def test_every_variable_of_a_service_is_there() -> None:
    standard = {"OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"}
    assert set(rows("The service's environment")) == {*standard, CAPTURE_CONTENT, BINARY_VARIABLE}
