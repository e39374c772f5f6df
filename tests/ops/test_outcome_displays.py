"""Every display of outcomes knows each outcome of a run."""

from __future__ import annotations

from typing import get_args

from agx.facts.outcome_marks import COLOURS, MARKS
from agx.facts.schema import Outcome
from dashboards import panels


def test_every_display_has_every_outcome() -> None:
    for shown in (MARKS, COLOURS, panels.OUTCOMES):
        assert shown.keys() == set(get_args(Outcome))
