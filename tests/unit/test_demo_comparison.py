"""The demo's verdict: it agrees when every number does, and names what differs when one does not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterable
from dataclasses import replace

import pytest
from pydantic_ai import RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.capabilities.abstract import WrapModelRequestHandler
from pydantic_ai.messages import AgentStreamEvent, ModelResponse, TextPart
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.usage import RequestUsage

from agx.demo.agents import DemoDeps, ScriptedModel, travel
from agx.demo.comparison import Row, compare
from agx.demo.finished_runs import FinishedRun, FinishedRuns, has_all_usage
from agx.demo.scenarios import HAIKU

COMPLETED = FinishedRun(
    scope="acme",
    user="ada",
    session="1",
    agent="travel",
    outcome="completed",
    reason=None,
    error_type=None,
    tokens=Counter({"input": 100, "output": 20}),
    all_reported=True,
    tool_calls=Counter({("weather", "ok"): 2}),
    model_requests=2,
    seconds=1.5,
    resumes=1,
)
CANCELLED = FinishedRun(
    scope="globex",
    user="lin",
    session="2",
    agent="travel",
    outcome="cancelled",
    reason="cancel",
    error_type=None,
    tokens=Counter({"input": 50, "output": 7}),
    all_reported=True,
    tool_calls=Counter(),
    model_requests=1,
    seconds=0.5,
)
AGREEING = """
agx_runs_started_total{scope="acme",agent="travel"} 1
agx_runs_started_total{scope="globex",agent="travel"} 1
agx_runs_total{scope="acme",agent="travel",outcome="completed"} 1
agx_runs_total{scope="acme",agent="travel",outcome="failed"} 0
agx_runs_total{scope="globex",agent="travel",outcome="cancelled"} 1
agx_run_resumes_total{agent="travel"} 1
agx_cancellations_total{scope="globex",agent="travel",stage="model_request",reason="cancel"} 1
agx_tool_calls_total{agent="travel",tool="weather",outcome="ok"} 2
agx_tokens_total{scope="acme",agent="travel",model="m",type="input"} 60
agx_tokens_total{scope="acme",agent="travel",model="n",type="input"} 40
agx_tokens_total{scope="acme",agent="travel",model="m",type="output"} 20
agx_tokens_total{scope="globex",agent="travel",model="m",type="input"} 50
agx_tokens_total{scope="globex",agent="travel",model="m",type="output"} 7
gen_ai_client_operation_duration_seconds_count{gen_ai_operation_name="chat",error_type=""} 3
agx_run_duration_seconds_sum{agent="travel",outcome="completed"} 1.4
agx_run_duration_seconds_sum{agent="travel",outcome="cancelled"} 0.4
agx_runs_live{scope="acme"} 0
"""


def differing(rows: list[Row]) -> list[str]:
    return [row.what for row in rows if not row.agrees]


def test_agrees_when_every_number_does() -> None:
    rows = compare(FinishedRuns([COMPLETED, CANCELLED]), AGREEING)
    assert differing(rows) == []
    assert {row.what: row.counted for row in rows}["tokens · input"] == 150


@pytest.mark.parametrize(
    ("line", "wrong", "what"),
    [
        ('outcome="completed"} 1\n', 'outcome="completed"} 2\n', "runs · completed"),
        ('outcome="failed"} 0', 'outcome="failed"} 1', "runs · failed"),
        ('outcome="cancelled"} 1', 'outcome="cancelled"} 0', "runs · cancelled"),
        (
            'resumes_total{agent="travel"} 1',
            'resumes_total{agent="travel"} 0',
            "runs resumed by another process · travel",
        ),
        ('reason="cancel"} 1', 'reason="task"} 1', "cancellations · cancel"),
        ('tool="weather",outcome="ok"} 2', 'tool="weather",outcome="ok"} 3', "tool calls · ok"),
        ('type="output"} 20', 'type="output"} 21', "tokens · output"),
        ('error_type=""} 3', 'error_type=""} 4', "model requests · chat"),
        ('outcome="completed"} 1.4', 'outcome="completed"} 2.1', "seconds in runs (within 0.5 s each)"),
        ('outcome="cancelled"} 0.4', 'outcome="cancelled"} 1.1', "seconds in runs (within 0.5 s each)"),
        ('agx_runs_live{scope="acme"} 0', 'agx_runs_live{scope="acme"} 1', "runs live now"),
    ],
)
def test_names_what_differs(line: str, wrong: str, what: str) -> None:
    assert AGREEING.count(line) == 1
    assert what in differing(compare(FinishedRuns([COMPLETED, CANCELLED]), AGREEING.replace(line, wrong)))


def test_a_count_under_the_wrong_label_differs_though_the_sums_agree() -> None:
    swapped = AGREEING.replace('{scope="acme",agent="travel",model="m",type="output"} 20', "{X} 20")
    swapped = swapped.replace('{scope="globex",agent="travel",model="m",type="output"} 7', "{Y} 7")
    swapped = swapped.replace("{X} 20", '{scope="acme",agent="travel",model="m",type="output"} 7')
    swapped = swapped.replace("{Y} 7", '{scope="globex",agent="travel",model="m",type="output"} 20')
    (row,) = [row for row in compare(FinishedRuns([COMPLETED, CANCELLED]), swapped) if row.what == "tokens · output"]
    assert (row.expected, row.counted) == (27, 27)
    assert len(row.differences) == 2


def test_tokens_are_a_lower_bound_where_an_answer_was_cut_without_usage() -> None:
    finished_runs = FinishedRuns([COMPLETED, replace(CANCELLED, all_reported=False)])
    more = AGREEING.replace('type="output"} 7', 'type="output"} 9')
    assert differing(compare(finished_runs, more)) == []
    less = AGREEING.replace('type="output"} 7', 'type="output"} 6')
    assert differing(compare(finished_runs, less)) == ["tokens · output"]


def test_usage_of_a_request_that_was_cancelled_before_its_answer_is_not_reported() -> None:
    answer = ModelResponse(parts=[TextPart("one")], usage=RequestUsage(input_tokens=1, output_tokens=1))
    assert has_all_usage([answer], "cancelled", requests=1)
    assert not has_all_usage([answer], "cancelled", requests=2)
    assert not has_all_usage([], "cancelled", requests=None)
    assert has_all_usage([], "failed", requests=1)


class Hook(AbstractCapability[DemoDeps]):
    """Counts model requests where agx does."""

    def __init__(self) -> None:
        self.requests = 0

    async def wrap_model_request(
        self, ctx: RunContext[DemoDeps], *, request_context: ModelRequestContext, handler: WrapModelRequestHandler
    ) -> ModelResponse:
        self.requests += 1
        return await handler(request_context)


async def read(ctx: RunContext[DemoDeps], events: AsyncIterable[AgentStreamEvent]) -> None:
    async for _ in events:
        pass


async def test_a_cancelled_request_counts_in_the_demo_when_it_counts_in_agx() -> None:
    counted = set()
    for steps in range(50):
        hook = Hook()
        deps = DemoDeps(user_id="ada", session_id="s", scope_id="acme")
        run = travel.run("Hi", model=ScriptedModel(HAIKU), deps=deps, capabilities=[hook], event_stream_handler=read)
        task = asyncio.create_task(run)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert deps.model_requests == hook.requests, f"cancelled after {steps} steps of the event loop"
        counted.add(hook.requests)
    assert counted == {0, 1}
