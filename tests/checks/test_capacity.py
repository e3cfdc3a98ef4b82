"""Capacity: who uses what, who reuses whose units, budgets, and warnings before it is gone."""

from __future__ import annotations

import pytest
import torch
import torchopt
from nets import learn, learner

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


def test_overlap_counts_the_units_two_tasks_share() -> None:
    hat = learner(MLP(5, 3, width=64), X)
    state = hat.init(0)
    chosen = {0: ([0, 1, 2], [0]), 2: ([1, 2, 3, 4], [5, 6])}
    for task, (first, second) in chosen.items():
        state = masked(hat, state, task, {"hidden.0": first, "hidden.1": second})
        state = hat.consolidate(state, task)
    table = hatfn.overlap(state, hat.wiring)
    assert table.columns.tolist() == [0, 2]
    assert table.loc["hidden.0"].to_numpy().tolist() == [[3, 2], [2, 4]]
    assert table.loc["hidden.1"].to_numpy().tolist() == [[1, 0], [0, 2]]
    assert table.groupby("task").sum().to_numpy().tolist() == [[4, 2], [2, 6]]
    assert hatfn.overlap(hat.init(0), hat.wiring).empty


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
