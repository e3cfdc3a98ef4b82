"""A row of the accuracy matrix, with and without the task: against a double loop by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchopt
from nets import ConvNet, learn, learner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hatfn
from hatfn.evaluation.task_inference import SCORES

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

SIZES = (13, 7, 9)


@pytest.fixture(scope="module")
def learned() -> tuple[hatfn.HAT, hatfn.HATState, list[tuple[Tensor, Tensor]]]:
    """Tasks 0 and 2 learned of three with 3, 2 and 3 classes, and samples of each."""
    torch.manual_seed(5)
    data = [
        (torch.randn(size, 1, 6, 6) + task, torch.randint(classes, (size,)))
        for task, (size, classes) in enumerate(zip(SIZES, [3, 2, 3], strict=True))
    ]
    hat = learner(ConvNet(), data[0][0], optimizer=torchopt.adam(1e-2))
    state = learn(hat, hat.init(0), data[0][0], 0, steps=20)
    return hat, learn(hat, state, data[2][0], 2, steps=20), data


def batches(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(size) for part in data), strict=True))


def by_hand(hat, state, data, tasks: list[int], method: str) -> np.ndarray:
    """Sample by sample and task by task, with nothing but ``forward``."""
    rows = np.full((3, hat.tasks), math.nan)
    for own in tasks:
        right = []
        for x, y in zip(*data[own], strict=True):
            logits = [hat.forward(state, x[None], task)[0] for task in tasks]
            scores = [
                {
                    "max": z.max(),
                    "softmax": z.softmax(0).max(),
                    "entropy": (z.softmax(0) * z.log_softmax(0)).sum(),
                    "energy": z.exp().sum().log(),
                }[method].item()
                for z in logits
            ]
            found = tasks[scores.index(max(scores))] == own
            good = logits[tasks.index(own)].argmax().item() == y.item()
            right.append((good, good and found, found))
        rows[:, own] = np.mean(right, axis=0)
    return rows


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("method", SCORES)
def test_one_pass_is_the_double_loop(learned, method: str, size: int) -> None:
    hat, state, data = learned
    found = hatfn.evaluate(hat, state, [batches(part, size) for part in data], method)
    expected = by_hand(hat, state, data, [0, 2], method)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.isnan(found.task_incremental).tolist() == [False, True, False]
    assert all(row.dtype == np.float64 for row in found)
    assert (expected[1] != expected[2])[[0, 2]].any()
    assert (expected[1] != expected[0])[[0, 2]].any()


def test_data_loaders_are_read_once_and_only_those_of_learned_tasks(learned) -> None:
    hat, state, data = learned
    read = []

    class Counted(DataLoader):
        def __iter__(self):
            read.append(self)
            return super().__iter__()

    loaders = [Counted(TensorDataset(*part), batch_size=4) for part in data]
    found = hatfn.evaluate(hat, state, loaders, chunk_size=1)
    assert read == [loaders[0], loaders[2]]
    expected = by_hand(hat, state, data, [0, 2], "max")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_nothing_learned_is_nothing_known(learned) -> None:
    hat, _, data = learned
    found = hatfn.evaluate(hat, hat.init(0), [[part] for part in data])
    assert np.isnan(found).all()


def test_the_only_task_is_always_found(learned) -> None:
    hat, _, data = learned
    state = learn(hat, hat.init(0), data[1][0], 1)
    found = hatfn.evaluate(hat, state, [[part] for part in data])
    assert found.task_inference[1] == 1.0
    assert found.class_incremental[1] == found.task_incremental[1]


def test_a_module_without_heads_is_evaluated_by_its_own_classes() -> None:
    module, x = nn.Linear(3, 4), torch.randn(6, 3)
    hat = hatfn.build(module, hatfn.trace(module, x), None, torchopt.sgd(0.1), num_tasks=1)
    state = hat.consolidate(hat.init(0), 0)
    y = module(x).argmax(1)
    y = torch.where(torch.arange(6) < 2, (y + 1) % 4, y)
    assert hatfn.evaluate(hat, state, [[(x, y)]]).task_incremental == [pytest.approx(4 / 6)]
