"""The learner's promises: nothing forgotten, nothing changed in place, many seeds at once."""

from __future__ import annotations

import warnings
from dataclasses import replace

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, Transformer, equal, learn, learner, mlp
from torch import Tensor, nn

from hatfn import from_torch
from hatfn.models import MLP
from hatfn.testing import verify_no_forgetting
from hatfn.wiring import Units

# Learners this small use up their units; test_silent.py has the warnings that say so.
pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

OPTIMIZERS = {
    "sgd": lambda: torchopt.sgd(0.1),
    "sgd momentum decay": lambda: torchopt.sgd(0.1, momentum=0.9, weight_decay=5e-4),
    "adam": lambda: torchopt.adam(1e-2),
    "adamw decay": lambda: torchopt.adamw(1e-2, weight_decay=1e-2),
    "rmsprop": lambda: torchopt.rmsprop(1e-2, momentum=0.9),
    "torch's nadam decay": lambda: from_torch(torch.optim.NAdam, lr=1e-2, weight_decay=1e-2),
    "torch's fused sgd decay": lambda: from_torch(
        torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    ),
}
NETWORKS = {
    "mlp": (lambda: MLP(5, 3, width=16), lambda: torch.randn(12, 5)),
    "conv net": (ConvNet, lambda: torch.randn(12, 1, 6, 6)),
    "transformer": (Transformer, lambda: torch.randn(12, 4, 5)),
}


