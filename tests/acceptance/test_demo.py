"""`agx demo` as people start it: a process, its real children, and a verdict."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.model_server import ModelServer, say
from support.visitor import Visitor
from support.waiting import wait_until_sync

from agx import cli

AGX = Path(sysconfig.get_path("scripts")) / "agx"
LINE = re.compile(r"^. (completed|cancelled|failed|lost) +(\w+) +(\S+) +(\d+) in +(\d+) out +([\d.]+) s", re.MULTILINE)


@contextmanager
def demo(tmp_path: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A running demo and the file it writes to."""
    output = tmp_path / "demo.txt"
    # A directory of its own for temporary files, so that what it leaves is seen.
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), **environment}
    with (
        output.open("wb") as file,
        subprocess.Popen([AGX, "demo", *options], stdout=file, stderr=subprocess.STDOUT, env=env) as process,
    ):
        try:
            yield process, output
        finally:
            process.kill()


def wait_for(output: Path, pattern: str) -> None:
    wait_until_sync(lambda: re.search(pattern, output.read_text()), 60, what=f"{pattern} in the output")


def test_once_runs_every_outcome_and_agrees_with_the_sidecar(tmp_path: Path) -> None:
    with demo(tmp_path, "--once") as (process, output):
        code = process.wait(90)
        said = output.read_text()
        assert code == 0, said
    lines = LINE.findall(said)
    assert Counter(outcome for outcome, *_ in lines) == {"completed": 6, "cancelled": 3, "failed": 2, "lost": 1}
    assert "✘ differs" not in said
    tokens = sum(int(given) for _, _, _, given, _, _ in lines)
    # The request that was interrupted is estimated.
    counted = re.search(rf"tokens · input +≥ {tokens} +(\d+) ", said)
    assert counted
    assert int(counted[1]) > tokens
    assert re.search(r"(?m)^✔ completed +travel .* process (\d+) was killed, process (?!\1)\d+ resumed the run$", said)
    assert re.search(r"runs resumed by another process · travel +1 +1 ", said)
    assert "Every number agrees." in said
    assert list((tmp_path / "tmp").iterdir()) == []


def test_goes_on_until_ctrl_c_and_agrees_then_too(tmp_path: Path) -> None:
    with demo(tmp_path) as (process, output):
        wait_for(output, r"metrics +http://127\.0\.0\.1:\d+/metrics")
        console = re.search(r"console +http://127\.0\.0\.1:(\d+)/#token=(\S{20,})", output.read_text())
        assert console
        visitor = Visitor(int(console[1]))
        assert visitor.get("/").status == 401
        assert visitor.log_in(console[2]).status == 303
        assert "Live" in visitor.get("/").text
        wait_for(output, r"(?m)^. (completed|cancelled|failed|lost)")
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
        said = output.read_text()
        assert code == 0, said
    assert "Every number agrees." in said
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_killed_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path) as (process, output):
        wait_for(output, r"metrics +http")
        homes = list((tmp_path / "tmp").iterdir())
        assert len(homes) >= 3  # of the server, the sidecar, the worker; one more where a port was taken
        # The process that is going to be killed, whose directory is the worker's to remove.
        wait_until_sync(lambda: list((tmp_path / "tmp").glob("agx-demo-*/agx-demo-*")), what="a process of a run")
        process.kill()
        process.wait()
        wait_until_sync(lambda: not list((tmp_path / "tmp").iterdir()), what="its children are gone")


def test_plays_with_a_real_model_over_http(tmp_path: Path, model_server: ModelServer) -> None:
    model_server.script(*(say("An answer of a real model") for _ in range(12)))
    key = {"OPENAI_BASE_URL": model_server.base_url, "OPENAI_API_KEY": "test"}
    with demo(tmp_path, "--once", "--model", "openai-chat:gpt-4o-mini", **key) as (process, output):
        assert process.wait(90) == 0, output.read_text()
    assert len(model_server.requests) == 12


@pytest.mark.parametrize(
    ("environment", "model", "said"),
    [
        ({"AGX_SERVER_BINARY": "/nowhere"}, None, "AGX_SERVER_BINARY=/nowhere is no executable file"),
        ({"OPENAI_API_KEY": ""}, "openai:gpt-4o-mini", "OPENAI_API_KEY"),
        ({}, "nosuch:model", "Unknown model: nosuch:model"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    environment: dict[str, str],
    model: str | None,
    said: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["demo", "--once", *(["--model", model] if model else [])]) == 1
    (line,) = "".join(capfd.readouterr()).splitlines()
    assert line.startswith("agx demo: ")
    assert said in line


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.demo, "_PACKAGES", ("rich", "no_such_package", "no_such.package"))
    assert cli.main(["demo", "--once"]) == 1
    assert capsys.readouterr().err == (
        "agx demo: it needs no_such_package, no_such.package: pip install 'opale-agent-stream[demo]'\n"
    )
