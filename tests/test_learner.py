"""The learner's promises: nothing forgotten, nothing changed in place, many seeds at once."""

from __future__ import annotations

import warnings

import optree
import pytest
import torch
from nets import ConvNet, Transformer, equal, learn, learner, moved
from optimizers import OPTIMIZERS
from torch import Tensor, nn

from hatfn.models import MLP
from hatfn.testing import verify_no_forgetting

# Learners this small use up their units; test_silent.py has the warnings that say so.
pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

NETWORKS = {
    "mlp": (lambda: MLP(5, 3, width=16), lambda: torch.randn(12, 5)),
    "conv net": (ConvNet, lambda: torch.randn(12, 1, 6, 6)),
    "transformer": (Transformer, lambda: torch.randn(12, 4, 5)),
}


@pytest.mark.parametrize("carry", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize(
    "optimizer", ["sgd", "decay", "adam", "adamw", "rmsprop", "torch's nadam", "torch's fused sgd"]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_old_tasks_do_not_drift(network: str, optimizer: str, carry: bool) -> None:
    """The library's first claim: logits of every learned task, to the bit, after every later one."""
    make, inputs = NETWORKS[network]
    x = inputs()
    hat = learner(make(), x, optimizer=OPTIMIZERS[optimizer]())
    state, recorded = hat.init(seed=0), {}
    for task in (1, 0, 2):
        before = state
        state = learn(hat, state, x, task, steps=6, carry=carry)
        assert not equal(before.params, state.params), "nothing was learned, so nothing is proven"
        recorded[task] = hat.forward(state, x, task)
        for old, logits in recorded.items():
            assert torch.equal(hat.forward(state, x, old), logits), f"task {old} after {task}"
    verify_no_forgetting(hat, state, x)


def test_without_protection_they_do() -> None:
    x = torch.randn(12, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = learn(hat, hat.init(0), x, task=0)
    before = hat.forward(state, x, 0)
    state = learn(hat, state, x, task=1, locked=[])
    assert not torch.equal(hat.forward(state, x, 0), before)
    assert state.learned.tolist() == [True, True, False]
    assert state.locked.tolist() == [False, False, False]


@pytest.mark.parametrize("optimizer", ["decay", "adam", "adamw", "rmsprop"])
def test_many_seeds_in_one_call(optimizer: str) -> None:
    """vmap over a leading axis of states equals one after the other, batch norm included."""
    x, seeds = torch.randn(3, 8, 1, 6, 6).double(), [0, 1, 2]
    y = torch.randint(2, (3, 8))
    hat = learner(ConvNet().double(), x[0], optimizer=OPTIMIZERS[optimizer]())
    states = [hat.init(seed, fresh=True) for seed in seeds]

    def life(update, state, batch):
        for task in (1, 0):
            state = hat.begin(state, task)
            for scale in (2.0, 20.0):
                state, info = update(state, batch, task, scale)
            state = hat.consolidate(state, task)
        return state, info

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # torchopt's
        stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *states)
        begin = torch.vmap(hat.begin, in_dims=(0, None))
        update = torch.vmap(hat.update, in_dims=(0, 0, None, None), randomness="different")
        consolidate = torch.vmap(hat.consolidate, in_dims=(0, None))
        for task in (1, 0):
            stacked = begin(stacked, task)
            for scale in (2.0, 20.0):
                stacked, info = update(stacked, (x, y), task, scale)
            stacked = consolidate(stacked, task)
    assert info.ok.shape == (3,)
    for index, state in enumerate(states):
        alone, _ = life(hat.update, state, (x[index], y[index]))
        assert moved(state, alone)
        mine = optree.tree_map(lambda leaf, index=index: leaf[index], stacked)
        for old, new in zip(optree.tree_leaves(alone), optree.tree_leaves(mine), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)


def test_a_head_of_another_type_than_the_body() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 16, dtype=torch.bfloat16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu().float())

    x = torch.randn(8, 5, dtype=torch.bfloat16)
    hat = learner(Mixed(), x)
    assert hat.forward(learn(hat, hat.init(0), x, 0), x, 0).dtype == torch.float32


def test_classes_over_places_come_first() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    x = torch.randn(4, 1, 6, 6)
    hat = learner(Dense(), x)
    begun = hat.begin(hat.init(0), 1)
    state, _ = hat.update(begun, (x, torch.randint(2, (4, 4, 4))), 1, 5.0)
    assert moved(begun, state)
    state = hat.consolidate(hat.consolidate(state, 1), 0)
    maps = hat.predict(state, x)
    assert maps.shape == (2, 4, 3, 4, 4)
    assert maps[1, :, 2].eq(-torch.inf).all()
    torch.testing.assert_close(maps[1, :, :2], hat.forward(state, x, 1))


@pytest.mark.parametrize("tasks", [1, 100])
def test_a_hundred_tasks_and_one(tasks: int) -> None:
    """The only task is served as it was trained; the first of a hundred as before the last was."""
    x = torch.randn(4, 5)
    hat = learner(MLP(5, 2, width=128), x, classes=[2] * tasks, init="sparse")
    start = hat.init(0)
    state = learn(hat, start, x, 0)
    logits = hat.forward(state, x, 0)
    assert not torch.equal(logits, hat.forward(hat.consolidate(start, 0), x, 0)), "as untrained"
    if tasks > 1:
        first, state = state, learn(hat, state, x, tasks - 1)
        assert not equal(first.params, state.params)
        assert torch.equal(hat.forward(state, x, 0), logits)
    every = hat.predict(state, x)
    assert every.shape == (min(tasks, 2), 4, 2)
    torch.testing.assert_close(every[0], logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(8, 5, dtype=dtype)
    hat = learner(MLP(5, 3, width=16).to(dtype), x)
    state = learn(hat, hat.init(0), x, 0)
    logits = hat.forward(state, x, 0)
    state = learn(hat, state, x, 1)
    assert logits.dtype == dtype
    assert torch.equal(hat.forward(state, x, 0), logits)
    verify_no_forgetting(hat, state, x)
