"""The papers' formulas: an implementation of its own that follows Serrà et al. 2018 line by line, and
numbers worked out by hand, against the learner.

The paper's equations: 1 the gate a = sigmoid(s e); 2 the gradient of a weight times 1 - min(post, pre) of
the cumulative maximum; 3 the annealing of s; 4 the loss with the weighted penalty; 5 the penalty over
what is still free; 6 the forgetting ratio; and, in section 2.5, the compensation of the embeddings'
gradients. Equation 3 counts progress in batches, (b - 1) / (B - 1), which reaches 1; the paper's code
counts samples, i / len, which never does. Clip and first layer (post alone) are the code's as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from paper import CLASSES, LAYERS, SIZES, Paper, copied, learner, network, paper_training
from torch import Tensor, nn

import hatfn
from hatfn.evaluation import metrics
from hatfn.method import schedule
from hatfn.state import HATState

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

SETTINGS = {
    "the published": {"s_max": 400.0, "sparsity": 0.75, "lr": 0.05, "max_norm": 10_000.0},
    "clipped": {"s_max": 20.0, "sparsity": 0.75, "lr": 0.05, "max_norm": 0.7},
    "soft masks": {"s_max": 3.0, "sparsity": 2.0, "lr": 0.1, "max_norm": 10_000.0},
    "own factor": {"s_max": 20.0, "sparsity": 0.3, "lr": 0.02, "max_norm": 0.5, "compensation": 100.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_tasks_are_the_papers(setting: str) -> None:
    """Weights, biases, heads, embeddings and cumulative masks, after every task, to rounding."""
    values = dict(SETTINGS[setting])
    lr, epochs, batch = values.pop("lr"), 2, 8
    data = [(torch.randn(30, SIZES[0]).double(), torch.randint(c, (30,))) for c in CLASSES]
    hat = learner(network(), optimizer=torchopt.sgd(lr), **values)
    state = hat.init(seed=0)
    start, theirs = copied(state), copied(state)
    factor = values.pop("compensation", values["s_max"])
    anneal = schedule.linear(values["s_max"])
    history = paper_training(
        theirs, data, epochs=epochs, batch=batch, lr=lr, compensation=factor, **values
    )
    clipped = 0
    for task, (x, y) in enumerate(data):
        state = hat.begin(state, task)
        for _ in range(epochs):
            for i in range(0, len(x), batch):
                step = (x[i : i + batch], y[i : i + batch])
                state, info = hat.update(state, step, task, anneal(i / len(x)))
                assert info.ok
                clipped += bool(info.grad_norm > values["max_norm"])
        state = hat.consolidate(state, task)
        used = hat.used(state._replace(locked=state.learned))
        for layer, cumulative in zip(LAYERS, history[task], strict=True):
            torch.testing.assert_close(used[layer], cumulative, rtol=1e-10, atol=1e-12)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    ours = copied(state)
    for task in range(len(CLASSES)):
        for leaf, other, old in zip(
            ours.leaves(task), theirs.leaves(task), start.leaves(task), strict=True
        ):
            close(leaf, other.detach())
            assert not torch.equal(leaf, old), "nothing moved, so nothing is compared"
    assert bool(clipped) == (values["max_norm"] < 100)


def real(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def small(e: list[list[list[float]]], **settings: Any) -> tuple[hatfn.HAT, HATState]:
    """A network of 2 inputs and layers of 2 and 3 units, with embeddings e of [layer][task][unit].

    Its weights are positive, so that no unit is dead on the second sample of the batch.
    """
    hat = learner(network((2, 2, 3)), **settings)
    embeddings = {layer: real(rows) for layer, rows in zip(LAYERS, e, strict=True)}
    state = hat.init(seed=0)
    params = {name: value.abs() for name, value in state.params.items()}
    return hat, state._replace(embeddings=embeddings, params=params)


LOW, MIDDLE, HIGH = -math.log(3.0), 0.0, math.log(3.0)  # sigmoid: 1/4, 1/2, 3/4
FIRST = [[HIGH, LOW], [MIDDLE, LOW], [0.1, -0.2]]
SECOND = [[LOW, MIDDLE, HIGH], [HIGH, LOW, LOW], [0.3, -0.1, 0.2]]
BATCH = (real([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([0, 1]))


def test_equation_1_the_gate() -> None:
    """h = a * relu(W x + b) with a = sigmoid(s e), on one unit per layer in numbers."""
    hat = learner(network((1, 1, 1)), classes=[1], s_max=4.0)
    state = hat.init(0)
    numbers = {"0.weight": [[2.0]], "0.bias": [1.0], "2.weight": [[3.0]], "2.bias": [-0.5]}
    state = state._replace(
        params={name: real(value) for name, value in numbers.items()},
        task_params={
            "4.weight": real([[[1.0]]]),
            "4.bias": real([[0.0]]),
        },
        embeddings={"0": real([[HIGH / 2]]), "2": real([[LOW / 2]])},
    )
    x = real([[1.0]])
    first = 0.75 * (2.0 * 1.0 + 1.0)
    second = 0.25 * (3.0 * first - 0.5)
    torch.testing.assert_close(hat.forward(state, x, 0, scale=2.0), real([[second]]))


def test_equation_2_the_cumulative_maximum_and_the_smaller_end() -> None:
    """Two tasks' gates at s_max (here 2, of half the embeddings), worked out by hand."""
    halved = [[[v / 2 for v in row] for row in layer] for layer in (FIRST, SECOND)]
    hat, state = small(halved, s_max=2.0)
    for task in (0, 1):
        state = hat.consolidate(state, task)
    state = hat.begin(state, 2)
    used = hat.used(state)
    torch.testing.assert_close(used["0"], real([0.75, 0.25]))
    torch.testing.assert_close(used["2"], real([0.75, 0.5, 0.75]))
    expected = {
        "0.weight": [[0.75, 0.75], [0.25, 0.25]],
        "0.bias": [0.75, 0.25],
        "2.weight": [[0.75, 0.25], [0.5, 0.25], [0.75, 0.25]],
        "2.bias": [0.75, 0.5, 0.75],
    }
    assert state.protection.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state.protection[name], real(value))
    free, _ = hat.update(hat.begin(state, 2, locked=[]), BATCH, 2, scale=1.0)
    held, _ = hat.update(state, BATCH, 2, scale=1.0)
    for name, value in expected.items():
        whole, part = (new.params[name] - state.params[name] for new in (free, held))
        torch.testing.assert_close(part, whole * (1 - real(value)))
        assert whole.any(), name
    assert hat.begin(state, 2, locked=[1]).protection["0.bias"].tolist() == pytest.approx([0.5, 0.25])


