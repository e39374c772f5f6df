"""A model without a key: it streams word by word, and reacts to the words `order`, `style` and `long` in a prompt."""

import asyncio
import os
from collections.abc import AsyncIterator

from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel

PAUSE = float(os.environ.get("SHOP_PAUSE", "0.1"))  # seconds before each word
HELP = "Ask me to order a lamp, to say what goes with it in style, or for a long answer about our catalogue."


async def _answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    """Answer the last prompt, or go on after the result of a tool."""
    answered = max((n for n, message in enumerate(messages, 1) if message.kind == "response"), default=0)
    new = [part for message in messages[answered:] for part in message.parts]
    prompts = [str(part.content) for part in new if isinstance(part, UserPromptPart)]
    results = [part for part in new if isinstance(part, ToolReturnPart)]
    if not results:
        text, tool, args = _begin(prompts[-1])
    else:
        # A prompt beside a result is what the user added meanwhile.
        text = "".join(f"You added: {prompt} Noted. " for prompt in prompts) + str(results[-1].content)
        tool, args = _continue(results[-1])
    for word in text.split():
        await asyncio.sleep(PAUSE)
        yield word + " "
    if tool:
        yield {1: DeltaToolCall(name=tool, json_args=args)}


def _begin(prompt: str) -> tuple[str, str, str]:
    if "order" in prompt.lower():
        return "I order one lamp, if you approve.", "place_order", '{"item": "lamp", "quantity": 1}'
    if "style" in prompt.lower():
        return "I ask our stylist.", "ask_stylist", '{"question": "What goes with a lamp?"}'
    if "long" in prompt.lower():
        return "I read our catalogue to you.", "read_catalogue", '{"page": 1}'
    return HELP, "", ""


def _continue(result: ToolReturnPart) -> tuple[str, str]:
    """Read the next page of the catalogue, if it has one."""
    page, _, pages = str(result.content).removeprefix("Page ").partition(":")[0].partition(" of ")
    if result.tool_name == "read_catalogue" and page != pages:
        return "read_catalogue", f'{{"page": {int(page) + 1}}}'
    return "", ""


def _advise(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    return ModelResponse(parts=[TextPart("A plain wooden desk goes with it.")])


assistant_model = FunctionModel(stream_function=_answer, model_name="scripted")
stylist_model = FunctionModel(_advise, model_name="scripted")
