"""Lock rules: each is its formula, all go through the one step, and old tasks move as far as promised."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torchopt
from drawn import arrays
from hypothesis import given
from hypothesis.extra import numpy as nps
from nets import ConvNet, equal, learn, learner, moved
from optimizers import OPTIMIZERS
from torch import Tensor

import hatfn
from hatfn.method import protection as locks
from hatfn.method.masks import binary_gates
from hatfn.method.protection import LOCKS, Lock, Locked, exact_protection
from hatfn.models import MLP, AlexNet
from hatfn.replicas import replica
from hatfn.wiring import ParamWiring, Units, Wiring

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X = torch.randn(12, 5)
WIRING = Wiring(
    {"a": 3, "b": 4},
    {
        "w": ParamWiring(
            (4, 3), "shared", Units(torch.arange(3, 7)[:, None], "b"), Units(torch.arange(3)[None], "a")
        ),
        "bias": ParamWiring((4,), "shared", Units(torch.arange(3, 7), "b")),
        "mixed": ParamWiring((3,), "shared", None, Units(torch.tensor([6, -1, 0]))),
        "norm": ParamWiring((4,), "task", Units(torch.arange(3, 7), "b")),
    },
)


def counts(hat: hatfn.HAT, state: hatfn.HATState, name: str) -> Tensor:
    """How many locked tasks depend on each entry, one at a time."""
    held = [
        exact_protection(hat.wiring, binary_gates(state), hat.flags(state, [task]))[name]
        for task in state.locked.nonzero().flatten().tolist()
    ]
    return torch.stack(held).sum(0)


def test_adaptive_is_its_formula() -> None:
    hat = learner(MLP(5, 3, width=16), X, protection=locks.adaptive(alpha=0.5, epsilon=0.25))
    state = hat.init(0)
    for task in (0, 2):
        state = hat.consolidate(state, task)
    state = hat.begin(state, 1)
    n = {name: counts(hat, state, name).double() for name in state.protection}
    free = sum(int((c == 0).sum()) for c in n.values()) / sum(c.numel() for c in n.values())
    r = 0.5 / (free + 0.25)
    assert {int(c) for each in n.values() for c in each.unique()} == {0, 1, 2}
    for name, p in state.protection.items():
        torch.testing.assert_close(p.double(), 1 - torch.where(n[name] == 0, 1, r / (n[name] + r)))


def test_magnitude_holds_the_largest_of_what_is_used() -> None:
    hat = learner(MLP(5, 3, width=16), X, protection=locks.magnitude(0.3))
    state = hat.consolidate(hat.init(0), 0)
    first = hat.begin(state, 1)
    for name, held in first.protection.items():
        used = exact_protection(hat.wiring, state.masks, first.locked)[name]
        size = state.params[name].abs()
        assert held.sum() == -(-3 * int(used.sum()) // 10)
        assert not (held & ~used).any()
        assert size[held].min() >= size[used & ~held].max()
    # What is held stays held, whatever becomes of the others; a new task adds its own.
    grown = {n: torch.where(first.protection[n], p, p * 100) for n, p in first.params.items()}
    second = hat.begin(hat.consolidate(first._replace(params=grown), 1), 2)
    for name, held in second.protection.items():
        assert (held | ~first.protection[name]).all()
        both = exact_protection(hat.wiring, second.masks, second.locked)[name]
        assert not (held & ~both).any()
        assert held.sum() > first.protection[name].sum()


def test_a_whole_share_is_the_exact_rule() -> None:
    module = MLP(5, 3, width=16)
    both = [learner(module, X, protection=rule) for rule in (locks.magnitude(1.0), "exact")]
    states = [learn(hat, learn(hat, hat.init(0), X, 2), X, 1) for hat in both]
    assert equal(*states)


def test_the_papers_lock_on_its_convolutional_network() -> None:
    """Five gated layers; of a kernel all places are held alike, and fc1 reads maps that are flattened."""
    x = torch.randn(1, 3, 32, 32)
    hat = learner(AlexNet(3, width=0.05), x, protection="paper", s_max=4.0)
    assert [*hat.wiring.groups] == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    state = hat.begin(hat.consolidate(hat.consolidate(hat.init(0), 0), 1), 2)
    used = {g: torch.sigmoid(4.0 * e[:2]).amax(0) for g, e in state.embeddings.items()}
    for name, before in {"conv2": "conv1", "conv3": "conv2", "fc1": "conv3", "fc2": "fc1"}.items():
        weight, post, pre = state.params[f"{name}.weight"], used[name], used[before]
        if name == "fc1":  # as the paper's code has it: a channel's gate for each of its 2 x 2 places
            pre = pre.view(-1, 1, 1).expand(-1, 2, 2).reshape(-1)
        smaller = torch.minimum(post[:, None], pre[None])
        wanted = smaller.reshape(*smaller.shape, *[1] * (weight.dim() - 2)).expand(weight.shape)
        torch.testing.assert_close(state.protection[f"{name}.weight"], wanted)
        torch.testing.assert_close(state.protection[f"{name}.bias"], post)
    first = used["conv1"].view(-1, 1, 1, 1).expand(state.params["conv1.weight"].shape)
    torch.testing.assert_close(state.protection["conv1.weight"], first)


def drifts(protection: object, **settings: object) -> float:
    """How far the first task's logits move while two others are learned."""
    torch.manual_seed(0)
    hat = learner(MLP(5, 3, width=16), X, protection=protection, init="dense", **settings)
    state = learn(hat, hat.init(0), X, 0)
    before = hat.forward(state, X, 0)
    for task in (1, 2):
        state = learn(hat, state, X, task, steps=8)
    return (hat.forward(state, X, 0) - before).abs().max().item()