def test_equation_3_the_annealing() -> None:
    """Ten samples in batches of four: progress 0, 0.4, 0.8, so that s stays below s_max."""
    scales = [schedule.linear(400.0)(i / 10) for i in range(0, 10, 4)]
    assert scales == pytest.approx([0.0025, 160.0015, 320.0005], abs=1e-12)
    assert schedule.linear(400.0)(1.0) == 400.0  # equation 3 as printed, at its last batch


def raw_gradients(state: HATState, task: int, scale: float, weight: float = 0.0) -> Paper:
    """By autograd, of the network whose activations are gated."""
    net = copied(state)
    leaves = [leaf.requires_grad_() for leaf in net.leaves(task)]
    logits, gates = net.forward(BATCH[0], task, scale)
    penalty = torch.cat(gates).mean()
    loss = nn.functional.cross_entropy(logits, BATCH[1]) + weight * penalty
    for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = slope
    return net


def test_gradients_are_those_of_gated_activations() -> None:
    """Of weights, biases, head and embeddings: a step of sgd with lr 1 is the gradient."""
    hat, state = small([FIRST, SECOND], s_max=8.0, sparsity=0.6, compensation=None, max_norm=None)
    state = hat.begin(state, 1)
    new, info = hat.update(state, BATCH, 1, scale=3.0)
    theirs = raw_gradients(state, 1, 3.0, weight=0.6)
    for old, leaf, want in zip(
        copied(state).leaves(1), copied(new).leaves(1), theirs.leaves(1), strict=True
    ):
        torch.testing.assert_close(old - leaf, want.grad, rtol=1e-10, atol=1e-14)
        assert want.grad.any()
    norm = torch.cat([leaf.grad.flatten() for leaf in theirs.leaves(1)]).norm()
    torch.testing.assert_close(info.grad_norm, norm)


