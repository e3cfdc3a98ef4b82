"""On none of hatfn's own paths is anything forgotten; and what a certificate refuses to say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import learn, learner, mlp
from optimizers import OPTIMIZERS
from torch import Tensor, nn

import hatfn
from hatfn.models import MLP
from hatfn.replicas import replica
from hatfn.state import HATState
from hatfn.testing import Verification, verify_no_forgetting
from hatfn.wiring import Units

# Learners this small use up their units; test_silent.py has the warnings that say so.
pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X = torch.randn(16, 5)


class Block(nn.Module):
    """Batch norms, and a residual block with a downsample convolution."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.head((self.inner(x) + self.downsample(x)).relu().mean((2, 3)))


IMAGES = torch.randn(12, 1, 6, 6)
LABELS = torch.randint(2, (12,))


def updated(hat: hatfn.HAT, state: HATState, task: Any, scale: float | None = 50.0) -> HATState:
    """Three steps of open tasks."""
    x, y = (t if isinstance(task, int) else torch.stack([t] * len(task)) for t in (IMAGES, LABELS))
    for _ in range(3):
        state, info = hat.update(state, (x, y), task, scale)
        assert info.ok
    return state


def together(hat: hatfn.HAT, state: HATState) -> HATState:
    return hat.consolidate(updated(hat, hat.begin(state, [1, 2]), [1, 2]), 1)


def binary(hat: hatfn.HAT, state: HATState) -> HATState:
    return updated(hat, hat.begin(state, 1), 1, scale=None)


def recalibrated(hat: hatfn.HAT, state: HATState) -> HATState:
    state = updated(hat, hat.begin(state, 1), 1)
    return hat.consolidate(hat.recalibrate(state, [IMAGES, 2 * IMAGES], 1), 1)


def in_two_sittings(hat: hatfn.HAT, state: HATState, folder: Path) -> HATState:
    hatfn.save(folder / "state", updated(hat, hat.begin(state, 1), 1), hat)
    return hat.consolidate(updated(hat, hatfn.load(folder / "state", hat), 1), 1)


def forgotten(hat: hatfn.HAT, state: HATState, how: str) -> HATState:
    """Something only task 1 uses is given back, and used by another."""
    state = learn(hat, state, IMAGES, 1)
    return learn(hat, hat.forget(state, 1)[0] if how == "forget" else hat.prune(state, 0)[0], IMAGES, 2)


PATHS = {
    "carried moments": lambda hat, state, _: learn(hat, state, IMAGES, 1, carry=True),
    "several at once": lambda hat, state, _: together(hat, state),
    "binary gates": lambda hat, state, _: binary(hat, state),
    "recalibrate": lambda hat, state, _: recalibrated(hat, state),
    "a warm start": lambda hat, state, _: learn(hat, state, IMAGES, 1, init_from=0),
    "save and load": in_two_sittings,
    "forget": lambda hat, state, _: forgotten(hat, state, "forget"),
    "prune": lambda hat, state, _: forgotten(hat, state, "prune"),
}


def certify(hat: Any, state: HATState, later: HATState) -> Verification:
    """The certificate of task 0, and that shared weights did move."""
    seen = verify_no_forgetting(hat, state, IMAGES, later, tasks=[0])
    assert any(name.startswith("state.params") for name in seen.tested)
    return seen


@pytest.mark.parametrize("path", PATHS)
def test_no_path_of_hatfn_is_caught(path: str, tmp_path: Path) -> None:
    hat = learner(Block(), IMAGES)
    state = learn(hat, hat.init(0), IMAGES, 0)
    later = PATHS[path](hat, state, tmp_path)
    certify(hat, state, later)
    if later.learned.sum() > 1:  # what came later is as safe
        verify_no_forgetting(hat, later, IMAGES)


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", "nesterov", "adam, decay", "adamw", "rmsprop, decay", "adagrad, decay", "adadelta, decay"],
)
def test_no_optimiser_is_caught(optimizer: str) -> None:
    hat = learner(Block(), IMAGES, optimizer=OPTIMIZERS[optimizer]())
    state = learn(hat, hat.init(0), IMAGES, 0)
    certify(hat, state, learn(hat, state, IMAGES, 1, carry=True))


