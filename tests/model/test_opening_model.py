"""Explores every order of the steps of `opening_model`: each run that begins can be found by a recovery."""

from __future__ import annotations

import pytest

from .opening_model import Rules, explore


def test_every_order_leaves_a_run_that_a_recovery_finds() -> None:
    states, wrong, trace = explore(Rules())
    assert wrong is None, "\n".join([wrong or "", *trace])
    assert states > 150  # the model has not become trivial


@pytest.mark.parametrize("rules", [Rules(deadline_comes_first=False), Rules(begin_is_in_time=False)], ids=str)
def test_each_rule_is_needed(rules: Rules) -> None:
    """Without it the model has a counterexample, so the model can find one."""
    _, wrong, trace = explore(rules)
    assert wrong == "no recovery finds the run"
    assert trace
