"""A job holds what the routers put into it: approvals and results of deferred calls, whatever values they have."""

from __future__ import annotations

from pydantic_ai.exceptions import ToolFailed
from pydantic_ai.tools import DeferredToolResults, ToolApproved

from agx.checkpoints.codec import dump_results, load_results
from agx.checkpoints.job import Job, decode


def test_results_of_any_json_value_survive() -> None:
    given = DeferredToolResults(
        calls={"c1": {"n": 2**70, "f": 1e308}, "c2": None, "c3": ToolFailed("no sensor")},
        approvals={"c4": ToolApproved(override_args={"n": 2**70})},
    )
    job = Job("r", "1", "1", "s", "support", results=dump_results(given))
    read = decode(job.encode())
    assert read.results is not None
    found = load_results(read.results)
    assert (found.calls["c1"], found.calls["c2"]) == (given.calls["c1"], None)
    assert str(found.calls["c3"]) == "no sensor"
    assert found.approvals == given.approvals