def test_growing_is_not_caught() -> None:
    hat = learner(Block(), IMAGES)
    state = learn(hat, hat.init(0), IMAGES, 0)
    grown, wide = hatfn.grow(hat, state, classes=[5])
    later = learn(grown, wide, IMAGES, 3)
    certify(grown, wide, later)
    before = hat.forward(state, IMAGES, 0)
    assert torch.equal(grown.forward(later, IMAGES, 0), before)


def test_adopting_is_not_caught() -> None:
    hat = hatfn.adopt(learner(Block(), IMAGES), Block(classes=7))
    state = learn(hat, hat.init(0), IMAGES, 0)
    certify(hat, state, learn(hat, state, IMAGES, 1))


def test_replicas_are_not_caught() -> None:
    hat = learner(Block(), IMAGES)
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, [3, 4], sparsity=[0.1, 1.0])

    def trained(states: HATState, task: int) -> HATState:
        states = many.begin(states, task, carry=bool(task))
        for _ in range(3):
            states, info = many.update(states, (IMAGES, LABELS), task, 50.0, shared=True)
            assert info.ok.all()
        return many.consolidate(states, task)

    before = trained(states, 0)
    later = trained(before, 1)
    for i in range(2):
        certify(hat, replica(before, i), replica(later, i))


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_module_locks_nothing_out(mode: bool) -> None:
    """Its mode belongs to the call: a module in eval mode is trained, and locked, like any other."""
    module = Block()
    hat = learner(module.train(mode), IMAGES)
    state = learn(hat, hat.init(0), IMAGES, 0)
    module.train(not mode)
    certify(hat, state, learn(hat, state, IMAGES, 1))


@pytest.mark.parametrize(
    ("protection", "settings"),
    [("paper", {"s_max": 10.0}), ("adaptive", {}), ("magnitude", {})],
)
def test_the_certificate_says_where_hatfn_promises_less(protection: str, settings: Any) -> None:
    """The papers' rule holds as firmly as gates are open: at a small s_max not by 1."""
    hat = learner(mlp(), X, head="4", init="dense", protection=protection, **settings)
    state = hat.consolidate(hat.init(0), 0)
    with pytest.raises(AssertionError, match=r"reach the output: task 0: 0\.weight by"):
        verify_no_forgetting(hat, state, X)
    exact = learner(mlp(), X, head="4", init="dense", **settings)
    verify_no_forgetting(exact, exact.consolidate(exact.init(0), 0), X)


def test_hatfn_served_by_soft_gates_is_caught() -> None:
    """What is promised is promised of binary gates: units just below zero leak at any scale."""
    hat = learner(mlp(), X, head="4")
    low = torch.full((3, 16), -0.02).index_fill(1, torch.arange(0, 16, 2), 1.0)
    start = hat.init(0)
    state = hat.consolidate(start._replace(embeddings={"0": low, "2": low}), 0)
    later = learn(hat, state, X, 1)
    verify_no_forgetting(hat, state, X, later)
    soft = SimpleNamespace(forward=partial(hat.forward, scale=100.0))
    with pytest.raises(AssertionError, match=r"state\.params\['0\.weight'\] alone by"):
        verify_no_forgetting(soft, state, X, later, tasks=[0])


class Linear:
    """Outputs x @ a @ b."""

    def forward(self, state: Any, x: Tensor, task: int) -> Tensor:
        return x @ state["a"] @ state["b"]


BEFORE = {"a": torch.eye(5), "b": torch.eye(5), "c": torch.zeros(1)}


