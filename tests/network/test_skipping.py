"""Dead units are not computed, and nobody can tell but by the clock."""

from __future__ import annotations

import pytest
import torch
import torchopt
from architectures import ARCHITECTURES, build
from nets import ConvNet, Transformer, learn, learner, masked, mlp
from torch import Tensor, nn

import hatfn
from hatfn.models import MLP
from hatfn.network import skipping
from hatfn.network.call import call
from hatfn.numerics.arguments import Inputs
from hatfn.state import HATState

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks skip what large ones do."""
    monkeypatch.setattr(skipping, "SMALL", 0)
    monkeypatch.setattr(skipping, "WORTH", 0)


def drawn(hat: hatfn.HAT, share: float, seed: int = 0) -> HATState:
    """Every task learned, each with so many units on, more or less; norms that are not their start."""
    state, generator = hat.init(seed), torch.Generator().manual_seed(seed)

    def shaken(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: leaf * (0.5 + torch.rand(leaf.shape, generator=generator).to(leaf.dtype))
            if leaf.is_floating_point() else leaf
            for name, leaf in tree.items()
        }  # fmt: skip

    state = state._replace(
        embeddings={
            g: (share - torch.rand(e.shape, generator=generator)).to(e.dtype)
            for g, e in state.embeddings.items()
        },
        task_params=shaken(state.task_params),
        task_buffers=shaken(state.task_buffers),
    )
    for task in range(hat.tasks):
        state = hat.consolidate(state, task)
    return state


def handed(hat: hatfn.HAT, state: HATState, x: Tensor, task: int) -> dict[str, Tensor]:
    """What layers are handed for a task."""
    masks = {group: mask[task][None] for group, mask in state.masks.items()}
    params = {**state.params, **{n: leaf[task][None] for n, leaf in state.task_params.items()}}
    skippable, wiring = hat.network.skippable, hat.network.wiring
    plan = skipping.planned(skippable, wiring, masks, len(x))
    skips = skipping.skipped(skippable, wiring, params, plan)
    return {**skips.params, **skips.hooks}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_gives_what_it_gives_under_its_gates(kind: str, share: float) -> None:
    hat, x = build(kind, [4, 3], torch.float64)
    state = drawn(hat, share)
    together = hat.predict(state, x)
    for task, classes in enumerate(hat.classes):
        assert handed(hat, state, x, task)
        expected = masked(hat, state, x, task)
        close = {"rtol": 1e-9, "atol": 1e-9 * expected.abs().max().item()}
        torch.testing.assert_close(hat.forward(state, x, task), expected, **close)
        torch.testing.assert_close(together[task, :, :classes], expected, **close)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("make", "shape"), [(ConvNet, (1, 6, 6)), (Transformer, (4, 5)), (mlp, (5,))])
def test_what_is_dead_is_not_read(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    hat = learner(make(), x, head="4" if make is mlp else "head")
    state = drawn(hat, 0.5)
    for task in range(3):
        used = hat.begin(state, (task + 1) % 3, locked=[task]).protection
        wiped = {n: torch.where(used[n], p, torch.nan) for n, p in state.params.items()}
        layers = [
            n for layer in hat.network.skippable.layers.values() for n in layer.params if n in used
        ]
        spoiled = state._replace(params={**state.params, **{n: wiped[n] for n in layers}})
        assert any(wiped[name].isnan().any() for name in layers)
        assert torch.equal(hat.forward(spoiled, x, task), hat.forward(state, x, task))
        torch.testing.assert_close(hat.predict(spoiled, x, [task]), hat.predict(state, x, [task]))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("make", "shape"), [(ConvNet, (1, 6, 6)), (Transformer, (4, 5)), (mlp, (5,))])
def test_learned_tasks_stay_equal_to_the_bit(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    head = "4" if make is mlp else "head"
    hat = learner(make(), x, head=head, optimizer=torchopt.adamw(1e-2, weight_decay=0.1))
    state = learn(hat, hat.init(0), x, 0)
    logits = hat.forward(state, x, 0)
    for task in (1, 2):
        state = learn(hat, state, x, task, carry=task == 2)
        assert torch.equal(hat.forward(state, x, 0), logits)


@pytest.mark.usefixtures("everywhere")
def test_it_can_be_differentiated_and_batched() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    hat = learner(mlp(), x, head="4")
    state = drawn(hat, 0.5)
    slope = torch.func.grad(lambda x: hat.forward(state, x, 0).square().sum())(x)
    dense = torch.func.grad(lambda x: masked_with_grad(hat, state, x, 0).square().sum())(x)
    torch.testing.assert_close(slope, dense)
    stacked = torch.func.vmap(lambda x: hat.forward(state, x[None], 0)[0])(x)
    torch.testing.assert_close(stacked, hat.forward(state, x, 0))
    many, states = hatfn.Replicas(hat), hatfn.stack([state, drawn(hat, 0.7, seed=1)])
    both = many.forward(states, x, 0, shared=True)  # masks that cannot be read: everything is computed
    for i, one in enumerate(both):
        torch.testing.assert_close(one, hat.forward(hatfn.replica(states, i), x, 0))


def masked_with_grad(hat: hatfn.HAT, state: HATState, x: Tensor, task: int) -> Tensor:
    own = {n: leaf[task] for n, leaf in state.task_params.items()}
    own = {n: p[: hat.classes[task]] if n in hat.network.heads else p for n, p in own.items()}
    masks = {group: mask[task] for group, mask in state.masks.items()}
    return call(hat.network, hat.network.evaluate, {**state.params, **own}, {}, masks, Inputs((x,)))[0]


def test_only_where_it_pays() -> None:
    hat = learner(MLP(784, 3), torch.randn(1, 784))
    sparse, full = drawn(hat, 0.2), drawn(hat, 1.1)
    many, one = torch.randn(64, 784), torch.randn(1, 784)
    assert {"hidden.0.weight", "hidden.1.weight"} <= handed(hat, sparse, many, 0).keys()
    assert not handed(hat, sparse, one, 0), "weights are moved for a single sample"
    assert not handed(hat, full, many, 0), "nothing is dead"
    narrow = handed(hat, sparse, many, 0)["hidden.1.weight"][0]
    live = [int(sparse.masks[group][0].sum()) for group in ("hidden.1", "hidden.0")]
    assert narrow.shape == tuple(live), "the head reads these rows alone: nothing is widened"
    wide = handed(learner(watched(MLP(784, 3)), many), sparse, many, 0)["hidden.1.weight"][0]
    assert wide.shape == (live[0] + 1, live[1]), "a row of zeros stands for all that are dead"


def watched(module: MLP) -> MLP:
    """A module of which somebody looks at what a layer returns."""
    module.hidden[0].register_forward_hook(lambda layer, args, out: None)
    return module


class Reads(nn.Module):
    """What each layer makes is read by another in another way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        if self.way == "two readers":
            return self.head(torch.relu(self.b(a.relu()) + self.c(torch.nn.functional.gelu(a))))
        if self.way == "a residual stream":
            return self.head(torch.relu(a + self.b(a.relu())))
        if self.way == "not zero":
            return self.head(self.c(self.b(torch.relu(a) + 1).relu()).relu())
        return self.head(self.c(self.b(a.relu()).flip(-1)).relu())  # moved


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("way", "readers"),
    [
        ("two readers", {"a": ("b", "c"), "b": (), "c": ()}),
        ("a residual stream", {"a": (), "b": ()}),
        ("not zero", {"a": (), "b": ("c",), "c": ("head",)}),
        ("moved", {"a": ("b",), "b": (), "c": ("head",)}),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_only_who_reads_just_that_is_handed_it_narrow(
    way: str, readers: dict[str, tuple[str, ...]], share: float
) -> None:
    """Also where tasks have unequal numbers of units on, or none."""
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    hat = learner(Reads(way), x)
    found = {path: hat.wiring.layers[path].readers for path in readers}
    assert found == readers
    for seed in range(3):
        state = drawn(hat, share, seed)
        together = hat.predict(state, x)
        for task, classes in enumerate(hat.classes):
            expected = masked(hat, state, x, task)
            torch.testing.assert_close(hat.forward(state, x, task), expected)
            torch.testing.assert_close(together[task, :, :classes], expected)


class Odd(nn.Module):
    """Layers that nobody may hand another weight: a forward of its own, groups, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.grouped, self.plain = (
            Shouting(8, 8),
            nn.Conv1d(8, 8, 1, groups=2),
            nn.Linear(8, 8),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.own(x).relu()[..., None]).relu()[..., 0]
        return self.head(self.plain(x).relu())


class Shouting(nn.Linear):
    """Looks at its input before it is multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.in_features
        return super().forward(x)


@pytest.mark.usefixtures("everywhere")
def test_layers_of_which_more_is_known_to_nobody_are_left_alone() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(4, 8), Odd()
    seen: list[torch.Size] = []
    module.plain.register_forward_hook(lambda layer, args, out: seen.append(out.shape))
    hat = learner(module, x)
    assert set(hat.network.skippable.layers) == {"plain", "head"}
    state = drawn(hat, 0.5)
    assert handed(hat, state, x, 0)
    torch.testing.assert_close(hat.forward(state, x, 0), masked(hat, state, x, 0))
    assert {shape[-1] for shape in seen} == {8}, "the user's hooks see what the layer always returned"
