"""Errors that a newcomer meets name the line that mends them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchopt
from nets import learner

import hatfn
from hatfn.models import MLP

X, Y = torch.randn(8, 5), torch.arange(8) % 2
MODULE = MLP(5, 3, width=16)
WIRING = hatfn.trace(MODULE, X[:1])
HAT = learner(MODULE, X)
OPEN = HAT.begin(HAT.init(0), 0)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.Adam([torch.zeros(1)])], ids=["class", "object"]
)
def test_an_optimiser_of_torch_names_from_torch(optimizer: object) -> None:
    with pytest.raises(TypeError, match=r"hatfn\.from_torch\(torch\.optim\.Adam, lr=1e-3\)"):
        hatfn.build(MODULE, WIRING, [2], optimizer)


def test_double_precision_names_the_cast() -> None:
    wide = np.zeros((1, 5))
    with pytest.raises(
        hatfn.TraceError,
        match=r"x is torch\.float64, and the weights of MLP are torch\.float32\. Write x\.float\(\)",
    ):
        hatfn.trace(MODULE, torch.from_numpy(wide))
    with pytest.raises(ValueError, match=r"Write x\.float\(\)"):
        HAT.update(OPEN, (X.double(), Y), 0, 5.0)


def test_numpy_names_the_conversion() -> None:
    with pytest.raises(TypeError, match=r"torch\.as_tensor\(x\)\.float\(\)"):
        HAT.update(OPEN, (X.numpy(), Y.numpy()), 0, 5.0)
    with pytest.raises(TypeError, match=r"torch\.as_tensor\(x\)\.float\(\)"):
        HAT.forward(OPEN, X.numpy(), 0, scale=5.0)


def test_a_task_too_many_names_grow() -> None:
    with pytest.raises(ValueError, match=r"hatfn\.grow\(hat, state, classes=\[2\]\)"):
        HAT.begin(OPEN, 3)


def test_one_meaning_of_batches() -> None:
    """Pairs where labels play a part, and wherever they do not, pairs or inputs alone."""
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4)
    norm = learner(
        torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)),
        X,
        "2",
    )
    state = norm.begin(norm.init(0), 0)
    one, other = norm.recalibrate(state, pairs, 0), norm.recalibrate(state, [X[:4], X[4:]], 0)
    assert all(
        torch.equal(one.task_buffers[name], other.task_buffers[name]) for name in one.task_buffers
    )
    hatfn.readiness(norm, state, pairs, 0)
    closed = norm.consolidate(state, 0, pairs)
    assert hatfn.evaluate(norm, closed, [pairs, [], []]).task_incremental[0] >= 0


def test_an_optimiser_that_is_neither_names_torchopt() -> None:
    with pytest.raises(TypeError, match=r"torchopt\.adam\(1e-3\)"):
        hatfn.build(MODULE, WIRING, [2], torchopt.Adam([torch.zeros(1, requires_grad=True)], 0.1))
