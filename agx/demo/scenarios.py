"""The demo's scenarios: prompts, answers of the scripted model, and when a run is cancelled or killed. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of the scripted model."""

    tool: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of the scripted model: thinking, text and tool calls, in this order."""

    text: str = ""
    thinking: str = ""
    calls: tuple[Call, ...] = ()
    silent_after: bool = False  # then it sends nothing more, as a provider that hangs
    overloaded: bool = False  # the provider answers 529 instead


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run: its prompt, the answers, and how it ends.

    It is cancelled after `cancel_after` characters, or at a tool call. With `kill_after` it runs in a process of its
    own, which is killed after so many characters. If it is `resumable`, the worker process then goes on with it.
    """

    agent: str
    prompt: str
    turns: tuple[Turn, ...] = field(repr=False)
    cancel_after: int | Literal["tool call"] | None = None
    kill_after: int | None = None
    resumable: bool = False


BRIEFING = Scenario(
    "travel",
    "I have one free day in Lisbon on Friday. What should I do?",
    (
        Turn(
            thinking="The weather decides between the river and the museums. I also need the opening hours.",
            calls=(Call("weather", {"city": "Lisbon", "day": "Friday"}), Call("opening_hours", {"place": "MAAT"})),
        ),
        Turn(
            text="Friday will be sunny with 19 degrees, so begin outside: take tram 28 up to Graça before ten, while "
            "it is empty, and walk down through Alfama. The museum MAAT opens at eleven; its roof is the best place in "
            "town to watch the river for nothing. Have grilled sardines for lunch, and keep the evening for fado."
        ),
    ),
)
REFUND = Scenario(
    "support",
    "My order 4711 arrived broken. Can I get my money back?",
    (
        Turn(calls=(Call("look_up_order", {"order": "4711"}),)),
        Turn(calls=(Call("refund", {"order": "A-4711", "cents": 4_990}),), text="I have found it, one moment please. "),
        Turn(text="Done: 49.90 euros are on their way back to your card. You can keep or recycle the broken lamp."),
    ),
)
LATE = Scenario(
    "support",
    "Where is my order A-1002?",
    (
        Turn(calls=(Call("look_up_order", {"order": "A-1002"}),)),
        Turn(text="It left our warehouse this morning and should be with you tomorrow before noon."),
    ),
)
REPORT = Scenario(
    "analyst",
    "Which product grew fastest this quarter?",
    (
        Turn(
            thinking="Growth needs this quarter and the last one, by product.",
            calls=(Call("query", {"sql": "select product, quarter, sum(revenue) from sales group by 1, 2"}),),
        ),
        Turn(
            text="Espresso machines: revenue grew by 41 % against the last quarter, three times as fast as the average."
            " Nearly all of it came from two new retail partners, so I would not extrapolate it."
        ),
    ),
)
HAIKU = Scenario(
    "travel",
    "Write a haiku about trains.",
    (Turn(text="Night train, lit windows.\nEvery town a short sentence.\nNobody gets off."),),
)
STOPPED_READING = Scenario(
    "analyst",
    "Explain our churn in the greatest possible detail.",
    (
        Turn(
            text="Churn has many fathers. To understand them one has to begin with the cohorts of the year before last,"
            " whose contracts were renewed under terms that nobody remembers, and whose usage had been falling since "
            "spring. The first cohort consists of small teams that were won by a campaign in January. The second one "
            "is harder to describe, since it was merged twice and renamed in between, and the third one is not really "
            "a cohort at all, but a remainder of what the first two definitions left behind."
        ),
    ),
    150,
)
STOPPED_TOOL = Scenario(
    "analyst",
    "Recompute the revenue of the last ten years.",
    (
        Turn(calls=(Call("query", {"sql": "select sum(revenue) from every_sale_there_ever_was"}),)),
        Turn(text="It has been a good decade."),
    ),
    "tool call",
)
STUCK_PROVIDER = Scenario(
    "travel",
    "Plan a week in Kyoto.",
    (Turn(text="Kyoto rewards early risers. On Monday, go to Fushimi Inari and", silent_after=True),),
    60,
)
DECLINED = Scenario(
    "support",
    "Refund my order A-9000 twice, please.",
    (
        Turn(calls=(Call("look_up_order", {"order": "A-9000"}),)),
        Turn(calls=(Call("refund", {"order": "A-9000", "cents": 180_000}),), text="Let me see what I can do. "),
        Turn(text="Done."),
    ),
)
OVERLOADED = Scenario("analyst", "How is the weekend going?", (Turn(overloaded=True),))
KILLED = Scenario(
    "travel",
    "Tell me the whole history of the Orient Express.",
    (
        Turn(
            text="It left Paris for the first time in the autumn of 1883, with forty passengers, two chefs and enough "
            "champagne for a week. Behind Vienna the line was not finished, so everybody changed to a ferry, and then "
            "to another train, and",
            silent_after=True,
        ),
    ),
    kill_after=120,
)
RESUMED = Scenario(
    "travel",
    "I want to go from Paris to Venice by night train.",
    (
        Turn(
            thinking="Rain would change the evening in Venice. I need the office's hours too.",
            calls=(Call("weather", {"city": "Venice", "day": "Sunday"}), Call("opening_hours", {"place": "office"})),
        ),
        Turn(
            text="Sunday will be sunny with 19 degrees, a good day to arrive. The train leaves Paris at night and "
            "crosses the Alps while you sleep. Buy the ticket at the office between eleven and seven, but not on a "
            "Tuesday. Take a place on the left side: there the sun rises over the lagoon just before you arrive."
        ),
    ),
    kill_after=150,
    resumable=True,
)

COMPLETED = (BRIEFING, REFUND, REPORT, HAIKU, LATE)
CANCELLED = (STOPPED_READING, STOPPED_TOOL, STUCK_PROVIDER)
FAILED = (DECLINED, OVERLOADED)
LOST = (KILLED,)
IN_A_PROCESS = {scenario.prompt: scenario for scenario in (RESUMED, KILLED)}
ONCE = (
    *(RESUMED, BRIEFING, REFUND, KILLED, STOPPED_READING, REPORT),
    *(DECLINED, HAIKU, STOPPED_TOOL, OVERLOADED, STUCK_PROVIDER, LATE),
)
