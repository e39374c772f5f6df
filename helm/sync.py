"""Fill the chart from its sources: rules, boards and relabelings into `files/`, the values table into its README.

A chart can read only what lies inside it. `python helm/sync.py` writes; with `--check` it exits 1 where the committed
chart differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "agx-sidecar"
TABLE = re.compile(r"(<!-- values -->\n).*(<!-- end of values -->)", re.DOTALL)
COMMENT = "# -- "


def outputs() -> dict[Path, str]:
    """Return every generated file of the chart with its content."""
    files = CHART / "files"
    made = {files / "agx.rules.yaml": (ROOT / "dashboards" / "rules" / "agx.rules.yaml").read_text()}
    for board in sorted((ROOT / "dashboards" / "json").glob("*.json")):
        made[files / "dashboards" / board.name] = board.read_text()
    made[files / "fleet-relabelings.yaml"] = relabelings()
    readme = CHART / "README.md"
    made[readme] = TABLE.sub(lambda found: f"{found[1]}{values_table()}{found[2]}", readme.read_text())
    return made


def relabelings() -> str:
    """Return the scrape configuration's metric relabelling in the operator's spelling."""
    scrape = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"][0]
    renamed = [
        {re.sub(r"_(\w)", lambda found: found[1].upper(), key): value for key, value in rule.items()}
        for rule in scrape["metric_relabel_configs"]
    ]
    return yaml.safe_dump(renamed, sort_keys=False, width=1000)


def values_table() -> str:
    """Return the table of all values, from values.yaml and the comments above each."""
    text = (CHART / "values.yaml").read_text()
    top = yaml.compose(text)
    if not isinstance(top, yaml.MappingNode):
        raise SystemExit("values.yaml is no mapping")
    lines = text.splitlines()
    rows = [f"| `{name}` | `{default}` | {about} |" for name, default, about in _rows(top, lines)]
    return "\n".join(["| value | default | what |", "|---|---|---|", *rows]) + "\n"


def _rows(node: yaml.MappingNode, lines: list[str], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        above = lines[key.start_mark.line - 1].strip()
        if above.startswith(COMMENT):
            default = _text_of(value)
            yield name, default, above.removeprefix(COMMENT).replace("|", "\\|")
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from _rows(value, lines, f"{name}.")
        else:
            raise SystemExit(f"values.yaml: {name} has no comment that begins with {COMMENT!r}")


def _text_of(node: yaml.Node) -> str:
    """Return a default as one line of YAML."""
    value = yaml.safe_load(yaml.serialize(node))
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip() or '""'


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    stale = [path for path, content in outputs().items() if not path.exists() or path.read_text() != content]
    stale.extend(set((CHART / "files").rglob("*.*")) - set(outputs()))
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if "--check" in arguments:
        if stale:
            print(f"{names} differ from their sources: run `make helm`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        if path in outputs():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(outputs()[path])
        else:
            path.unlink()
    print(f"wrote {names}" if stale else "the chart is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