@pytest.mark.parametrize(("s_max", "factor"), [(400.0, "s_max"), (400.0, 100.0), (100.0, 100.0)])
def test_section_2_5_the_compensation(s_max: float, factor: float | str) -> None:
    """q' = q c / s (cosh(s e) + 1) / (cosh(e) + 1), with c = s_max, or HAT-CL's own factor."""
    c = s_max if factor == "s_max" else factor
    hat, state = small(
        [FIRST, SECOND], s_max=s_max, sparsity=0.0, compensation=factor, max_norm=None, clamp=1e9
    )
    state = hat.begin(state, 2)
    new, _ = hat.update(state, BATCH, 2, scale=10.0)
    theirs = raw_gradients(state, 2, 10.0)
    for layer, q in zip(LAYERS, theirs.embeddings[2], strict=True):
        moved = (state.embeddings[layer] - new.embeddings[layer])[2]
        for got, slope, e in zip(moved.tolist(), q.grad.tolist(), q.tolist(), strict=True):
            steeper = slope * c / 10.0 * (math.cosh(10.0 * e) + 1) / (math.cosh(e) + 1)
            assert got == pytest.approx(steeper, rel=1e-10)
    one = hatfn.compensate({"a": real([0.5])}, {"a": real([0.1])}, 10.0, 400.0)
    assert float(one["a"]) == pytest.approx(0.5 * 40 * 2.5430806348 / 2.0050041681, rel=1e-9)
    far = hatfn.compensate({"a": real([1.0])}, {"a": real([2.0])}, 400.0, 400.0)  # clip(s e, -50, 50)
    assert float(far["a"]) == pytest.approx((math.cosh(50) + 1) / (math.cosh(2) + 1), rel=1e-12)


def test_the_clip_comes_after_the_compensation_and_the_clamp_after_the_step() -> None:
    hat, state = small([FIRST, SECOND], s_max=400.0, sparsity=0.0, max_norm=0.01, clamp=1e9)
    state = hat.begin(state, 2)
    clipped, info = hat.update(state, BATCH, 2, scale=10.0)
    whole, same = replace(hat, max_norm=None).update(state, BATCH, 2, scale=10.0)
    torch.testing.assert_close(info.grad_norm, same.grad_norm)
    factor = 0.01 / (float(info.grad_norm) + 1e-6)
    assert factor < 0.1
    for old, short, long in zip(
        copied(state).leaves(2), copied(clipped).leaves(2), copied(whole).leaves(2), strict=True
    ):
        torch.testing.assert_close(old - short, (old - long) * factor)
    limit = 0.25
    bounded, _ = replace(hat, max_norm=None, clamp=limit).update(state, BATCH, 2, scale=10.0)
    for layer in LAYERS:
        torch.testing.assert_close(
            bounded.embeddings[layer][2], whole.embeddings[layer][2].clamp(-limit, limit)
        )
    assert whole.embeddings["2"][2].abs().max() > limit


def test_equations_4_and_5_the_loss_and_the_penalty() -> None:
    """Gates at the step's scale over cumulative masks at s_max; both layers in one sum."""
    halved = [[[v / 2 for v in row] for row in layer] for layer in (FIRST, SECOND)]
    hat, state = small(halved, s_max=2.0, sparsity=0.75, compensation=None, max_norm=None)
    state = hat.begin(hat.consolidate(state, 0), 1)
    _, info = hat.update(state, BATCH, 1, scale=2.0)
    used = [0.75, 0.25, 0.25, 0.5, 0.75]
    gates = [0.5, 0.25, 0.75, 0.25, 0.25]
    paid = 0.5 * 0.25 + 0.25 * 0.75 + 0.75 * 0.75 + 0.25 * 0.5 + 0.25 * 0.25
    assert float(info.penalty) == pytest.approx(paid / sum(1 - u for u in used))
    assert float(info.penalty) == pytest.approx(
        sum(a * (1 - u) for a, u in zip(gates, used, strict=True)) / 2.5
    )
    logits, _ = copied(state).forward(BATCH[0], 1, 2.0)
    assert float(info.loss) == pytest.approx(float(nn.functional.cross_entropy(logits, BATCH[1])))
    alone = hat.begin(state, 1, locked=[])
    _, info = hat.update(alone, BATCH, 1, scale=2.0)
    assert float(info.penalty) == pytest.approx(sum(gates) / 5)
    steps = {}
    for weight in (0.0, 0.75):
        own = state._replace(hyper=state.hyper | {"sparsity": torch.full((3,), weight).double()})
        new, _ = hat.update(own, BATCH, 1, scale=2.0)
        steps[weight] = new.embeddings["0"][1]
    for unit, (a, u) in enumerate([(0.5, 0.75), (0.25, 0.25)]):
        slope = 0.75 * (1 - u) / 2.5 * 2.0 * a * (1 - a)  # of 0.75 R through the sigmoid
        assert float((steps[0.0] - steps[0.75])[unit]) == pytest.approx(slope)


