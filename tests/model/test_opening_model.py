"""A run that is opened beside a recovery, in every order of their steps: no run begins that nobody would find."""

from __future__ import annotations

import pytest

from .opening_model import Rules, explore


def test_no_order_leaves_a_run_that_nobody_finds() -> None:
    states, wrong, trace = explore(Rules())
    assert wrong is None, "\n".join([wrong or "", *trace])
    assert states > 150  # it did explore


@pytest.mark.parametrize("rules", [Rules(deadline_comes_first=False), Rules(begin_is_in_time=False)], ids=str)
def test_each_rule_is_needed(rules: Rules) -> None:
    """Without it the model has a counterexample, so the model can find one."""
    _, wrong, trace = explore(rules)
    assert wrong == "nobody finds the run"
    assert trace
