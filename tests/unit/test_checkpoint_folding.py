"""What a run's checkpoints add up to."""

from __future__ import annotations

import pytest
from pydantic_ai.messages import ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart, UserPromptPart
from pydantic_ai.usage import RunUsage

from agx.checkpoints.codec import Checkpoint, Pending, ToolReturn, decode, encode
from agx.checkpoints.progress import fold


def test_a_tool_result_does_not_reset_the_output_retries() -> None:
    before = encode(Checkpoint(messages=(), output_retries=2))
    result = encode(Checkpoint(returned=ToolReturn(ToolReturnPart("look", "found", "c1"))))
    assert fold([before, result], []).output_retries == 2


def test_a_tool_result_brings_the_usage_of_what_the_tool_ran() -> None:
    usage = RunUsage(requests=2, input_tokens=30, tool_calls=1)
    result = encode(Checkpoint(returned=ToolReturn(ToolReturnPart("ask", "answer", "c1")), usage=usage))
    assert fold([encode(Checkpoint(messages=(), usage=RunUsage(requests=1))), result], []).usage == usage


def test_enqueued_messages_keep_their_priority_and_their_tool_call() -> None:
    note = ModelRequest(parts=[UserPromptPart("note")])
    pending = (Pending((note,), "asap", "c1"), Pending((note, note), "when_idle"))
    assert decode(encode(Checkpoint(pending=pending)), {}).pending == pending


def test_an_integer_of_any_size_stays_exact() -> None:
    response = ModelResponse(parts=[ToolCallPart("count", {"n": 2**70}, "c1")])
    result = ToolReturn(ToolReturnPart("count", {"n": -(2**70)}, "c1"))
    assert decode(encode(Checkpoint(messages=(response,))), {}).messages == (response,)
    assert decode(encode(Checkpoint(returned=result)), {}).returned == result


class Odd:
    """A type that pydantic does not know."""


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"n": float("nan")}, {"n": None}),
        ({"found": [Odd(), 1]}, {"found": [{"unserialisable": "Odd"}, 1]}),
        (Odd(), {"unserialisable": "Odd"}),
        ("a\ud800b", "a?b"),
        ({"image": b"\xff\x00"}, {"image": "_wA="}),
    ],
    ids=["not a number", "an object in a list", "an object", "half a character", "bytes"],
)
def test_what_json_cannot_hold_is_replaced(given: object, stored: object) -> None:
    result = ToolReturn(ToolReturnPart("look", given, "c1"))
    returned = decode(encode(Checkpoint(returned=result)), {}).returned
    assert returned is not None
    assert returned.part.content == stored