@pytest.mark.parametrize("carry", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_old_tasks_do_not_drift(network: str, optimizer: str, carry: bool) -> None:
    """The library's first claim: logits of every learned task, to the bit, after every later one."""
    make, inputs = NETWORKS[network]
    x = inputs()
    hat = learner(make(), x, optimizer=OPTIMIZERS[optimizer]())
    state, recorded = hat.init(seed=0), {}
    for task in (1, 0, 2):
        before = state
        state = learn(hat, state, x, task, steps=6, carry=carry)
        assert not equal(before.params, state.params), "nothing was learned, so nothing is proven"
        recorded[task] = hat.forward(state, x, task)
        for old, logits in recorded.items():
            assert torch.equal(hat.forward(state, x, old), logits), f"task {old} after {task}"
    verify_no_forgetting(hat, state, x)


def test_without_protection_they_do() -> None:
    x = torch.randn(12, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = learn(hat, hat.init(0), x, task=0)
    before = hat.forward(state, x, 0)
    state = learn(hat, state, x, task=1, locked=[])
    assert not torch.equal(hat.forward(state, x, 0), before)
    assert state.learned.tolist() == [True, True, False]
    assert state.locked.tolist() == [False, False, False]


def test_a_task_not_learned_yet_can_be_locked() -> None:
    x = torch.randn(12, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = hat.init(0)
    served = hat.forward(hat.consolidate(state, 2), x, 2)
    state = learn(hat, state, x, task=0, locked=[2])
    assert torch.equal(hat.forward(hat.consolidate(state, 2), x, 2), served)


def test_a_learned_task_can_be_trained_again() -> None:
    x = torch.randn(12, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = learn(hat, learn(hat, hat.init(0), x, 0), x, 1)
    kept, other = hat.forward(state, x, 1), hat.forward(state, x, 0)
    state = hat.begin(state, 0)
    assert state.learned.tolist() == [False, True, False]
    state = learn(hat, state, x, 0)
    assert torch.equal(hat.forward(state, x, 1), kept)
    assert not torch.equal(hat.forward(state, x, 0), other)


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


def test_update_is_sgd_when_every_gate_is_one() -> None:
    """Against torch.optim, so that an update that does nothing cannot pass."""
    module, x, y = mlp(), torch.randn(8, 5), torch.randint(3, (8,))
    hat = learner(
        module, x, head="4", init="dense", sparsity=0.0, compensation=None,
        optimizer=torchopt.sgd(0.1, momentum=0.9, weight_decay=1e-2),
    )  # fmt: skip
    state = hat.begin(hat.init(0), 0)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        state, info = hat.update(state, (x, y), 0, scale=400.0)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(info.loss, loss)
    for name, value in module.state_dict().items():
        ours = state.params.get(name, state.task_params.get(name))
        ours = ours[0] if name.startswith("4") else ours
        torch.testing.assert_close(ours, value)
    assert torch.equal(state.embeddings["0"], torch.ones(3, 16)), "weight decay reached an embedding"


def test_only_the_open_task_is_written() -> None:
    x = torch.randn(8, 1, 6, 6)
    hat = learner(ConvNet(), x)
    state = hat.begin(hat.init(0), 1)
    after, _ = hat.update(state, (x, torch.randint(2, (8,))), 1, scale=5.0)
    for tree in ("task_params", "task_buffers", "embeddings"):
        for name, leaf in getattr(state, tree).items():
            changed = getattr(after, tree)[name]
            assert torch.equal(changed[[0, 2]], leaf[[0, 2]]), name
            assert not torch.equal(changed[1], leaf[1]), name


def test_binary_gates_train_weights_and_leave_embeddings() -> None:
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    hat = learner(MLP(5, 3, width=16), x, optimizer=torchopt.adam(1e-2))
    state = hat.begin(hat.init(0), 1)
    state, _ = hat.update(state, (x, y), 1, scale=50.0)  # moments that would move them
    after, info = hat.update(state, (x, y), 1, scale=None)
    assert info.ok
    assert equal(after.embeddings, state.embeddings)
    assert not equal(after.params, state.params)


@pytest.mark.parametrize("poison", ["input", "weight", "embedding", "huge gradient"])
def test_a_step_that_is_not_finite_is_refused(poison: str) -> None:
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    loss = nn.functional.cross_entropy
    if poison == "huge gradient":

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return logits.sum() * 1e38 * 1e3 - logits.sum() * 1e38 * 1e3

    hat = learner(MLP(5, 3, width=16), x, loss=loss)
    state = hat.begin(hat.init(0), 1)
    if poison == "input":
        x[0, 0] = torch.inf
    if poison == "weight":
        bad = state.params["hidden.0.weight"].clone()
        bad[0, 0] = torch.nan
        state = state._replace(params=state.params | {"hidden.0.weight": bad})
    if poison == "embedding":
        state = state._replace(embeddings={g: e * torch.nan for g, e in state.embeddings.items()})
    after, info = hat.update(state, (x, y), 1, scale=50.0)
    assert not info.ok
    for old, new in zip(optree.tree_leaves(state), optree.tree_leaves(after), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


def test_recalibration_is_the_mean_over_batches_under_binary_gates() -> None:
    x, y = torch.randn(16, 1, 6, 6), torch.randint(2, (16,))
    hat = learner(ConvNet(), x)
    state = hat.begin(hat.init(0), 1)
    for _ in range(3):
        state, _ = hat.update(state, (x, y), 1, scale=2.0)
    after = hat.recalibrate(state, x.split(4), 1)
    first = nn.functional.conv2d(x, state.params["conv1.weight"], padding=1)
    batches = first.split(4)
    mean = torch.stack([part.mean((0, 2, 3)) for part in batches]).mean(0)
    var = torch.stack([part.var((0, 2, 3)) for part in batches]).mean(0)
    torch.testing.assert_close(after.task_buffers["norm1.running_mean"][1], mean)
    torch.testing.assert_close(after.task_buffers["norm1.running_var"][1], var)
    assert not torch.equal(
        after.task_buffers["norm2.running_var"], state.task_buffers["norm2.running_var"]
    )
    for name, leaf in state.task_buffers.items():
        assert torch.equal(after.task_buffers[name][[0, 2]], leaf[[0, 2]])
    assert equal(after._replace(task_buffers={}), state._replace(task_buffers={}))
    broken = hat.recalibrate(state, [x * torch.inf], 1)
    assert equal(broken, state)
    plain = learner(MLP(5, 3, width=16), torch.randn(1, 5))
    begun = plain.begin(plain.init(0), 0)
    assert equal(plain.recalibrate(begun, [torch.randn(4, 5)], 0), begun)


@pytest.mark.parametrize("optimizer", ["sgd momentum decay", "adam", "adamw decay", "rmsprop"])
def test_many_seeds_in_one_call(optimizer: str) -> None:
    """vmap over a leading axis of states equals one after the other, batch norm included."""
    x, seeds = torch.randn(3, 8, 1, 6, 6).double(), [0, 1, 2]
    y = torch.randint(2, (3, 8))
    hat = learner(ConvNet().double(), x[0], optimizer=OPTIMIZERS[optimizer]())
    states = [hat.init(seed, fresh=True) for seed in seeds]

    def life(update, state, batch):
        for task in (1, 0):
            state = hat.begin(state, task)
            for scale in (2.0, 20.0):
                state, info = update(state, batch, task, scale)
            state = hat.consolidate(state, task)
        return state, info

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # torchopt's
        stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *states)
        begin = torch.vmap(hat.begin, in_dims=(0, None))
        update = torch.vmap(hat.update, in_dims=(0, 0, None, None), randomness="different")
        consolidate = torch.vmap(hat.consolidate, in_dims=(0, None))
        for task in (1, 0):
            stacked = begin(stacked, task)
            for scale in (2.0, 20.0):
                stacked, info = update(stacked, (x, y), task, scale)
            stacked = consolidate(stacked, task)
    assert info.ok.shape == (3,)
    for index, state in enumerate(states):
        alone, _ = life(hat.update, state, (x[index], y[index]))
        mine = optree.tree_map(lambda leaf, index=index: leaf[index], stacked)
        for old, new in zip(optree.tree_leaves(alone), optree.tree_leaves(mine), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)


def test_recalibration_leaves_frozen_norms_and_other_tasks_alone() -> None:
    class Half(nn.Module):
        """The first norm stays in eval mode, whatever train() says."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.n0, self.b, self.n = (
                nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8),
            )  # fmt: skip
            self.head = nn.Linear(8, 3)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.n0.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.n(self.b(self.n0(self.a(x)).relu())).relu())

    x = torch.randn(12, 5)
    hat = learner(Half(), x)
    assert {name.split(".")[0] for name in hat.wiring.buffers} == {"n"}
    state = hat.init(0)
    state = hat.consolidate(hat.recalibrate(hat.begin(state, 0), [x], 0), 0)
    before = hat.forward(state, x, 0)
    state = hat.recalibrate(hat.begin(state, 1), [3 * x + 1], 1)
    assert torch.equal(hat.forward(state, x, 0), before)
    stacked = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), hat.begin(state, 1))
    both = torch.vmap(lambda s: hat.recalibrate(s, [x], 1))(stacked)
    alone = hat.recalibrate(hat.begin(state, 1), [x], 1)
    torch.testing.assert_close(
        both.task_buffers["n.running_var"][0], alone.task_buffers["n.running_var"]
    )


def test_a_module_that_writes_into_its_input_leaves_the_callers_alone() -> None:
    module = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(5, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)
    )
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    kept = x.clone()
    hat = learner(module, x, head="3")
    state, info = hat.update(hat.begin(hat.init(0), 1), (x, y), 1, 5.0)
    hat.predict(hat.consolidate(state, 1), x)
    assert info.ok
    assert torch.equal(x, kept)


def test_frozen_parameters_are_gated_and_not_trained() -> None:
    module, x = ConvNet(), torch.randn(12, 1, 6, 6)
    for frozen in (module.conv1.weight, module.norm1.bias):
        frozen.requires_grad_(False)
    hat = learner(module, x, optimizer=torchopt.adamw(1e-2, weight_decay=0.1))
    start = hat.init(0)
    state = learn(hat, learn(hat, start, x, 0), x, 2)
    assert torch.equal(state.params["conv1.weight"], start.params["conv1.weight"])
    assert torch.equal(state.task_params["norm1.bias"], start.task_params["norm1.bias"])
    assert not torch.equal(state.params["conv2.weight"], start.params["conv2.weight"])
    assert not torch.equal(state.task_params["norm1.weight"], start.task_params["norm1.weight"])


def test_a_head_of_another_type_than_the_body() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 16, dtype=torch.bfloat16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu().float())

    x = torch.randn(8, 5, dtype=torch.bfloat16)
    hat = learner(Mixed(), x)
    assert hat.forward(learn(hat, hat.init(0), x, 0), x, 0).dtype == torch.float32


def test_classes_over_places_come_first() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    x = torch.randn(4, 1, 6, 6)
    hat = learner(Dense(), x)
    state = hat.begin(hat.init(0), 1)
    state, _ = hat.update(state, (x, torch.randint(2, (4, 4, 4))), 1, 5.0)
    state = hat.consolidate(hat.consolidate(state, 1), 0)
    maps = hat.predict(state, x)
    assert maps.shape == (2, 4, 3, 4, 4)
    assert maps[1, :, 2].eq(-torch.inf).all()
    torch.testing.assert_close(maps[1, :, :2], hat.forward(state, x, 1))


def test_refusal_and_settings_are_per_replica() -> None:
    x, y = torch.randn(2, 8, 5), torch.randint(2, (2, 8))
    x[1, 0, 0] = torch.nan
    hat = learner(MLP(5, 3, width=16), x[0])
    start = hat.begin(hat.init(0), 1)
    stacked = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), start)
    stacked = stacked._replace(hyper=stacked.hyper | {"lr": torch.tensor([0.5, 1.0]).double()})
    after, info = torch.vmap(hat.update, in_dims=(0, 0, None, None))(stacked, (x, y), 1, 5.0)
    assert info.ok.tolist() == [True, False]
    assert torch.equal(after.params["hidden.0.weight"][1], start.params["hidden.0.weight"])
    whole, _ = hat.update(start, (x[0], y[0]), 1, 5.0)
    step = whole.params["hidden.0.weight"] - start.params["hidden.0.weight"]
    half = after.params["hidden.0.weight"][0] - start.params["hidden.0.weight"]
    torch.testing.assert_close(half, step / 2)


def test_init_is_a_function_of_the_seed() -> None:
    hat = learner(ConvNet(), torch.randn(2, 1, 6, 6))
    before = torch.get_rng_state()
    assert equal(hat.init(3), hat.init(3))
    assert equal(hat.init(3, fresh=True), hat.init(3, fresh=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not equal(hat.init(3).embeddings, hat.init(4).embeddings)
    assert equal(hat.init(3).params, hat.init(4).params)
    assert not equal(hat.init(3, fresh=True).params, hat.init(4, fresh=True).params)


def test_per_task_values_do_not_share_storage() -> None:
    state = learner(ConvNet(), torch.randn(2, 1, 6, 6)).init(0)
    for leaf in optree.tree_leaves((state.task_params, state.task_buffers, state.embeddings)):
        assert leaf.is_contiguous(), "an expanded leaf would be one storage for all tasks"


def test_a_hundred_tasks_and_one() -> None:
    x = torch.randn(4, 5)
    for tasks in (1, 100):
        hat = learner(MLP(5, 2, width=128), x, classes=[2] * tasks, init="sparse")
        state, last = hat.init(0), tasks - 1
        state = learn(hat, state, x, 0)
        logits = hat.forward(state, x, 0)
        if tasks > 1:
            state = learn(hat, state, x, last)
        assert torch.equal(hat.forward(state, x, 0), logits)
        assert hat.predict(state, x).shape[0] == min(tasks, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(8, 5, dtype=dtype)
    hat = learner(MLP(5, 3, width=16).to(dtype), x)
    state = learn(hat, hat.init(0), x, 0)
    logits = hat.forward(state, x, 0)
    state = learn(hat, state, x, 1)
    assert logits.dtype == dtype
    assert torch.equal(hat.forward(state, x, 0), logits)
    verify_no_forgetting(hat, state, x)


def test_verify_no_forgetting_can_fail() -> None:
    """A learner whose wiring calls a needed weight unprotected is caught, and the weight is named."""
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = learn(hat, hat.init(0), x, 0)
    wrong = hat.wiring.params["hidden.1.weight"]
    flipped = wrong._replace(into=Units(wrong.into.index.flip(1)))
    params = dict(hat.wiring.params) | {"hidden.1.weight": flipped}
    wiring = replace(hat.wiring, params=params)
    broken = replace(hat, network=hat.network._replace(wiring=wiring))
    with pytest.raises(AssertionError, match=r"hidden\.1\.weight by"):
        verify_no_forgetting(broken, state, x)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_can_be_differentiated_through(optimizer: str) -> None:
    """The derivative of a loss after two steps by a setting, against finite differences."""
    smooth = {  # adam's root has no derivative at 0 without eps_root
        "sgd": torchopt.sgd(0.1, momentum=0.9, weight_decay=5e-4),
        "adam": torchopt.adam(1e-2, eps_root=1e-10),
    }
    x, y = torch.randn(8, 5).double(), torch.randint(2, (8,))
    hat = learner(MLP(5, 3, width=16).double(), x, optimizer=smooth[optimizer])
    start = learn(hat, hat.init(0), x, 0)
    start = hat.begin(start, 1)

    def after(sparsity: Tensor) -> Tensor:
        state = start._replace(hyper=start.hyper | {"sparsity": sparsity.expand(3)})
        for scale in (2.0, 4.0):
            state, _ = hat.update(state, (x, y), 1, scale)
        return nn.functional.cross_entropy(hat.forward(state, x, 1, scale=4.0), y)

    at, step = torch.tensor(0.5).double(), 1e-5
    slope = (after(at + step) - after(at - step)) / (2 * step)
    assert slope.abs() > 1e-8
    torch.testing.assert_close(torch.func.grad(after)(at), slope, rtol=1e-4, atol=1e-9)
    tracked = at.clone().requires_grad_()
    (plain,) = torch.autograd.grad(after(tracked), tracked)
    torch.testing.assert_close(plain, slope, rtol=1e-4, atol=1e-9)
