"""Several tasks in one step: the sum of their gradients, each through its own gates."""

from __future__ import annotations

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, Transformer, equal, learn, learner, moved
from optimizers import OPTIMIZERS
from torch import nn

import hatfn
from hatfn.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

NETWORKS = {
    "mlp": (lambda: MLP(5, 3, width=16), (5,)),
    "conv net": (ConvNet, (1, 6, 6)),
    "transformer": (Transformer, (4, 5)),
}


def batches(shape: tuple[int, ...], tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tasks, 8, *shape).double(), torch.randint(2, (tasks, 8))


@pytest.mark.parametrize("network", NETWORKS)
def test_shared_weights_take_the_sum_of_the_steps(network: str) -> None:
    """With plain sgd a step of both is the sum of the steps of each."""
    make, shape = NETWORKS[network]
    x, y = batches(shape, 2)
    hat = learner(make().double(), x[0], optimizer=torchopt.sgd(0.1), max_norm=None)
    start = learn(hat, hat.init(0), x[0], 1)
    both, info = hat.update(hat.begin(start, [0, 2]), (x, y), [0, 2], 5.0)
    assert info.loss.shape == info.penalty.shape == (2,)
    assert [logits.shape for logits in info.logits] == [(8, 3), (8, 3)]
    parts = []
    for k, task in enumerate((0, 2)):
        alone, one = hat.update(hat.begin(start, task), (x[k], y[k]), task, 5.0)
        torch.testing.assert_close(info.loss[k], one.loss)
        torch.testing.assert_close(info.logits[k], one.logits)
        for tree in ("task_params", "task_buffers", "embeddings"):
            for name, leaf in getattr(both, tree).items():
                torch.testing.assert_close(leaf[task], getattr(alone, tree)[name][task])
        parts.append(alone)
    for name, value in start.params.items():
        steps = sum(part.params[name] - value for part in parts)
        assert name not in ("hidden.1.weight", "conv2.weight", "fc1.weight") or steps.abs().max() > 0
        torch.testing.assert_close(both.params[name] - value, steps)


@pytest.mark.parametrize("network", NETWORKS)
def test_locked_tasks_stay_and_the_others_are_not_touched(network: str) -> None:
    make, shape = NETWORKS[network]
    x, y = batches(shape, 2)
    hat = learner(make().double(), x[0], optimizer=torchopt.adamw(1e-2, weight_decay=0.1))
    state = learn(hat, hat.init(0), x[0], 1)
    before, own = hat.forward(state, x[0], 1), state
    state = hat.begin(state, [0, 2])
    assert state.active.tolist() == [True, False, True]
    assert state.locked.tolist() == [False, True, False]
    for _ in range(4):
        state, info = hat.update(state, (x, y), [0, 2], 5.0)
        assert info.ok
    for task in (0, 2):
        state = hat.consolidate(state, task)
    assert torch.equal(hat.forward(state, x[0], 1), before)
    assert not equal(state.params, own.params)
    for tree in ("task_params", "task_buffers", "embeddings"):
        for name, leaf in getattr(state, tree).items():
            assert torch.equal(leaf[1], getattr(own, tree)[name][1])
            assert not torch.equal(leaf[0], getattr(own, tree)[name][0])
    assert hat.predict(state, x[0]).shape[0] == 3


def test_a_list_of_one_is_that_task() -> None:
    x, y = batches((5,), 1)
    hat = learner(MLP(5, 3, width=16).double(), x[0], optimizer=torchopt.adam(1e-2))
    begun = hat.begin(hat.init(0), 1)
    one, _ = hat.update(begun, (x[0], y[0]), 1, 5.0)
    assert moved(begun, one)
    same, info = hat.update(hat.begin(hat.init(0), [1]), (x, y), [1], 5.0)
    assert equal(one, same)
    assert info.loss.shape == (1,)


def test_together_with_every_gate_open_is_plain_multitask_learning() -> None:
    """Against torch.optim on one network with a head for each task."""
    module, (x, y) = MLP(5, 2, width=16), batches((5,), 2)
    x = x.float()
    hat = hatfn.build(
        module, hatfn.trace(module, x[0, :1]), [2, 2], torchopt.sgd(0.1, momentum=0.9), init="dense",
        sparsity=0.0, compensation=None,
    )  # fmt: skip
    heads = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))
    for head in heads:
        head.load_state_dict(module.head.state_dict())
    trained = [*module.hidden.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9)
    state = hat.begin(hat.init(0), range(2))
    for _ in range(3):
        state, _ = hat.update(state, (x, y), range(2), 400.0)
        optimizer.zero_grad()
        for k, head in enumerate(heads):
            hidden = torch.relu(module.hidden[1](torch.relu(module.hidden[0](x[k]))))
            nn.functional.cross_entropy(head(hidden), y[k]).backward()
        optimizer.step()
    torch.testing.assert_close(state.params["hidden.1.weight"], module.hidden[1].weight.data)
    for k, head in enumerate(heads):
        torch.testing.assert_close(state.task_params["head.weight"][k], head.weight.data)