def test_leaves_that_leak_only_together_are_told() -> None:
    class Either(Linear):
        def forward(self, state: Any, x: Tensor, task: int) -> Tensor:
            return x + (state["a"].sum() > 5).float() * (state["b"].sum() > 5).float()

    later = {name: leaf + 1 for name, leaf in BEFORE.items()}
    with pytest.raises(
        AssertionError, match=r"task 0 moved by 1 \(several leaves together, none alone\)"
    ):
        verify_no_forgetting(Either(), BEFORE, X, later, tasks=[0])


def test_every_task_that_moved_is_told() -> None:
    with pytest.raises(AssertionError, match=r"task 0 moved .*; task 3 moved"):
        verify_no_forgetting(Linear(), BEFORE, X, BEFORE | {"a": -torch.eye(5)}, tasks=[0, 3])


def test_a_leaf_that_is_new_or_has_grown_leaks_by_its_use() -> None:
    class Wide(Linear):
        def forward(self, state: Any, x: Tensor, task: int) -> Tensor:
            return x @ state["a"][:, :5] * state.get("d", 1.0)

    grown = BEFORE | {"a": torch.eye(5, 7), "d": torch.ones(())}
    seen = verify_no_forgetting(Wide(), BEFORE, X, grown, tasks=[0])
    assert seen.tested == ("state['a']",)
    with pytest.raises(AssertionError, match="several leaves together"):
        verify_no_forgetting(Wide(), BEFORE, X, grown | {"d": torch.zeros(())}, tasks=[0])


def test_a_certificate_of_nothing_is_refused() -> None:
    class Deaf(Linear):
        def forward(self, state: Any, x: Tensor, task: int) -> Tensor:
            return super().forward(state, torch.ones_like(x), task)

    class Dropping(Linear):
        def forward(self, state: Any, x: Tensor, task: int) -> Tensor:
            return nn.functional.dropout(super().forward(state, x, task))

    class Counting(Linear):
        def forward(self, state: Any, x: Tensor, task: int) -> Tensor:
            state["a"] += 1
            return super().forward(state, x, task)

    class Undefined(Linear):
        def forward(self, state: Any, x: Tensor, task: int) -> Tensor:
            return super().forward(state, x, task) * torch.nan

    later = BEFORE | {"c": torch.ones(1)}
    verify_no_forgetting(Linear(), BEFORE, X, later, tasks=[0])
    for hat, after, words in (
        (Deaf(), later, "does not depend on the input"),
        (Dropping(), later, "two different outputs of task 0"),
        (Counting(), later, "without writing to the state"),
        (Undefined(), later, "contain nan"),
        (Linear(), dict(BEFORE), "no leaf differs"),
    ):
        before = {name: leaf.clone() for name, leaf in BEFORE.items()}
        with pytest.raises(AssertionError, match=words):
            verify_no_forgetting(hat, before, X, after, tasks=[0])


def test_a_task_that_was_left_out_of_the_locks_is_told() -> None:
    hat = learner(mlp(), X, head="4", init="dense")
    state = learn(hat, hat.init(0), X, 0)
    later = learn(hat, state, X, 1, locked=[])
    with pytest.raises(AssertionError, match=r"state\.params\['0\.weight'\] alone by"):
        verify_no_forgetting(hat, state, X, later)


def test_verify_no_forgetting_can_fail() -> None:
    """A learner whose wiring calls a needed weight unprotected is caught, and the weight is named."""
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = learn(hat, hat.init(0), x, 0)
    wrong = hat.wiring.params["hidden.1.weight"]
    flipped = wrong._replace(in_units=Units(wrong.in_units.index.flip(1)))
    params = dict(hat.wiring.params) | {"hidden.1.weight": flipped}
    wiring = replace(hat.wiring, params=params)
    broken = replace(hat, network=hat.network._replace(wiring=wiring))
    with pytest.raises(AssertionError, match=r"hidden\.1\.weight by"):
        verify_no_forgetting(broken, state, x)
