"""Warnings before capacity is gone, and settings of it that are refused."""

from __future__ import annotations

import pytest
import torch
import torchopt
from nets import learner
from torch import Tensor, nn

import hatfn
from hatfn.models import MLP

X = torch.randn(8, 5)


def masked(hat: hatfn.HAT, state: hatfn.HATState, task: int, units: dict[str, list[int]]):
    """The state with a task's embeddings such that exactly some units are on."""
    embeddings = {}
    for group, e in state.embeddings.items():
        on = torch.isin(torch.arange(e.shape[1]), torch.tensor(units.get(group, []), dtype=torch.long))
        embeddings[group] = e.index_copy(0, torch.tensor([task]), (on * 2.0 - 1)[None])
    return state._replace(embeddings=embeddings)


def test_a_first_task_that_takes_everything_is_named() -> None:
    hat = learner(MLP(5, 3, width=16), X)
    state = masked(hat, hat.init(0), 0, {"hidden.0": list(range(16)), "hidden.1": list(range(14))})
    with pytest.warns(
        hatfn.HATWarning, match=r"task 0 leaves .* to come \(2\) in hidden\.0 \(0 of 16"
    ) as seen:
        state = hat.consolidate(state, 0)
    assert len(seen) == 1
    assert "hidden.1" not in str(seen[0].message), "two units are left for two tasks"
    state = masked(hat, state, 1, {"hidden.0": [0], "hidden.1": [0, 14, 15]})
    with pytest.warns(
        hatfn.HATWarning, match=r"task 1 leaves .* to come \(1\) in hidden\.1 \(0 of 16"
    ) as seen:
        state = hat.consolidate(state, 1)
    assert "hidden.0" not in str(seen[0].message), "said before"
    hat.consolidate(masked(hat, state, 2, {"hidden.0": [1], "hidden.1": [1]}), 2)  # the last may


def test_a_group_that_is_switched_off_is_named() -> None:
    hat = learner(MLP(5, 3, width=16), X)
    state = masked(hat, hat.init(0), 1, {"hidden.0": [3]})
    with pytest.warns(hatfn.HATWarning, match=r"task 1 uses no unit of hidden\.1"):
        hat.consolidate(state, 1)


def test_replicas_are_warned_as_well() -> None:
    hat = learner(MLP(5, 3, width=16), X, init="dense")
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, [0, 1])
    with pytest.warns(hatfn.HATWarning, match="task 0 leaves"):
        many.consolidate(many.begin(states, 0), 0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"sparsity": [0.5, 0.5]}, "2 numbers for 3 tasks"),
        ({"sparsity": "high"}, "one for each task"),
        ({"sparsity": [0.5, -1.0, 0.5]}, "sparsity=-1"),
        ({"quota": 1.5}, "quota=1.5"),
        ({"quota": [0.1, float("nan"), 0.1]}, "quota=nan"),
    ],
)
def test_wrong_settings(wrong: dict, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        learner(MLP(5, 3, width=16), X, **wrong)


class Bent(nn.Module):
    """Weights that no gate reaches, since they are bent away from zero, and an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.large, self.head = (
            nn.Linear(4, 6),
            nn.Parameter(torch.randn(9, 6)),
            nn.Linear(9, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            nn.functional.linear(torch.special.sinc(self.a(x)).logcumsumexp(1), self.large.exp())
        )


def test_a_wiring_that_shares_little_says_why() -> None:
    wiring = hatfn.trace(Bent(), torch.randn(2, 4), head="head")
    assert wiring.measures.shared < 0.5
    with pytest.warns(
        hatfn.HATWarning, match=r"share only 36% .* reaches large; .* aten\.logcumsumexp"
    ):
        hatfn.build(Bent(), wiring, [3], torchopt.sgd(0.1))


def test_a_wiring_that_shares_enough_says_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    hatfn.build(net, hatfn.trace(net, torch.randn(2, 4), head="2"), [3], torchopt.sgd(0.1))
