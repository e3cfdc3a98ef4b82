"""The penalty: its formula, and a weight and a budget for each task."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torchopt
from drawn import arrays
from hypothesis import given
from hypothesis.extra import numpy as nps
from nets import equal, learn, learner
from torch import Tensor

import hatfn
from hatfn.models import MLP

X = torch.randn(8, 5)


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_every_task_has_its_own_sparsity_and_budget() -> None:
    """The penalty's gradient of one task at a time, against a learner built for it alone."""
    y = torch.randint(2, (len(X),))
    weights, budgets = [0.0, 0.5, 2.0], [0.1, 0.0, 0.3]
    hat = learner(MLP(5, 3, width=16), X, sparsity=weights, quota=budgets)
    start = hat.init(0)
    seen = []
    for task in range(3):
        new, info = hat.update(hat.begin(start, task), (X, y), task, 10.0)
        alone = learner(MLP(5, 3, width=16), X, sparsity=weights[task], quota=budgets[task])
        same, told = alone.update(alone.begin(start, task), (X, y), task, 10.0)
        assert torch.equal(info.penalty, told.penalty)
        torch.testing.assert_close(new.embeddings, same.embeddings)
        assert not equal(new.embeddings, start.embeddings)
        seen.append(info.penalty.item())
    assert len(set(seen)) == 3
    _, info = hat.update(
        hat.begin(start, [0, 2]), (torch.stack([X, X]), torch.stack([y, y])), [0, 2], 10.0
    )
    assert info.penalty.tolist() == pytest.approx([seen[0], seen[2]])


def test_what_is_within_the_budget_costs_nothing() -> None:
    gates, free = {"a": torch.tensor([1.0, 0.0, 0.0, 0.0])}, {"a": torch.zeros(4, dtype=torch.bool)}
    assert hatfn.sparsity(gates, free, quota=0.25) == 0
    assert hatfn.sparsity(gates, free, quota=torch.tensor(0.0)) == 0.25


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_a_higher_first_sparsity_leaves_more_free() -> None:
    free = []
    for first in (0.0, 20.0):
        hat = learner(MLP(5, 3, width=64), X, sparsity=[first, 0.5, 0.5], optimizer=torchopt.adam(5e-2))
        state = learn(hat, hat.init(0), X, 0, steps=15)
        free.append(hatfn.usage(state, hat.wiring)["free"].mean())
    assert free[1] > free[0] + 0.1


@given(
    a=arrays(st.floats(0, 1, width=32), (3,)), b=arrays(st.floats(0, 1, width=32), (4,)),
    used_a=nps.arrays("bool", (3,)).map(torch.tensor), used_b=nps.arrays("bool", (4,)).map(torch.tensor),
    quota=st.floats(0, 1),
)  # fmt: skip
def test_sparsity_is_its_formula(
    a: Tensor, b: Tensor, used_a: Tensor, used_b: Tensor, quota: float
) -> None:
    gates, used = {"a": a, "b": b}, {"a": used_a, "b": used_b}

    def cost(pairs: list[tuple[Tensor, Tensor]]) -> float:
        free = sum(float((~u).sum()) for _, u in pairs)
        paid = sum(float((g * ~u).sum()) for g, u in pairs) - quota * sum(len(g) for g, _ in pairs)
        return max(0.0, paid) / free if free else 0.0

    pairs = [(a, used_a), (b, used_b)]
    whole = hatfn.sparsity(gates, used, quota=quota)
    assert math.isclose(float(whole), cost(pairs), abs_tol=1e-5)
    each = hatfn.sparsity(gates, used, over="groups", quota=quota)
    assert math.isclose(float(each), sum(cost([pair]) for pair in pairs) / 2, abs_tol=1e-5)


def test_sparsity_of_a_full_network_is_zero_and_has_a_gradient() -> None:
    gates = {"a": torch.rand(3, requires_grad=True)}
    cost = hatfn.sparsity(gates, {"a": torch.ones(3, dtype=torch.bool)})
    cost.backward()
    assert cost == 0
    assert torch.equal(gates["a"].grad, torch.zeros(3))
