"""Closing a task: with batches it is served as it was trained, and without them it says so."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchopt
from nets import ConvNet, learn, learner
from torch import Tensor, nn

import hatfn
from hatfn.checks.batches import check_batch
from hatfn.lifecycle.consolidate import settle
from hatfn.models import MLP

IMAGES, LABELS = torch.randn(24, 1, 8, 8), torch.arange(24) % 2
HAT = learner(ConvNet(), IMAGES, init="dense", sparsity=0.0)

pytestmark = pytest.mark.filterwarnings("ignore:consolidate. task . leaves")


@pytest.fixture(scope="module")
def trained() -> hatfn.HATState:
    """A task in the middle of its training, at a small scale last."""
    state = HAT.begin(HAT.init(0), 0)
    for scale in (400.0, 100.0, 5.0, 0.5, 0.1):
        state, _ = HAT.update(state, (IMAGES, LABELS), 0, scale)
    return state


def loss(state: hatfn.HATState) -> Tensor:
    return nn.functional.cross_entropy(HAT.forward(state, IMAGES, 0), LABELS)


def test_statistics_are_reestimated_where_that_helps(trained: hatfn.HATState) -> None:
    batches = [(IMAGES[:12], LABELS[:12]), (IMAGES[12:], LABELS[12:])]
    by_hand = HAT.consolidate(HAT.recalibrate(trained, batches, 0), 0)
    as_trained = HAT.consolidate(trained, 0, [])
    closed = HAT.consolidate(trained, 0, batches)
    best = by_hand if loss(by_hand) < loss(as_trained) else as_trained
    assert loss(by_hand) != loss(as_trained)
    assert all(
        torch.equal(closed.task_buffers[n], b) for n, b in best.task_buffers.items() if "num" not in n
    )
    assert loss(closed) == min(loss(by_hand), loss(as_trained))


def test_a_generator_and_a_loader_are_batches(trained: hatfn.HATState) -> None:
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    wanted = loss(HAT.consolidate(trained, 0, [(IMAGES, LABELS)]))
    for batches in (((IMAGES, LABELS) for _ in range(1)), torch.utils.data.DataLoader(data, 24)):
        assert loss(HAT.consolidate(trained, 0, batches)) == wanted


def test_worse_statistics_are_not_taken(
    trained: hatfn.HATState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(spec: hatfn.HAT, state: hatfn.HATState, *_: object) -> hatfn.HATState:
        return state._replace(task_buffers={n: b * 0 + 7 for n, b in state.task_buffers.items()})

    monkeypatch.setattr("hatfn.lifecycle.consolidate.recalibrate", worse)
    kept, _, taken = settle(HAT, trained, [check_batch("", (IMAGES, LABELS), HAT.wiring)], 0)
    assert not taken
    assert kept is trained


def test_nothing_is_said_of_statistics_that_are_as_they_should_be(trained: hatfn.HATState) -> None:
    with pytest.warns(
        hatfn.HATWarning, match=r"running statistics of task 0.*hat.consolidate\(state, 0, batches"
    ):
        HAT.consolidate(trained, 0)
    plain = learner(MLP(5, 3, width=16), torch.randn(8, 5))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*running statistics")
        HAT.consolidate(trained, 0, [])
        HAT.consolidate(HAT.recalibrate(trained, [IMAGES], 0), 0)
        HAT.consolidate(HAT.begin(HAT.init(0), 1), 1)  # not trained at all
        state = plain.begin(plain.init(0), 0)
        plain.consolidate(plain.update(state, (torch.randn(8, 5), torch.zeros(8).long()), 0, 5.0)[0], 0)


def test_replicas_are_closed_like_the_learner(trained: hatfn.HATState) -> None:
    other = HAT.update(trained, (IMAGES + 1, LABELS), 0, 3.0)[0]
    many, states = hatfn.Replicas(HAT), hatfn.stack([trained, other])
    both = (torch.stack([IMAGES, IMAGES + 1]), torch.stack([LABELS, LABELS]))
    closed = many.consolidate(states, 0, [both])
    for i, (one, x) in enumerate(((trained, IMAGES), (other, IMAGES + 1))):
        own = HAT.consolidate(one, 0, [(x, LABELS)])
        for name, buffer in own.task_buffers.items():
            assert torch.equal(closed.task_buffers[name][i], buffer)


def test_a_task_that_was_opened_again_is_said_to_be_open() -> None:
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=64), x)
    state = hat.begin(learn(hat, hat.init(0), x, 0), 0)
    with pytest.raises(ValueError, match="task 0 has no binary gates: it is open for training"):
        hat.forward(state, x, 0)
    with pytest.raises(ValueError, match="task 1 has no binary gates: it was never learned"):
        hat.forward(state, x, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "mobilenet_v3_small"])
@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_the_loop_of_the_readme_serves_what_was_trained(name: str) -> None:
    """Within two points of statistics that are re-estimated by hand, on two digits in three epochs."""
    served = readme_loop(name)
    assert served["by hand"] > 0.9
    assert served["readme"] > served["by hand"] - 0.02


def readme_loop(name: str) -> dict[str, float]:
    import timm  # noqa: PLC0415
    import torchvision  # noqa: PLC0415

    from hatfn.experiments.streams import make_stream  # noqa: PLC0415

    torch.manual_seed(0)
    task = make_stream("split-digits", tasks=5, seed=0)[0]
    head, make = (
        ("fc", timm.create_model)
        if "resnet" in name
        else ("classifier.3", torchvision.models.get_model)
    )
    module = make(name, num_classes=2)

    def images(x: Tensor) -> Tensor:
        return nn.functional.interpolate(x.reshape(-1, 1, 8, 8), 32).expand(-1, 3, -1, -1)

    x, y = images(task.train.x), task.train.y
    hat = hatfn.build(
        module, hatfn.trace(module, x[:1], head=head), [2], torchopt.adam(3e-3), s_max=100.0
    )
    state, scale = hat.begin(hat.init(0), 0), hatfn.schedule.linear(100.0)
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, len(y) - 16, 32)]
    for _ in range(3):
        for step, batch in enumerate(batches):
            state, _ = hat.update(state, batch, 0, scale(step / len(batches)))
    ways = {
        "readme": hat.consolidate(state, 0, batches),
        "by hand": hat.consolidate(hat.recalibrate(state, batches, 0), 0),
        "before": hat.consolidate(state, 0, []),
    }
    test = images(task.test.x)
    return {
        way: (hat.forward(closed, test, 0).argmax(-1) == task.test.y).double().mean().item()
        for way, closed in ways.items()
    }
