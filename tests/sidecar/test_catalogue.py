"""The catalogue is what the contract lists, and the docs are what the catalogue says."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from agx_sidecar.metrics.catalogue import write_catalogue
from agx_sidecar.metrics.instruments import CATALOGUE

ROOT = Path(__file__).parents[2]


def test_docs_are_generated_from_the_instruments() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == write_catalogue() + "\n", "run `make docs-metrics`"


def test_the_documented_relabelling_is_of_the_fleets_series_and_no_others() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    rules = config["scrape_configs"][0]["metric_relabel_configs"]
    assert {rule["target_label"] for rule in rules} == {"instance", "pod", "container"}
    for rule in rules:
        matched = {instrument.name for instrument in CATALOGUE if re.fullmatch(rule["regex"], instrument.name)}
        assert matched == {instrument.name for instrument in CATALOGUE if instrument.fleet}


def test_names_are_unique_and_say_their_unit() -> None:
    names = [instrument.name for instrument in CATALOGUE]
    assert len(set(names)) == len(names)
    for instrument in CATALOGUE:
        assert instrument.name.endswith("_total") == (instrument.kind == "counter")
        assert instrument.help.endswith(".")
        assert "|" not in instrument.help
