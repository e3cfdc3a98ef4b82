"""A donated step: the same numbers, in the memory of a state that is spent afterwards."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import optree
import pytest
import torch
import torchopt
from hypothesis import given, settings
from nets import ConvNet, equal, learner, moved
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hatfn
from hatfn.engine.memory import HUGE, LARGE
from hatfn.models import MLP
from hatfn.state import HATState

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
X = torch.randn(8, 5)
Y = torch.randint(2, (8,))
OPTIMIZERS = {
    "sgd": lambda: hatfn.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda: hatfn.from_torch(torch.optim.AdamW, lr=1e-2, fused=True),
    "dampened": lambda: hatfn.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "adafactor": lambda: hatfn.from_torch(torch.optim.Adafactor, lr=1e-2),  # looks at whole tensors
    "torchopt": lambda: torchopt.adam(1e-2),
}


def copied(state: HATState) -> HATState:
    return optree.tree_map(torch.clone, state)


def built(optimizer: str = "sgd", **settings) -> hatfn.HAT:
    return learner(MLP(5, 3, width=16), X, optimizer=OPTIMIZERS[optimizer](), **settings)


def opened(hat: hatfn.HAT) -> HATState:
    state = hat.begin(hat.init(0), 0)
    state, info = hat.update(state, (X, Y), 0, 5.0)
    assert info.ok
    return state


def is_spent(state: HATState) -> bool:
    return all(leaf.shape == (0,) for leaf in optree.tree_leaves(state))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=6)
@given(data=st.data())
def test_any_history_ends_in_the_same_state_and_leaves_all_others_whole(optimizer: str, data) -> None:
    hat = built(optimizer, protection=data.draw(st.sampled_from(["exact", "paper", "adaptive"])))
    donated = plain = hat.init(0)
    held: list[tuple[HATState, HATState]] = []
    for task in data.draw(st.permutations([0, 1, 2])):
        held.append((donated, copied(donated)))
        donated, plain = (hat.begin(state, task) for state in (donated, plain))
        for step in range(data.draw(st.integers(1, 4))):
            scale = data.draw(st.sampled_from([1.0, 20.0, None]))
            x = X if data.draw(st.integers(0, 5)) else X * torch.inf
            donate = data.draw(st.booleans())
            held.append((plain, copied(plain)))
            if not donate:
                held.append((donated, copied(donated)))
            before = donated
            plain, told = hat.update(plain, (x, Y), task, scale)
            donated, info = hat.update(donated, (x, Y), task, scale, donate=donate)
            assert is_spent(before) == donate
            assert info.ok == told.ok == bool(x.isfinite().all())
            assert equal(donated, plain), step
        end = data.draw(st.sampled_from(["consolidate", "forget", "grow"]))
        held.append((donated, copied(donated)))
        if end == "grow":
            donated, plain = (hatfn.grow(hat, state, [2])[1] for state in (donated, plain))
            hat = hatfn.grow(hat, held[-1][0], [2])[0]
        elif end == "forget":
            donated, plain = (hat.forget(state, task)[0] for state in (donated, plain))
        else:
            donated, plain = (hat.consolidate(state, task) for state in (donated, plain))
        assert equal(donated, plain)
    for state, copy in held:
        assert equal(state, copy), "a state that nobody handed over has changed"


def test_a_refused_step_gives_the_old_numbers_back() -> None:
    hat = built()
    state = opened(hat)
    before = copied(state)
    new, info = hat.update(state, (X * torch.nan, Y), 0, 5.0, donate=True)
    assert not info.ok
    assert is_spent(state)
    assert equal(new, before)


def test_an_error_spends_nothing() -> None:
    hat = built(loss=lambda output, y: output.mean() if (y == 0).all() else output.nothing)
    state = hat.begin(hat.init(0), 0)
    before = copied(state)
    with pytest.raises(Exception, match="nothing"):
        hat.update(state, (X, Y.clamp(min=1)), 0, 5.0, donate=True)
    assert equal(state, before)
    assert moved(state, hat.update(state, (X, Y * 0), 0, 5.0, donate=True)[0]) is not None


def test_what_is_spent_is_refused_and_so_are_copies_that_share_it() -> None:
    hat = built()
    state = opened(hat)
    other = state._replace(hyper={**state.hyper, "lr": torch.tensor(0.5)})
    new, _ = hat.update(state, (X, Y), 0, 5.0, donate=True)
    for spent in (state, other):
        with pytest.raises(ValueError, match=r"update: the state is spent.*donate=True"):
            hat.update(spent, (X, Y), 0, 5.0, donate=True)
        assert "spent" in repr(spent)
    assert hat.update(new, (X, Y), 0, 5.0)[1].ok


def test_memory_that_others_hold_is_copied_or_refused() -> None:
    hat = built()
    state = opened(hat)
    row = state.embeddings["hidden.0"].detach()[0]
    array = state.task_params["head.weight"].numpy()
    kept, rows = array.copy(), row.clone()
    state, _ = hat.update(state, (X, Y), 0, 5.0, donate=True)
    assert torch.equal(row, rows), "a view"
    assert np.array_equal(array, kept), "an array"
    shared = np.from_dlpack(state.embeddings["hidden.0"])
    with pytest.raises(ValueError, match=r"donate=True, but state\.embeddings/hidden\.0 is also held"):
        hat.update(state, (X, Y), 0, 5.0, donate=True)
    assert shared.shape == (3, 16)
    assert hat.update(state, (X, Y), 0, 5.0)[1].ok
    del shared
    row = state.masks["hidden.0"][0]
    with pytest.raises(ValueError, match=r"masks/hidden\.0 is also held by a view of it"):
        hat.update(state, (X, Y), 0, 5.0, donate=True)
    assert not row.any()


def test_one_of_many_replicas_stays_whole() -> None:
    many = hatfn.Replicas(built())
    states = many.begin(hatfn.replicate(many.hat, [0, 1]), 0)
    states, _ = many.update(states, (X, Y), 0, 5.0)
    one = hatfn.replica(states, 0)
    before, plain = copied(one), many.update(states, (X, Y), 0, 5.0)[0]
    new, info = many.update(states, (X, Y), 0, 5.0, donate=True)
    assert info.ok.all()
    assert equal(new, plain)
    assert is_spent(states)
    assert equal(one, before)
    again, plain = (
        many.update(s, (X, Y), 0, 5.0, donate=d)[0] for s, d in ((plain, False), (new, True))
    )
    assert equal(plain, copied(plain))
    assert again.learned.shape == plain.learned.shape
    with pytest.raises(ValueError, match="spent"):
        many.forward(new, X, 0, 5.0)


def test_not_inside_a_transform_and_not_by_another_word() -> None:
    hat = built()
    state = opened(hat)
    stacked = hatfn.stack([state, state])
    step = torch.vmap(lambda s: hat.update(s, (X, Y), 0, 5.0, donate=True), randomness="different")
    with pytest.raises(ValueError, match="donate=True inside a transform"):
        step(stacked)
    with pytest.raises(TypeError, match="donate"):
        hat.update(state, (X, Y), 0, 5.0, donate="yes")


@pytest.mark.parametrize("how", [{"accumulate": 3}, {"compile": "update"}, {"max_norm": 1e-3}])
def test_in_every_kind_of_step(how: dict) -> None:
    optimizer = "torchopt" if "compile" in how else "adamw"
    hat = built(optimizer, **how)
    plain = donated = hat.begin(hat.init(0), [0, 2])
    batch = (torch.stack([X, X]), torch.stack([Y, Y]))
    for _ in range(3):
        plain, told = hat.update(plain, batch, [0, 2], 5.0)
        donated, info = hat.update(donated, batch, [0, 2], 5.0, donate=True)
        assert info.ok
        assert equal(donated, plain)
        assert equal(info, told)


class Written(TorchDispatchMode):
    """The numbers that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        views = function._schema.name in ("aten::detach", "aten::view", "aten::slice", "aten::select")
        for leaf in optree.tree_leaves(result):
            if isinstance(leaf, Tensor) and not views and function is not torch.ops.aten.set_.default:
                self.total += leaf.numel()
        return result


