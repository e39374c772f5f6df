"""What a run's checkpoints add up to."""

from __future__ import annotations

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


def test_what_is_not_a_number_becomes_null() -> None:
    result = ToolReturn(ToolReturnPart("divide", {"n": float("nan")}, "c1"))
    returned = decode(encode(Checkpoint(returned=result)), {}).returned
    assert returned is not None
    assert returned.part.content == {"n": None}
