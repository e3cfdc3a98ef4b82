"""A learner's life in any order: whatever was done, what was promised holds, and nothing else moved."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
from hypothesis import Phase, seed, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)
from life import NETWORKS, Life

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

CASES = [(network, optimizer) for network in NETWORKS for optimizer in ("decay", "adam")]


def live(index: int, request: pytest.FixtureRequest, lives: int, length: int, **how: Any) -> int:
    """Let one of the machines live; print what was done and compared; the number of steps."""
    network, optimizer = CASES[index]
    seen: Counter[str] = Counter()
    machine = type("Life", (Life,), {"network": network, "optimizer": optimizer, "seen": seen})
    number = len(CASES) * request.config.option.seed + index
    how = {"max_examples": lives, "stateful_step_count": length} | how
    run_state_machine_as_test(seed(number)(machine), settings=settings(**how))
    print(network, optimizer, dict(seen))
    assert seen["compared, weights moved since, in promise"], "nothing was proven"
    return seen["steps"]


ALL = pytest.mark.parametrize("index", range(len(CASES)), ids=map(" ".join, CASES))


@ALL
def test_a_short_life(index: int, request: pytest.FixtureRequest) -> None:
    live(index, request, lives=12, length=25)


@ALL
@pytest.mark.slow
def test_a_long_life(index: int, request: pytest.FixtureRequest) -> None:
    """2,000 steps over all cases, at least."""
    assert live(index, request, lives=25, length=50) >= 500


@ALL
def test_it_sees_a_leak(index: int, request: pytest.FixtureRequest) -> None:
    """Steps that pay no heed to what is protected."""
    how = {"phases": [Phase.generate], "report_multiple_bugs": False}
    with (
        mock.patch("hatfn.method.transforms.drop", lambda held, value: value),
        mock.patch("hatfn.numerics.zeros.drop", lambda held, value: value),
        mock.patch("hatfn.numerics.zeros.drop_", return_value=None),
        pytest.raises(AssertionError, match="task "),
    ):
        live(index, request, lives=12, length=25, **how)
