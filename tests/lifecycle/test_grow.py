"""More tasks, planned or not: no output moves, and moments, settings and heads come along."""

from __future__ import annotations

import pytest
import torch
import torchopt
from nets import equal, learn, learner, moved, outputs
from torch import nn

import hatfn
import hatfn.models
from hatfn.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def test_growing_moves_no_output_and_adds_what_was_planned(case) -> None:
    """Also with wider heads than there were, and in the middle of a task."""
    hat, x, states = case
    state = states["two"]
    before = outputs(hat, state, x, 0, 1)
    grown, more = hatfn.grow(hat, state, classes=[7, 2])
    assert grown.classes == (3, 2, 3, 7, 2)
    assert grown.tasks == 5
    assert equal(outputs(grown, more, x, 0, 1), before)
    assert hat.classes == (3, 2, 3), "the old learner stays as it was"
    new = learn(grown, learn(grown, more, x, 3), x, 2)
    assert grown.forward(new, x, 3).shape == (len(x), 7)
    assert equal(outputs(grown, new, x, 0, 1), before)

    fresh = hatfn.grow(hat, states["none"], classes=[7, 2])[1]
    assert equal(fresh, grown.init(0)), "as if the tasks had been planned"


def test_growing_in_the_middle_of_a_task_keeps_the_moments(case) -> None:
    """The step after growing is the step that would have come without."""
    hat, x, states = case
    y = torch.randint(3, (len(x),))
    state = hat.begin(states["two"], 2)
    state, _ = hat.update(state, (x, y), 2, 20.0)
    grown, more = hatfn.grow(hat, state, classes=[7])
    after, _ = hat.update(state, (x, y), 2, 40.0)
    later, info = grown.update(more, (x, y), 2, 40.0)
    assert info.ok
    assert moved(state, after)
    assert equal(later.params, after.params)
    assert equal(
        hat.forward(hat.consolidate(after, 2), x, 2), grown.forward(grown.consolidate(later, 2), x, 2)
    )


def test_growing_one_at_a_time_without_classes() -> None:
    """num_tasks need not be known: a learner of one task becomes one of twenty."""
    x, y = torch.randn(8, 5), torch.randn(8, 3)
    hat = hatfn.build(
        module := nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3)),
        hatfn.trace(module, x),
        None,
        torchopt.adam(1e-2),
        loss=nn.functional.mse_loss,
    )
    state, recorded = hat.init(0), []
    for task in range(20):
        if task:
            hat, state = hatfn.grow(hat, state, num_tasks=1)
        begun = hat.begin(state, task)
        state, info = hat.update(begun, (x, y), task, 50.0)
        assert info.ok
        assert moved(begun, state)
        state = hat.consolidate(state, task)
        recorded.append(hat.forward(state, x, task))
    assert equal(outputs(hat, state, x, *range(20)), recorded)
    assert hat.predict(state, x).shape == (20, 8, 3)


def test_settings_of_tasks_grow_with_them() -> None:
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=64), x, sparsity=[0.1, 0.5, 0.9], quota=0.2)
    hat, state = hatfn.grow(hat, hat.init(0), classes=[2, 2])
    assert state.hyper["sparsity"].tolist() == [0.1, 0.5, 0.9, 0.9, 0.9]
    assert state.hyper["quota"].tolist() == [0.2] * 5
    assert equal(hat.init(0)._replace(opt_state=()), state._replace(opt_state=()))
