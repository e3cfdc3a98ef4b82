"""Warm starts: a task begins from the learned task whose subnetwork serves its data best."""

from __future__ import annotations

import math

import pytest
import torch
import torchopt
from nets import ConvNet, equal, learn, learner
from torch import Tensor, nn

import hatfn
from hatfn.models import MLP
from hatfn.replicas import replica

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def parity(x: Tensor, first: int) -> Tensor:
    """Classes that no linear classifier of x tells: whether two of its numbers have the same sign."""
    return (x[:, first] * x[:, first + 1] > 0).long()


@pytest.fixture(scope="module")
def experts() -> tuple[hatfn.HAT, hatfn.HATState]:
    """Task 0 has learned about numbers 0 and 1, task 1 about numbers 2 and 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hat = learner(
            MLP(4, 2, width=64), torch.zeros(1, 4), optimizer=torchopt.adam(1e-2),
            classes=[2] * 4, s_max=50.0,
        )  # fmt: skip
        state = hat.init(0)
        for task in (0, 1):
            state = hat.begin(state, task)
            for step in range(150):
                x = torch.randn(64, 4)
                scale = hatfn.schedule.linear(50.0)(step % 25 / 25)
                state, _ = hat.update(state, (x, parity(x, 2 * task)), task, scale)
            state = hat.consolidate(state, task)
            x = torch.randn(500, 4)
            right = hat.forward(state, x, task).argmax(-1) == parity(x, 2 * task)
            assert right.double().mean() > 0.8, "an expert that knows nothing proves nothing"
    return hat, state


@pytest.mark.parametrize("kin", [0, 1])
def test_the_task_whose_features_help_is_found(experts, kin: int) -> None:
    """From 32 samples, though the classes have other numbers than they had."""
    hat, state = experts
    for _ in range(5):
        x = torch.randn(32, 4)
        errors = hatfn.similarity(hat, state, (x, 1 - parity(x, 2 * kin)))
        assert errors.argmin() == kin
    assert torch.equal(
        hatfn.similarity(hat, state, (x, parity(x, 0)), [1, 0]),
        hatfn.similarity(hat, state, (x, parity(x, 0))).flip(0),
    )


def test_similar_starts_from_it(experts) -> None:
    hat, state = experts
    x = torch.randn(32, 4)
    warm = hat.begin(state, 3, init_from="similar", batch=(x, parity(x, 2)))
    assert equal(warm, hat.begin(state, 3, init_from=1))
    cold = hat.begin(state, 3)
    for group, e in warm.embeddings.items():
        expected = (state.embeddings[group][1].clamp(-1, 1) + state.embeddings[group][3]) / math.sqrt(2)
        torch.testing.assert_close(e[3], expected)
        assert torch.equal(e[:3], cold.embeddings[group][:3])
    assert equal(warm.protection, cold.protection)
    assert equal(warm.task_params, cold.task_params), "an MLP has nothing but heads of its own"


def test_leave_one_out_errors_are_those_of_refitting(experts) -> None:
    hat, state = experts
    x = torch.randn(6, 4)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    masks = {group: mask[0].float() for group, mask in state.masks.items()}
    f = x
    for i in (0, 1):
        w, b = state.params[f"hidden.{i}.weight"], state.params[f"hidden.{i}.bias"]
        f = torch.relu(f @ w.T + b) * masks[f"hidden.{i}"]
    f = f.double() - f.double().mean(0)
    f = torch.cat([f / f.square().sum(1).mean().sqrt(), torch.ones(6, 1).double()], 1)
    errors = []
    for i in range(6):
        rest = [j for j in range(6) if j != i]
        a = f[rest].T @ f[rest] + 0.1 * torch.eye(65).double()
        fit = torch.linalg.solve(a, f[rest].T @ nn.functional.one_hot(y[rest], 2).double())
        errors.append((nn.functional.one_hot(y[i], 2) - f[i] @ fit).square().sum())
    torch.testing.assert_close(hatfn.similarity(hat, state, (x, y))[0], torch.stack(errors).mean())


def test_norms_and_statistics_come_along_and_the_head_does_not() -> None:
    x = torch.randn(12, 1, 6, 6)
    hat = learner(ConvNet(), x)
    state = learn(hat, hat.init(0), x, 0)
    before = hat.forward(state, x, 0)
    warm = hat.begin(state, 2, init_from=0)
    for name, leaf in warm.task_params.items():
        source = state if name in hat.network.heads else warm
        row = 2 if name in hat.network.heads else 0
        assert torch.equal(leaf[2], source.task_params[name][row]), name
    assert all(torch.equal(leaf[2], leaf[0]) for leaf in warm.task_buffers.values())
    assert torch.equal(hat.forward(learn(hat, warm, x, 2), x, 0), before)


def test_the_first_task_has_nothing_to_start_from() -> None:
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    hat = learner(MLP(5, 3, width=16), x)
    state = hat.init(0)
    assert equal(hat.begin(state, 0, init_from="similar", batch=(x, y)), hat.begin(state, 0))


def test_without_classes_the_loss_decides() -> None:
    x = torch.randn(16, 5)
    module = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
    hat = hatfn.build(
        module, hatfn.trace(module, x), None, torchopt.sgd(0.1), num_tasks=3,
        loss=nn.functional.mse_loss,
    )  # fmt: skip
    state = hat.consolidate(hat.consolidate(hat.init(0), 0), 2)
    for task, row in ((0, 0), (2, 1)):
        errors = hatfn.similarity(hat, state, (x, hat.forward(state, x, task)))
        assert errors.argmin() == row
        assert errors[row] == 0


def test_replicas_choose_for_themselves() -> None:
    hat = learner(MLP(4, 2, width=16), torch.zeros(1, 4), classes=[2] * 3)
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, range(3))
    for task in (0, 1):
        states = many.consolidate(many.begin(states, task), task)
    x, y = torch.randn(3, 12, 4), torch.randint(2, (3, 12))
    warm = many.begin(states, 2, init_from="similar", batch=(x, y))
    for i in range(3):
        alone = hat.begin(replica(states, i), 2, init_from="similar", batch=(x[i], y[i]))
        assert equal(replica(warm, i), alone)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"init_from": "similar"}, r"batch=\(x, y\)"),
        ({"init_from": "nearest"}, 'Expected "similar"'),
        ({"init_from": 3}, "cannot start from itself"),
        ({"init_from": 2}, "never learned"),
        ({"init_from": 9}, "out of range"),
        ({"init_from": "similar", "batch": (torch.zeros(4, 4), torch.zeros(4))}, "classes"),
        ({"init_from": "similar", "batch": (torch.zeros(1, 4), torch.zeros(1).long())}, "two samples"),
        ({"init_from": "similar", "batch": (torch.zeros(4, 9), torch.zeros(4).long())}, r"\(B, 4\)"),
        ({"init_from": "similar", "batch": torch.zeros(4, 4)}, "pair"),
    ],
)
def test_wrong_arguments(experts, wrong: dict, match: str) -> None:
    hat, state = experts
    with pytest.raises((TypeError, ValueError), match=match):
        hat.begin(state, 3, **wrong)
    with pytest.raises(ValueError, match="single task"):
        hat.begin(state, [2, 3], init_from=0)