def test_a_bad_batch_of_one_task_refuses_the_step_of_all() -> None:
    x, y = batches((5,), 2)
    x[1, 0] = torch.inf
    hat = learner(MLP(5, 3, width=16).double(), x[0])
    state = hat.begin(hat.init(0), [0, 1])
    after, info = hat.update(state, (x, y), [0, 1], 5.0)
    assert not info.ok
    assert equal(after, state)
    x[1, 0] = 0.0
    assert moved(state, hat.update(state, (x, y), [0, 1], 5.0)[0])


X, Y = torch.randn(2, 8, 5), torch.randint(2, (2, 8))
HAT = learner(MLP(5, 3, width=16), X[0])
OPEN = HAT.begin(HAT.init(0), [0, 1])
WRONG = {
    "order": (lambda: HAT.begin(OPEN, [1, 0]), r"ascending order.*Write task=\[0, 1\]"),
    "twice": (lambda: HAT.begin(OPEN, [1, 1]), r"each once.*Write task=\[1\]"),
    "none": (lambda: HAT.begin(OPEN, []), "Write task=0"),
    "locked too": (lambda: HAT.begin(OPEN, [0, 1], locked=[1, 2]), r"Write locked=\[2\]"),
    "one of two": (lambda: HAT.update(OPEN, (X[0], Y[0]), 0, 5.0), r"\[0, 1\] were opened together"),
    "not open": (lambda: HAT.update(OPEN, (X, Y), [1, 2], 5.0), r"task \[1, 2\] is not open"),
    "one batch": (lambda: HAT.update(OPEN, (X[0], Y[0]), [0, 1], 5.0), r"\(K, B, \.\.\.\)"),
    "labels": (lambda: HAT.update(OPEN, (X, Y + 1), [0, 1], 5.0), "the task has 2 classes"),
    "carried": (lambda: HAT.begin(OPEN, 2, carry=True), "carry=False"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    call, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("count", [2, 3])
def test_once_one_is_closed_the_others_are_opened_anew(optimizer: str, count: int) -> None:
    """Moments of two tasks would broadcast over one, and what is closed is not locked yet."""
    x, y = batches((5,), 3)
    hat = learner(MLP(5, 3, width=16).double(), x[0], optimizer=OPTIMIZERS[optimizer]())
    opened = list(range(count))
    state = hat.begin(hat.init(0), opened)
    state, _ = hat.update(state, (x[:count], y[:count]), opened, 5.0)
    state = hat.consolidate(state, 0)
    rest = opened[1:]
    batch, task = ((x[1], y[1]), 1) if count == 2 else ((x[1:], y[1:]), rest)
    with pytest.raises(ValueError, match=r"update: the optimizer state .* state = hat\.begin\("):
        hat.update(state, batch, task, 5.0)
    many, states = hatfn.Replicas(hat), hatfn.stack([state, state])
    with pytest.raises(ValueError, match=r"update: the optimizer state"):
        many.update(states, batch, task, 5.0, shared=True)
    served = hat.forward(state, x[0], 0)
    begun = hat.begin(state, task)
    state, info = hat.update(begun, batch, task, 5.0)
    assert info.ok
    assert moved(begun, state)
    assert torch.equal(hat.forward(state, x[0], 0), served)


@pytest.mark.parametrize("closed", [(), (0,), (0, 2)], ids=str)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_growing_keeps_the_moments_of_all(optimizer: str, closed: tuple[int, ...]) -> None:
    """Also of those that are closed by now: what comes next may carry them on."""
    x, y = batches((5,), 2)
    hat = learner(MLP(5, 3, width=16).double(), x[0], optimizer=OPTIMIZERS[optimizer]())
    begun = hat.begin(hat.init(0), [0, 2])
    state, _ = hat.update(begun, (x, y), [0, 2], 5.0)
    assert not equal(state.opt_state, begun.opt_state)
    for task in closed:
        state = hat.consolidate(state, task)
    for classes in (2, 5):
        wide, grown = hatfn.grow(hat, state, classes=[classes])
        fresh = wide.begin(grown, [0, 2]).opt_state
        leaves = zip(*map(optree.tree_leaves, (state.opt_state, grown.opt_state, fresh)), strict=True)
        for old, new, start in leaves:
            inner = tuple(map(slice, old.shape))
            assert torch.equal(new[inner], old)
            assert torch.equal(torch.where(inside(new, inner), start, new), start)
        carried = wide.begin(grown, [1, 3], locked=[], carry=True)
        assert equal(carried.opt_state, grown.opt_state)


def inside(leaf: torch.Tensor, inner: tuple[slice, ...]) -> torch.Tensor:
    within = torch.zeros(leaf.shape, dtype=torch.bool)
    within[inner] = True
    return within
