"""One step of one task: what it moves, what it leaves alone, and when it is refused."""

from __future__ import annotations

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, equal, learn, learner, mlp, moved
from torch import Tensor, nn

from hatfn.models import MLP

# Learners this small use up their units; test_silent.py has the warnings that say so.
pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


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
    if poison != "huge gradient":
        assert moved(state, hat.update(state, (x, y), 1, scale=50.0)[0]), "it is the poison"
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


def test_a_module_that_writes_into_its_input_leaves_the_callers_alone() -> None:
    module = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(5, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)
    )
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    kept = x.clone()
    hat = learner(module, x, head="3")
    begun = hat.begin(hat.init(0), 1)
    state, info = hat.update(begun, (x, y), 1, 5.0)
    assert moved(begun, state)
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
    frozen = {"conv1.weight": module.conv1.weight, "norm1.bias": module.norm1.bias}
    assert not frozen.keys() & {*state.params, *state.task_params}, "kept once, in the network"
    assert equal(hat.network.untrained, {name: p.detach() for name, p in frozen.items()})
    assert hat.network.wiring.params["conv1.weight"].out_units is not None
    assert not torch.equal(state.params["conv2.weight"], start.params["conv2.weight"])
    assert not torch.equal(state.task_params["norm1.weight"], start.task_params["norm1.weight"])


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
    assert step.any()


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