def test_a_step_costs_the_same_whatever_the_number_of_tasks() -> None:
    x = torch.randn(4, 1, 6, 6)
    totals = []
    for tasks in (5, 505):
        hat = learner(ConvNet(), x, classes=[2] * tasks, optimizer=OPTIMIZERS["sgd"]())
        state = hat.begin(hat.init(0), 3)
        for _ in range(2):  # the first one takes new memory
            with Written() as written:
                state, _ = hat.update(state, (x, Y[:4]), 3, 5.0, donate=True)
        totals.append(written.total)
    assert totals[1] - totals[0] < 505 * 8, "a row of flags, but no stack of a task's tensors"


def with_a_weight_of(features: int) -> tuple[hatfn.HAT, Tensor]:
    """A learner with a weight of 64 rows, and an input."""
    x = torch.randn(4, features)
    module = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 2))
    return learner(module, x, "2", classes=[2], optimizer=OPTIMIZERS["sgd"]()), x


def test_large_blocks_are_used_again() -> None:
    features = LARGE // 4 // 64
    hat, x = with_a_weight_of(features)
    state, given = hat.begin(hat.init(0), 0), []
    for step in range(6):
        leaves = optree.tree_leaves((state.params, state.opt_state))
        given.append({leaf.data_ptr() for leaf in leaves if leaf.numel() == 64 * features})
        state, _ = hat.update(state, (x, Y[:4]), 0, 5.0, donate=True)
        (kept,) = (one for one in optree.tree_leaves(state.opt_state) if one.numel() == 64 * features)
        assert step < 2 or kept.data_ptr() in given[-2]
    assert sum(map(len, hat.memory.free.values())) == 1
    hat.consolidate(state, 0)
    assert not hat.memory.free


def test_huge_gradients_go_to_the_memory_of_old_weights() -> None:
    features = HUGE // 4 // 64
    hat, x = with_a_weight_of(features)
    plain = state = hat.begin(hat.init(0), 0)
    seen = []
    for _ in range(9):
        plain, _ = hat.update(plain, (x, Y[:4]), 0, 5.0)
        state, _ = hat.update(state, (x, Y[:4]), 0, 5.0, donate=True)
        assert equal(state, plain)
        seen.append(state.params["0.weight"].data_ptr())
    assert len({*seen}) <= 5, "weights and moments move between four blocks"


def test_gradients_of_any_layout_and_of_a_hook_stay_right() -> None:
    """A summed bias has an expanded gradient; a hook of the module keeps a gradient."""
    kept = []

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 16), nn.Linear(16, 2)
            self.free = nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            if self.training and self.free.requires_grad:
                self.free.register_hook(kept.append)
            return self.two(torch.relu(self.one(x))) + self.free.sum()

    hat = learner(Odd(), X, "two", classes=[2, 2], optimizer=OPTIMIZERS["sgd"](), loss=Sum())
    state = hat.begin(hat.init(0), 0)
    kept.clear()
    new, info = hat.update(state, (X, Y), 0, 5.0)
    assert info.ok
    (gradient,) = kept
    assert torch.equal(gradient, torch.full((16,), 2.0 * len(X))), (
        "what a hook keeps is not overwritten"
    )
    assert torch.equal(new.task_params["free"][0], state.task_params["free"][0] - 0.1 * gradient)


class Sum:
    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return output.sum() + 0 * y.sum()