def test_equation_6_the_forgetting_ratio() -> None:
    learned, chance, joint = np.array([[0.9, 0.6, 0.1], [0.5, 0.2, 0.1], [0.9, 1.0, 0.9]])
    assert metrics.forgetting_ratio(learned, chance, joint) == pytest.approx((0.0 - 0.5 - 1.0) / 3)


def test_hat_cl_pays_by_group_and_beyond_a_quota() -> None:
    """Binary cumulative masks; each layer's share of its free units, minus 1/T of the layer."""
    scaled = [[[v / 2 for v in row] for row in layer] for layer in (FIRST, SECOND)]
    hat, state = small(
        scaled,
        protection="exact",
        s_max=2.0,
        quota=1 / 3,
        regularizer=partial(hatfn.sparsity, over="groups"),
    )
    state = hat.begin(hat.consolidate(state, 0), 1)  # on: unit 0 of layer 0, unit 2 of layer 2
    _, info = hat.update(state, BATCH, 1, scale=2.0)
    first = max(0.0, 0.25 - 2 / 3) / 1  # gates 1/2 and 1/4; free: unit 1
    second = max(0.0, 0.75 + 0.25 - 3 / 3) / 2  # gates 3/4, 1/4, 1/4; free: units 0 and 1
    assert (first, second) == (0.0, 0.0)
    assert float(info.penalty) == pytest.approx(0.0, abs=1e-12)
    greedy = state._replace(embeddings=state.embeddings | {"2": torch.full((3, 3), HIGH / 2).double()})
    _, info = hat.update(greedy, BATCH, 1, scale=2.0)
    assert float(info.penalty) == pytest.approx((0.0 + (0.75 + 0.75 - 1) / 2) / 2)
    unforgiven = greedy._replace(hyper=state.hyper | {"quota": torch.zeros(3).double()})
    _, info = hat.update(unforgiven, BATCH, 1, scale=2.0)
    assert float(info.penalty) == pytest.approx((0.25 / 1 + 1.5 / 2) / 2)


def test_hat_cl_schedules() -> None:
    """s_max 100 at quarters of an epoch; exponential is 1 where a fifth of it is over."""
    at = [0.0, 0.25, 0.5, 0.75, 1.0]
    linear, cosine = schedule.linear(100.0), schedule.cosine(100.0)
    assert [linear(p) for p in at] == pytest.approx([0.01, 25.0075, 50.005, 75.0025, 100.0])
    assert [cosine(p) for p in at] == pytest.approx([100.0, 50.0, 0.01, 50.0, 100.0])
    exponential = schedule.exponential(100.0)
    assert [exponential(p) for p in (0.0, 0.2, 0.6, 1.0)] == pytest.approx(
        [100**-0.25, 1.0, 10.0, 100.0]
    )


def test_hat_cl_initialisations() -> None:
    """Shares of units that start on: half, all, and one in T, at unit spread but for dense."""
    for init, share, mean, spread in (
        ("normal", 0.5, 0.0, 1.0),
        ("dense", 1.0, 1.0, 0.0),
        ("sparse", 1 / 3, -0.4307, 1.0),
    ):
        hat = learner(network((2, 9000, 2)), init=init)
        e = torch.cat([rows.flatten() for rows in hat.init(0).embeddings.values()])
        assert float((e > 0).double().mean()) == pytest.approx(share, abs=0.01)
        assert float(e.mean()) == pytest.approx(mean, abs=0.02)
        assert float(e.std()) == pytest.approx(spread, abs=0.02)
