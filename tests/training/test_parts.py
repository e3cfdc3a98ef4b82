"""Batches in parts: the step of the whole batch, with the activations of one part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, equal, learn, learner, mlp, moved
from optimizers import OPTIMIZERS
from torch import Tensor, nn

import hatfn
from hatfn.experiments.bench.timing import Contender, peak_memory
from hatfn.replicas import replica
from hatfn.state import HATState
from hatfn.testing import verify_no_forgetting

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X, Y = torch.randn(14, 5), torch.arange(14) % 2
IMAGES = torch.randn(14, 1, 6, 6)


def step(
    hat: hatfn.HAT, x: Tensor, y: Tensor, task: Any = 0, scale: float = 5.0
) -> tuple[HATState, HATState, Any]:
    """A state, what one step makes of it, and what that reports."""
    state = hat.begin(hat.init(0), task)
    new, info = hat.update(state, (x, y), task, scale)
    assert info.ok
    assert not equal(new.params, state.params)
    return state, new, info


def close(mine: Any, theirs: Any) -> None:
    for leaf, other in zip(optree.tree_leaves(mine), optree.tree_leaves(theirs), strict=True):
        torch.testing.assert_close(leaf, other, atol=1e-10, rtol=1e-10)


def double(module: nn.Module, x: Tensor, **settings: Any) -> hatfn.HAT:
    """Rounding in float64 is far below whatever a wrong weight of a part would do."""
    return learner(module.double(), x, **settings)


@pytest.mark.parametrize("optimizer", ["decay", "adam"])
@pytest.mark.parametrize("parts", [2, 3, 14, 100])
@pytest.mark.parametrize("task", [0, [0, 2]], ids=["alone", "together"])
def test_parts_take_the_step_of_the_whole(parts: int, optimizer: str, task: Any) -> None:
    module, x = mlp(), X.double()
    y = Y
    if task != 0:
        x, y = torch.stack([x, x.flip(0) + 1]), torch.stack([y, y.flip(0)])
    settings = {"head": "4", "optimizer": OPTIMIZERS[optimizer](), "max_norm": 0.1}
    _, whole, said = step(double(module, X.double(), **settings), x, y, task)
    start, new, info = step(double(module, X.double(), accumulate=parts, **settings), x, y, task)
    close(new, whole)
    close(info, said)
    # Adam's first step hardly knows how large a gradient is, but its moments do.
    assert not equal(new.opt_state, start.opt_state)


def test_statistics_go_from_part_to_part_and_gradients_are_averaged_by_samples() -> None:
    plain = {"optimizer": torchopt.sgd(1.0), "max_norm": None, "clamp": 1e9}
    images, labels, cut = IMAGES[:5].double(), Y[:5], [3, 2]
    hat = double(ConvNet(), images, **plain)
    state, new, info = step(double(ConvNet(), images, accumulate=2, **plain), images, labels)
    parts = list(zip(images.split(cut), labels.split(cut), strict=True))
    (one, said), (two, then) = (hat.update(state, part, 0, 5.0) for part in parts)
    close(info.logits, torch.cat([said.logits, then.logits]))
    close(info.loss, (3 * said.loss + 2 * then.loss) / 5)
    for field in ("params", "task_params", "embeddings"):
        for name, leaf in getattr(new, field).items():
            was, first, second = (getattr(each, field)[name] for each in (state, one, two))
            close(leaf - was, (3 * (first - was) + 2 * (second - was)) / 5)
    still = state._replace(hyper=state.hyper | {"lr": torch.zeros_like(state.hyper["lr"])})
    for part in parts:
        still, _ = hat.update(still, part, 0, 5.0)
    assert equal(new.task_buffers, still.task_buffers)
    assert not equal(new.task_buffers, state.task_buffers)


@pytest.mark.parametrize("task", [0, [0, 2]], ids=["alone", "together"])
@pytest.mark.parametrize("shared", [False, True])
def test_replicas_take_their_steps_in_parts(task: Any, shared: bool) -> None:
    images, labels = IMAGES.double().repeat(2, 1, 1, 1), Y.repeat(2)
    seeds, tasks = () if shared else (2,), () if task == 0 else (2,)
    shape = *seeds, *tasks, -1
    x, y = images[:24].reshape(*shape, 1, 6, 6), labels[:24].reshape(shape)
    hat = double(ConvNet(), images, accumulate=4)
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, [3, 7])
    states, info = many.update(many.begin(states, task), (x, y), task, 5.0, shared)
    whole = many._replace(hat=replace(hat, accumulate=1))
    other, _ = whole.update(many.begin(states, task), (x, y), task, 5.0, shared)
    assert not equal(other.task_buffers, states.task_buffers)
    for i, seed in enumerate([3, 7]):
        batch = (x, y) if shared else (x[i], y[i])
        state = hat.begin(hat.init(seed, fresh=True), task)
        alone, said = hat.update(state, batch, task, 5.0)
        close(replica(states, i), alone)
        close(optree.tree_map(lambda leaf, i=i: leaf[i], info), said)


def test_vmap_over_steps_in_parts() -> None:
    hat = double(mlp(), X.double(), head="4", accumulate=3)
    states = hatfn.replicate(hat, [3, 7])
    states = hatfn.Replicas(hat).begin(states, 0)
    x = torch.stack([X, X + 1]).double()
    update = torch.vmap(hat.update, in_dims=(0, 0, None, None), randomness="different")
    new, info = update(states, (x, torch.stack([Y, Y])), 0, 5.0)
    for i in range(2):
        alone, said = hat.update(replica(states, i), (x[i], Y), 0, 5.0)
        close(replica(new, i), alone)
        close(info.loss[i], said.loss)
        assert moved(replica(states, i), alone)


@pytest.mark.parametrize("bad", range(3))
def test_a_part_that_is_not_finite_refuses_the_step(bad: int) -> None:
    hat = learner(mlp(), X, head="4", accumulate=3)
    state, x = hat.begin(hat.init(0), 0), X.clone()
    x[5 * bad, 0] = torch.nan
    new, info = hat.update(state, (x, Y), 0, 5.0)
    assert not info.ok
    assert equal(new, state)
    assert moved(state, hat.update(state, (X, Y), 0, 5.0)[0])


@pytest.mark.parametrize("optimizer", ["decay", "adam"])
def test_nothing_drifts_in_parts(optimizer: str) -> None:
    hat = learner(ConvNet(), IMAGES, optimizer=OPTIMIZERS[optimizer](), accumulate=3)
    first = learn(hat, hat.init(0), IMAGES, 0)
    later = learn(hat, first, IMAGES, 1)
    assert torch.equal(hat.forward(later, IMAGES, 0), hat.forward(first, IMAGES, 0))
    assert not equal(later.params, first.params)
    assert verify_no_forgetting(hat, later, IMAGES).tested


def highest(hat: hatfn.HAT, x: Tensor) -> int:
    """Bytes that a step holds at most."""
    state, y = hat.begin(hat.init(0), 0), torch.zeros(len(x), dtype=torch.int64)
    return peak_memory(Contender("step", lambda: hat.update(state, (x, y), 0, 5.0)))


def test_a_step_in_parts_holds_the_activations_of_one() -> None:
    module, x = mlp(), torch.zeros(8192, 5)  # activations are nearly all that there is
    whole, parts = (highest(learner(module, x, head="4", accumulate=n), x) for n in (1, 8))
    # Logits, and the inputs' copy, are of the whole batch in either.
    assert parts < whole / 4
