"""Tasks are opened: any may be locked, again be trained, or be left to drift."""

from __future__ import annotations

import pytest
import torch
from nets import equal, learn, learner

from hatfn.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def test_any_subset_can_be_locked(case) -> None:
    """Learned tasks and ones that are not yet; those that are left out do move."""
    hat, x, states = case
    state = states["two"]
    served = [hat.forward(state, x, 1), hat.forward(hat.consolidate(state, 2), x, 2)]
    loose = hat.forward(state, x, 0)
    new = hat.begin(state, 0, locked=[1, 2])
    new = learn(hat, state, x, 0, locked=[1, 2])
    assert equal([hat.forward(new, x, 1), hat.forward(hat.consolidate(new, 2), x, 2)], served)
    assert not torch.equal(hat.forward(new, x, 0), loose), "trained again"
    assert new.locked.tolist() == [False, True, True]


def test_a_task_not_learned_yet_can_be_locked() -> None:
    x = torch.randn(12, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = hat.init(0)
    served = hat.forward(hat.consolidate(state, 2), x, 2)
    state = learn(hat, state, x, task=0, locked=[2])
    assert torch.equal(hat.forward(hat.consolidate(state, 2), x, 2), served)


def test_a_learned_task_can_be_trained_again() -> None:
    x = torch.randn(12, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = learn(hat, learn(hat, hat.init(0), x, 0), x, 1)
    kept, other = hat.forward(state, x, 1), hat.forward(state, x, 0)
    state = hat.begin(state, 0)
    assert state.learned.tolist() == [False, True, False]
    state = learn(hat, state, x, 0)
    assert torch.equal(hat.forward(state, x, 1), kept)
    assert not torch.equal(hat.forward(state, x, 0), other)