@pytest.mark.parametrize("name", ["decay", "adam"])
def test_drift_is_none_little_or_much(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    none = Lock(
        lambda wiring, seen: {n: torch.zeros_like(p) for n, p in seen.params.items()}, soft=True
    )
    much = drifts(none, optimizer=optimizer)
    less = [drifts(locks.adaptive(alpha), optimizer=optimizer) for alpha in (1e-2, 1e-3)]
    assert drifts("exact", optimizer=optimizer) == 0.0
    assert 0 < less[1] < less[0] < 0.5 * much
    assert 0 < drifts(locks.magnitude(0.5), optimizer=optimizer) < much


def test_a_soft_lock_scales_the_update_not_the_gradient() -> None:
    """Adam would make good for a smaller gradient; a smaller update is smaller."""
    y = torch.randint(2, (len(X),))
    half = Lock(
        lambda wiring, seen: {n: torch.full_like(p, 0.75) for n, p in seen.params.items()},
        soft=True, on="update",
    )  # fmt: skip
    module, moves = MLP(5, 3, width=16), []
    for protection in (half, "exact"):
        hat = learner(module, X, protection=protection, optimizer=torchopt.adam(1e-2))
        state = hat.begin(hat.init(0), 1)
        new, _ = hat.update(state, (X, y), 1, 10.0)
        moves.append({name: new.params[name] - state.params[name] for name in new.params})
    for name, move in moves[0].items():
        torch.testing.assert_close(move, 0.25 * moves[1][name], rtol=1e-3, atol=1e-8)
        assert move.abs().max() > 1e-3


@pytest.mark.parametrize("name", LOCKS)
def test_every_rule_commutes_with_replicas_and_is_forgotten(name: str) -> None:
    x, y = torch.randn(6, 1, 6, 6), torch.randint(2, (6,))
    hat = learner(ConvNet(), x, protection=name)
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, [3, 4])
    alone = [replica(states, i) for i in range(2)]
    for task in (0, 1, 2):
        states = many.begin(states, task)
        alone = [hat.begin(state, task) for state in alone]
        for i, state in enumerate(alone):
            for key, p in replica(states, i).protection.items():
                torch.testing.assert_close(p, state.protection[key])
        begun, (states, _) = states, many.update(states, (x, y), task, 30.0, shared=True)
        assert moved(begun, states)
        states = many.consolidate(states, task)
        alone = [hat.consolidate(hat.update(s, (x, y), task, 30.0)[0], task) for s in alone]
    state, _ = hat.forget(alone[0], [0, 1, 2])
    assert not any(p.any() for p in state.protection.values())


