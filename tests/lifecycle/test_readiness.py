"""What differs between training a task and serving it."""

from __future__ import annotations

import pytest
import torch
import torchopt
from nets import ConvNet, learner
from torch import nn

import hatfn
from hatfn.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X, Y = torch.randn(12, 5), torch.randint(3, (12,))


def test_a_task_that_is_decided_has_no_gap() -> None:
    hat = learner(MLP(5, 3, width=16), X, s_max=100.0)
    state = hat.begin(hat.init(0), 0)
    far = {group: e.sign() * 3 for group, e in state.embeddings.items()}
    seen = hatfn.readiness(hat, state._replace(embeddings=far), [(X, Y)], 0)
    assert not any(units.any() for units in seen.undecided.values())
    assert abs(seen.gap) < 1e-6
    expected = nn.functional.cross_entropy(hat.forward(state, X, 0, scale=100.0), Y)
    assert abs(hatfn.readiness(hat, state, [(X, Y)], 0).soft - expected) < 1e-6


def test_units_near_zero_are_undecided_and_cost() -> None:
    """At |e| = 0.01 and s = 100 a gate is 0.73 or 0.27, and is served as 1 or 0."""
    hat = learner(MLP(5, 3, width=16), X, s_max=100.0)
    state = hat.begin(hat.init(0), 0)
    start = state.embeddings["hidden.1"]
    near = {**state.embeddings, "hidden.1": torch.where(start.abs() > 0.5, 0.01 * start.sign(), start)}
    state = state._replace(embeddings=near)
    seen = hatfn.readiness(hat, state, [(X[:4], Y[:4]), (X[4:], Y[4:])], 0)
    assert torch.equal(seen.undecided["hidden.1"], start[0].abs() > 0.5)
    served = hat.forward(hat.consolidate(state, 0), X, 0)
    soft = hat.forward(state, X, 0, scale=100.0)
    losses = [nn.functional.cross_entropy(logits, Y).double() for logits in (served, soft)]
    torch.testing.assert_close(seen.gap, losses[0] - losses[1], atol=1e-6, rtol=0)
    assert (served - soft).abs().max() > 1e-3
    assert seen.gap == seen.binary - seen.soft


def test_undecided_is_by_the_gate_at_a_scale_and_a_tolerance() -> None:
    hat = learner(MLP(5, 3, width=16), X, s_max=100.0)
    state = hat.init(0)
    for scale, tolerance in ((100.0, 0.01), (10.0, 0.01), (10.0, 0.3)):
        seen = hatfn.readiness(hat, state, [(X, Y)], 0, scale, tolerance)
        for group, units in seen.undecided.items():
            gates = torch.sigmoid(scale * state.embeddings[group][0])
            assert torch.equal(units, (gates > tolerance) & (gates < 1 - tolerance))


def test_measurement_can_choose_the_statistics() -> None:
    """The loss under binary gates, with the statistics of training and with those re-estimated."""
    x, y = torch.randn(32, 1, 6, 6), torch.randint(3, (32,))
    hat = learner(ConvNet(), x, optimizer=torchopt.adam(1e-2))
    state = hat.begin(hat.init(0), 0)
    for step in range(12):
        state, _ = hat.update(state, (x, y), 0, 10.0 * (step + 1))
    new = hat.recalibrate(state, x.split(8), 0)
    losses = [hatfn.readiness(hat, s, [(x, y)], 0).binary for s in (state, new)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda hat, state: hatfn.readiness(hat, state, [], 0), "no batch"),
        (lambda hat, state: hatfn.readiness(hat, state, [X], 0), "pair"),
        (lambda hat, state: hatfn.readiness(hat, state, [(X, Y)], 7), "task=7"),
        (lambda hat, state: hatfn.readiness(hat, state, [(X, Y)], 0, scale=-1.0), "scale=-1"),
        (lambda hat, state: hatfn.readiness(hat, state, [(X, Y)], 0, tolerance=0.5), "tolerance"),
    ],
)
def test_wrong_arguments(wrong, match: str) -> None:
    hat = learner(MLP(5, 3, width=16), X)
    with pytest.raises((TypeError, ValueError), match=match):
        wrong(hat, hat.init(0))
