"""Many seeds and settings in one call: equal to each of them alone, and refused where it should be."""

from __future__ import annotations

import optree
import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ConvNet, Transformer, equal, learner, mlp, moved
from optimizers import OPTIMIZERS
from torch import Tensor

import hatfn
from hatfn.method import schedule
from hatfn.models import MLP
from hatfn.replicas import replica, stack
from hatfn.testing import verify_no_forgetting

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

NETWORKS = {
    "mlp": (lambda: MLP(5, 3, width=16), (5,)),
    "conv net": (ConvNet, (1, 6, 6)),
    "transformer": (Transformer, (4, 5)),
}
SEEDS = [3, 0, 7]


def life(hat, state, batches: dict[int, tuple[Tensor, Tensor]], s_max: float = 20.0):
    """Two tasks, three steps each: the same lines for a learner and for replicas."""
    for task, batch in batches.items():
        begun = state = hat.begin(state, task)
        for step in range(3):
            state, info = hat.update(state, batch, task, schedule.linear(s_max)(step / 2))
            assert info.ok.all()
        assert moved(begun, state)
        state = hat.consolidate(hat.recalibrate(state, [batch[0]], task), task)
    return state


@pytest.mark.parametrize("optimizer", ["decay", "adam", "adamw", "rmsprop", "torch's fused adamw"])
@pytest.mark.parametrize("network", NETWORKS)
def test_replicas_are_the_runs_one_after_another(network: str, optimizer: str) -> None:
    make, shape = NETWORKS[network]
    x = torch.randn(len(SEEDS), 8, *shape).double()
    batches = {task: (x, torch.randint(2, (len(SEEDS), 8))) for task in (1, 0)}
    hat = learner(make().double(), x[0], optimizer=OPTIMIZERS[optimizer]())
    many, start = hatfn.Replicas(hat), hatfn.replicate(hat, SEEDS)
    states = life(many, start, batches)
    assert not equal(states.params, start.params)
    for i, seed in enumerate(SEEDS):
        own = {task: (xs[i], ys[i]) for task, (xs, ys) in batches.items()}
        alone = life(hat, hat.init(seed, fresh=True), own)
        for ours, theirs in zip(
            optree.tree_leaves(replica(states, i)), optree.tree_leaves(alone), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # adam scales roundings up
        torch.testing.assert_close(many.forward(states, x[0], 1)[i], hat.forward(alone, x[0], 1))
        torch.testing.assert_close(many.predict(states, x[0])[i], hat.predict(alone, x[0]))
        torch.testing.assert_close(
            many.forward(states, x, 0, scale=3.0, shared=False)[i], hat.forward(alone, x[i], 0, 3.0)
        )
        verify_no_forgetting(hat, replica(states, i), x[0])


def test_old_tasks_of_every_replica_stay_to_the_bit() -> None:
    x, y = torch.randn(3, 8, 1, 6, 6), torch.randint(2, (3, 8))
    hat = learner(ConvNet(), x[0], optimizer=torchopt.adamw(1e-2, weight_decay=0.1))
    many = hatfn.Replicas(hat)
    states = life(many, hatfn.replicate(hat, SEEDS), {0: (x, y)})
    before, weights = many.forward(states, x[0], 0), states.params
    states = life(many, states, {2: (x, y), 1: (x, y)})
    assert torch.equal(many.forward(states, x[0], 0), before)
    assert not equal(states.params, weights)


def test_the_type_of_no_leaf_changes() -> None:
    x, y = torch.randn(3, 8, 5), torch.randint(2, (3, 8))
    hat = learner(MLP(5, 3, width=16), x[0], optimizer=torchopt.adam(1e-2))
    start = hatfn.replicate(hat, SEEDS, lr=[1.0, 0.5, 2.0], sparsity=0.1)
    states = life(hatfn.Replicas(hat), start, {0: (x, y), 1: (x, y)})
    for old, new in zip(optree.tree_leaves(start), optree.tree_leaves(states), strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)


@given(
    lr=st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
    sparsity=st.lists(st.floats(0, 2), min_size=3, max_size=3),
    s_max=st.lists(st.floats(2, 100), min_size=3, max_size=3),
)
@settings(max_examples=5)
def test_settings_differ_per_replica(
    lr: list[float], sparsity: list[float], s_max: list[float]
) -> None:
    """Each equals a learner that was built with them, its scale annealed to its own s_max."""
    torch.manual_seed(0)
    module, x = MLP(5, 3, width=16).double(), torch.randn(8, 5).double()
    y, wiring = torch.randint(2, (8,)), hatfn.trace(MLP(5, 3, width=16).double(), x[:1])

    def build(lr: float = 1.0, **hyper: float) -> hatfn.HAT:
        return hatfn.build(module, wiring, [3, 2, 3], torchopt.sgd(0.1 * lr), **hyper)

    many, seed = hatfn.Replicas(build()), 5
    states = hatfn.replicate(build(), [seed] * 3, lr=lr, sparsity=sparsity, s_max=s_max)
    begun = states = many.begin(states, 1)
    top = torch.tensor(s_max).double()
    for progress in (0.2, 0.9):
        scale = 1 / top + (top - 1 / top) * progress
        states, info = many.update(states, (x, y), 1, scale, shared=True)
    assert info.ok.all()
    for i in range(3):
        assert moved(replica(begun, i), replica(states, i))
        hat = build(lr[i], sparsity=sparsity[i], s_max=s_max[i])
        state = hat.begin(hat.init(seed, fresh=True), 1)
        for progress in (0.2, 0.9):
            state, _ = hat.update(state, (x, y), 1, schedule.linear(s_max[i])(progress))
        torch.testing.assert_close(
            replica(states, i).embeddings, state.embeddings, rtol=1e-6, atol=1e-9
        )
        torch.testing.assert_close(replica(states, i).params, state.params, rtol=1e-6, atol=1e-9)


def test_replicas_drop_out_differently_and_one_can_fail_alone() -> None:
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    hat = learner(MLP(5, 3, width=16, dropout=0.5), x)
    many = hatfn.Replicas(hat)
    states = many.begin(hatfn.replicate(hat, [1, 1]), 1)
    states, info = many.update(states, (x, y), 1, 5.0, shared=True)
    assert not torch.equal(info.logits[0], info.logits[1])
    own = torch.stack([x, x * torch.nan])
    after, info = many.update(states, (own, torch.stack([y, y])), 1, 5.0)
    assert info.ok.tolist() == [True, False]
    assert equal(replica(after, 1), replica(states, 1))
    assert not equal(replica(after, 0).params, replica(states, 0).params)


def test_several_tasks_in_a_step_of_every_replica() -> None:
    x, y = torch.randn(3, 2, 8, 5).double(), torch.randint(2, (3, 2, 8))
    hat = learner(MLP(5, 3, width=16).double(), x[0, 0])
    many = hatfn.Replicas(hat)
    states, info = many.update(many.begin(hatfn.replicate(hat, SEEDS), [0, 2]), (x, y), [0, 2], 5.0)
    assert info.loss.shape == (3, 2)
    for i, seed in enumerate(SEEDS):
        begun = hat.begin(hat.init(seed, fresh=True), [0, 2])
        alone, _ = hat.update(begun, (x[i], y[i]), [0, 2], 5.0)
        torch.testing.assert_close(replica(states, i).params, alone.params)
        assert not equal(begun.params, alone.params)


def test_stacked_states_come_apart_again() -> None:
    hat = learner(ConvNet(), torch.randn(1, 1, 6, 6))
    states = [hat.init(seed, fresh=True) for seed in SEEDS]
    stacked = hatfn.replicate(hat, SEEDS)
    assert equal(stack(states), stacked)
    assert all(equal(replica(stacked, i), state) for i, state in enumerate(states))


HAT = learner(mlp(), torch.randn(1, 5), head="4")
FUSED = learner(
    mlp(), torch.randn(1, 5), head="4", optimizer=torchopt.adam(1e-3, use_accelerated_op=True)
)
MANY, STATES = hatfn.Replicas(HAT), hatfn.replicate(HAT, [0, 1])
BOTH = MANY.begin(STATES, [0, 1])
X, Y = torch.randn(2, 8, 5), torch.randint(2, (2, 8))
WRONG = {  # what test_errors.py does not have: other learners, several tasks
    "range": (lambda: hatfn.replicate(HAT, [0, 1], s_max=[5, 0.5]), ValueError, r"s_max=0\.5"),
    "accelerated": (
        lambda: hatfn.Replicas(FUSED).update(
            hatfn.Replicas(FUSED).begin(hatfn.replicate(FUSED, [0, 1]), 1), (X, Y), 1, 5.0
        ),
        ValueError, "use_accelerated_op=True",
    ),
    "labels of one of two tasks": (
        lambda: MANY.update(BOTH, (X[:, None].expand(2, 2, 8, 5), torch.stack([Y, Y + 1], 1)), [0, 1], 5.0),
        ValueError, "the task has 2 classes",
    ),
    "one batch for two tasks": (
        lambda: MANY.update(BOTH, (X[:, None], Y[:, None]), [0, 1], 5.0), ValueError, "for 2 tasks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()


def test_each_replica_is_served_at_its_own_scale() -> None:
    both = MANY.forward(STATES, X[0], 1, torch.tensor([3.0, 30.0]))
    for i, scale in enumerate((3.0, 30.0)):
        alone = HAT.forward(replica(STATES, i), X[0], 1, scale)
        torch.testing.assert_close(both[i], alone)


def test_tasks_locked_by_name_are_those_of_every_replica() -> None:
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=16), x)
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, SEEDS)
    states = many.consolidate(many.begin(states, 0), 0)
    for locked in ([0], [], None):
        begun = many.begin(states, 1, locked=locked)
        for i in range(len(SEEDS)):
            assert equal(replica(begun, i), hat.begin(replica(states, i), 1, locked=locked))