def test_a_rule_of_ones_own() -> None:
    """Whole units at the output end, as a user might try it."""

    def rows(wiring: hatfn.Wiring, seen: Locked) -> dict[str, Tensor]:
        look = wiring.lookup(seen.used)
        return {name: look(role.out_units).expand(role.shape) for name, role in wiring.shared.items()}

    hat = learner(MLP(5, 3, width=16), X, protection=Lock(rows))
    state = learn(hat, hat.init(0), X, 0)
    before = hat.forward(state, X, 0)
    assert torch.equal(hat.forward(learn(hat, state, X, 1), X, 0), before)


@pytest.mark.parametrize(
    "wrong", [lambda: locks.adaptive(0), lambda: locks.adaptive(1, -1), lambda: locks.magnitude(0)]
)
def test_wrong_settings(wrong) -> None:
    with pytest.raises(ValueError, match="Expected"):
        wrong()


@given(
    a=nps.arrays("bool", (5, 3)).map(torch.tensor),
    b=nps.arrays("bool", (5, 4)).map(torch.tensor),
    locked=nps.arrays("bool", (5,)).map(torch.tensor),
    one_more=st.integers(0, 4),
)
def test_exact_protection_is_brute_force_and_monotone(
    a: Tensor, b: Tensor, locked: Tensor, one_more: int
) -> None:
    held = locks.exact_protection(WIRING, {"a": a, "b": b}, locked)
    tasks = locked.nonzero().flatten().tolist()
    units = torch.cat([a, b, torch.ones(5, 1, dtype=torch.bool)], 1)
    for i in range(4):
        for j in range(3):
            assert held["w"][i, j] == any(b[t, i] and a[t, j] for t in tasks)
        assert held["bias"][i] == any(b[t, i] for t in tasks)
    for entry, unit in enumerate([6, -1, 0]):
        assert held["mixed"][entry] == any(units[t, unit] for t in tasks)
    assert "norm" not in held
    more = locked.index_fill(0, torch.tensor([one_more]), True)
    wider = locks.exact_protection(WIRING, {"a": a, "b": b}, more)
    assert all((held[name] <= wider[name]).all() for name in held)


@given(a=arrays(st.floats(0, 1, width=32), (3,)), b=arrays(st.floats(0, 1, width=32), (4,)))
def test_paper_protection_is_the_smaller_end(a: Tensor, b: Tensor) -> None:
    held = locks.paper_protection(WIRING, {"a": a, "b": b})
    assert torch.equal(held["w"], torch.minimum(b[:, None], a[None]))
    assert torch.equal(held["bias"], b)


def test_exact_protection_is_its_definition() -> None:
    x = torch.randn(2, 1, 6, 6)
    hat = learner(ConvNet(), x)
    state = hat.init(0)
    for task in (0, 2):
        state = hat.consolidate(state, task)
    state = hat.begin(state, 1)
    on = state.masks["conv1"]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    for task in (0, 2):
        for i in range(8):
            for j in range(8):
                expected[i, j] |= on[task, i] & on[task, j]
    assert torch.equal(state.protection["conv2.weight"], expected[..., None, None].expand(8, 8, 3, 3))
    assert torch.equal(state.protection["conv2.bias"], on[[0, 2]].any(0))
    assert torch.equal(state.protection["conv1.weight"][:, 0, 0, 0], on[[0, 2]].any(0))


def test_paper_protection_is_its_definition() -> None:
    x = torch.randn(2, 5)
    hat = learner(MLP(5, 3, width=4), x, protection="paper", s_max=4.0)
    state = hat.init(0)
    for task in (0, 2):
        state = hat.consolidate(state, task)
    state = hat.begin(state, 1)
    post, pre = (torch.sigmoid(4.0 * state.embeddings[f"hidden.{i}"][[0, 2]]).amax(0) for i in (1, 0))
    torch.testing.assert_close(
        state.protection["hidden.1.weight"], torch.minimum(post[:, None], pre[None, :])
    )
    torch.testing.assert_close(state.protection["hidden.1.bias"], post)
    torch.testing.assert_close(state.protection["hidden.0.weight"], pre[:, None].expand(4, 5))
