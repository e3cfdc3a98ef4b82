"""A loss, a metric and a width for each task; tasks of several kinds in one stream."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics.classification as tmc
import torchmetrics.regression as tmr
import torchopt
from nets import equal
from torch import Tensor, nn

import hatfn
from hatfn.checks.capacity import HATWarning
from hatfn.method.loss import cross_entropy

F = nn.functional
X = torch.randn(24, 5)
CLASSES = [3, 4, 1, 2]
TARGETS = [
    torch.randint(3, (24,)),
    torch.randint(2, (24, 4)).float(),
    torch.randn(24, 1),
    torch.randint(2, (24,)),
]
LOSSES = [
    partial(cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0])),
    F.binary_cross_entropy_with_logits,
    F.mse_loss,
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0])),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3))


def built(loss, classes: list[int] = CLASSES, **settings) -> hatfn.HAT:
    module = net()
    wiring = hatfn.trace(module, X[:1])
    return hatfn.build(module, wiring, classes, torchopt.adam(1e-2), loss=loss, **settings)


def taught(hat: hatfn.HAT, state: hatfn.HATState, task: int) -> hatfn.HATState:
    state = hat.begin(state, task)
    for _ in range(3):
        state, info = hat.update(state, (X, TARGETS[task]), task, 20.0)
        assert info.ok
    return hat.consolidate(state, task)


def test_tasks_of_several_kinds_in_one_stream() -> None:
    hat = built(LOSSES)
    state, served = hat.init(0), {}
    for task in range(4):
        state = hat.begin(state, task)
        before = state
        state, info = hat.update(state, (X, TARGETS[task]), task, 20.0)
        assert info.logits.shape == (24, CLASSES[task])
        torch.testing.assert_close(info.loss, LOSSES[task](info.logits, TARGETS[task]))
        state = hat.consolidate(state, task)
        assert not equal(before.params, state.params)
        for old, output in served.items():
            assert torch.equal(hat.forward(state, X, old), output)
        served[task] = hat.forward(state, X, task)


def test_a_loss_that_is_told_the_task() -> None:
    def loss(output: Tensor, y: Tensor, task: int) -> Tensor:
        return LOSSES[task](output, y)

    listed, told = built(LOSSES), built(loss)
    for task in range(4):
        a, b = (taught(hat, hat.init(0), task) for hat in (listed, told))
        assert equal(a.params, b.params)
    bound = built(partial(loss, task=2), classes=[1, 1])
    state = bound.begin(bound.init(0), 0)
    _, info = bound.update(state, (X, TARGETS[2]), 0, 20.0)
    torch.testing.assert_close(info.loss, F.mse_loss(info.logits, TARGETS[2]))


def test_replicas_and_compiled_steps_take_the_loss_of_the_task() -> None:
    hat = built(LOSSES)
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, [0, 1])
    for task in range(4):
        _, info = many.update(many.begin(states, task), (X, TARGETS[task]), task, 20.0)
        for i in range(2):
            torch.testing.assert_close(info.loss[i], LOSSES[task](info.logits[i], TARGETS[task]))


def test_new_tasks_bring_their_losses() -> None:
    hat = built(LOSSES[:1], classes=[3])
    hat, state = hatfn.grow(hat, hat.init(0), [4, 1], loss=LOSSES[1:3])
    for task in (1, 2):
        state = hat.begin(state, task)
        state, info = hat.update(state, (X, TARGETS[task]), task, 20.0)
        torch.testing.assert_close(info.loss, LOSSES[task](info.logits, TARGETS[task]))
        state = hat.consolidate(state, task)
    more, _ = hatfn.grow(hat, state, [1])
    assert more.loss_of(3) is F.mse_loss
    one, _ = hatfn.grow(built(F.mse_loss, classes=[1]), built(F.mse_loss, classes=[1]).init(0), [2])
    assert one.loss_of(1) is F.mse_loss
    with pytest.raises(ValueError, match="grow: loss has 1 functions for 2 tasks"):
        hatfn.grow(hat, state, [2, 2], loss=[F.mse_loss])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LOSSES[:2], "build: loss has 2 functions for 4 tasks"),
        ([*LOSSES[:3], "mse"], "build: loss='mse'"),
        ([], "build: loss has 0 functions"),
    ],
)
def test_lists_of_losses_that_do_not_fit(loss, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        built(loss)


def test_a_loss_that_fails_is_told_with_its_task() -> None:
    hat = built(LOSSES)
    state = hat.begin(hat.init(0), 1)
    wrong = TARGETS[1].long()
    with pytest.raises(
        RuntimeError, match=r"the loss of task 1 failed .*\(24, 4\).*int64.*y\.float\(\)"
    ):
        hat.update(state, (X, wrong), 1, 20.0)
    with pytest.raises(ValueError, match="labels from 0 to 3, but the task has 3 classes"):
        hat.update(hat.begin(hat.init(0), 0), (X, torch.arange(24) % 4), 0, 20.0)


def test_one_class_with_the_default_loss_is_warned_of() -> None:
    with pytest.warns(HATWarning, match="build: task 1 has one class, and the cross entropy"):
        hat = built(cross_entropy, classes=[2, 1])
    with pytest.warns(HATWarning, match="grow: task 2 has one class"):
        hatfn.grow(hat, hat.init(0), [1])


def test_positions_of_a_map_that_count_for_nothing() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    module, x, y = Maps(), torch.randn(4, 1, 6, 6), torch.randint(3, (4, 6, 6))
    hat = hatfn.build(module, hatfn.trace(module, x), [3, 2], torchopt.adam(1e-2))
    assert hat.wiring.heads[0].weight == "head.weight"
    y[:, :3] = -100
    state = hat.begin(hat.init(0), 0)
    _, info = hat.update(state, (x, y), 0, 20.0)
    torch.testing.assert_close(info.loss, F.cross_entropy(info.logits, y))
    with pytest.raises(ValueError, match="labels from 0 to 2, but the task has 2 classes"):
        hat.update(hat.begin(hat.init(0), 1), (x, y), 1, 20.0)
    with pytest.raises(ValueError, match="labels from -1 to 2"):
        hat.update(state, (x, y.clamp(min=-1)), 0, 20.0)


METRICS = [
    {"f1": tmc.MulticlassF1Score(3)},
    {"f1": tmc.MultilabelF1Score(4)},
    {"mse": tmr.MeanSquaredError()},
    None,
]


def test_metrics_of_every_task() -> None:
    hat = built(LOSSES)
    state = hat.init(0)
    for task in (0, 1, 2):
        state = taught(hat, state, task)
    loaders = [list(zip(X.split(10), y.split(10), strict=True)) for y in TARGETS]
    found = hatfn.evaluate(hat, state, loaders, metrics=METRICS)
    logits = [hat.forward(state, X, task) for task in (0, 1, 2)]
    f1 = [METRICS[task]["f1"].clone()(logits[task], TARGETS[task].long()).item() for task in (0, 1)]
    np.testing.assert_allclose(found.metrics["f1"], [*f1, np.nan, np.nan], rtol=1e-5)
    mse = F.mse_loss(logits[2], TARGETS[2]).item()
    np.testing.assert_allclose(found.metrics["mse"], [np.nan, np.nan, mse, np.nan], rtol=1e-5)
    right = (logits[0].argmax(1) == TARGETS[0]).double().mean().item()
    np.testing.assert_allclose(found.task_incremental, [right, np.nan, np.nan, np.nan])
    assert METRICS[2]["mse"].total == 0, "the caller's metric knows no batch"
    stacked = hatfn.evaluate(hat, hatfn.stack([state, state]), loaders, metrics=METRICS)
    np.testing.assert_allclose(stacked.metrics["f1"], [found.metrics["f1"]] * 2)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (METRICS[:2], "evaluate: 2 metrics for 4 tasks"),
        ({"f1": tmc.MulticlassF1Score}, "the metric 'f1' of task 0 is <class"),
        ({"f1": tmc.MulticlassF1Score(3, average=None)}, r"'f1' gives a tensor of shape \(3,\)"),
        ({}, None),
    ],
)
def test_metrics_that_do_not_fit(metrics, message: str | None) -> None:
    hat = built(LOSSES)
    state = taught(hat, hat.init(0), 0)
    loaders = [[(X, TARGETS[0])], [], [], []]
    if message is None:
        assert not hatfn.evaluate(hat, state, loaders, metrics=metrics).metrics
        state = taught(hat, state, 1)
        message, loaders = r"give the task a metric: evaluate\(", [[(X, y)] for y in TARGETS]
    with pytest.raises((TypeError, ValueError), match=message):
        hatfn.evaluate(hat, state, loaders, metrics=metrics)


def test_similar_tasks_of_real_targets() -> None:
    hat = built(LOSSES)
    state = taught(hat, hat.init(0), 0)
    errors = hatfn.similarity(hat, state, (X, TARGETS[1]))
    assert errors.shape == (1,)
    assert errors.isfinite().all()
