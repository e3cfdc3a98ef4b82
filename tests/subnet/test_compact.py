"""A compact subnetwork gives the masked network's outputs, is smaller, and owes nothing to dead weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import optree
import pytest
import timm
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ConvNet, Recurrent, Transformer, equal, learner, mlp
from timm.models.densenet import DenseNet
from torch import Tensor, nn
from torch.func import functional_call

import hatfn
from hatfn.models import MLP, AlexNet
from hatfn.network.probe import lively
from hatfn.numerics.trees import take
from hatfn.state import HATState
from hatfn.subnet import trials

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


class Tied(nn.Module):
    """One layer used twice, and a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))
        return self.head(torch.relu(x)), x.sum(1)


class TwoHeads(nn.Module):
    """Two classifiers on two concatenated streams; one reads both, without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 10)
        self.head, self.other = nn.Linear(16, 3, bias=False), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        return {"both": self.head(torch.cat([a, b], 1)), "one": self.other(b)}


class WithInput(nn.Module):
    """An ungated input beside gated units, and one number that is added to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shift, self.head = nn.Linear(5, 12), nn.Parameter(torch.ones(1)), nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, torch.relu(self.fc(x) + self.shift)], 1))


class HeadSplit(nn.Module):
    """Two heads of whatever width, whose softmax a wrong slice passes without an error."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.fc, self.mid, self.head = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        nn.init.constant_(self.fc.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        x = (x.reshape(len(x), 2, -1).softmax(-1) * x.reshape(len(x), 2, -1)).flatten(1)
        return self.head(torch.relu(self.mid(x)))


class Convolutions(nn.Module):
    """Transposed and three-dimensional ones, instance norm, a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv3d(2, 8, 2, 2), nn.InstanceNorm3d(8, affine=True)
        self.up, self.deep = nn.ConvTranspose3d(8, 6, 2, 2), nn.Conv3d(6, 10, 1)
        self.each, self.head = nn.Conv3d(10, 10, 1, groups=10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.deep(torch.relu(self.up(torch.relu(self.norm(self.down(x)))))))
        return self.head(torch.relu(self.each(x)).mean((2, 3, 4)))


class Words(nn.Module):
    """Integers in."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(7, 12), nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.table(x))).mean(1))


class Frozen(nn.Module):
    """A norm that stays in eval mode: its statistics are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def dense() -> nn.Module:
    return DenseNet(growth_rate=8, block_config=(2, 2), num_classes=3, bn_size=2)


def tiny(name: str) -> tuple[Callable[[], nn.Module], Callable[[], Tensor]]:
    return lambda: timm.create_model(name, num_classes=3), lambda: torch.randn(2, 3, 160, 160)


IMAGES = lambda: torch.randn(2, 3, 32, 32)  # noqa: E731
VECTORS = lambda: torch.randn(4, 5)  # noqa: E731
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], bool]] = {
    # name: module, input, what trace is told, whether the module itself takes the numbers
    "mlp": (lambda: MLP(5, 3, width=16), VECTORS, {}, True),
    "alexnet": (lambda: AlexNet(3, width=0.1), IMAGES, {}, True),
    "conv net": (ConvNet, lambda: torch.randn(4, 1, 6, 6), {}, True),
    "resnet18s": (lambda: timm.create_model("resnet18s", num_classes=3), IMAGES, {}, True),
    "densenet": (dense, IMAGES, {}, True),
    "transformer": (Transformer, lambda: torch.randn(4, 4, 5), {}, True),
    "lstm": (Recurrent, lambda: torch.randn(4, 6, 5), {}, True),
    "vit": (*tiny("test_vit"), {}, True),
    "convnext": (*tiny("test_convnext"), {}, True),
    "efficientnet": (*tiny("test_efficientnet"), {}, True),
    "standardised weights": (*tiny("test_nfnet"), {}, True),
    "input gate": (mlp, VECTORS, {"head": "4", "input_gate": True}, False),
    "a head behind": (
        lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()),
        VECTORS, {"output_gate": True}, False),
    "a head behind open features": (
        lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8)), VECTORS, {}, False),
    "a layer used twice": (Tied, VECTORS, {"head": "head"}, True),
    "two heads": (TwoHeads, VECTORS, {"head": ("head", "other")}, True),
    "an ungated input": (WithInput, VECTORS, {"head": "head"}, True),
    "convolutions": (Convolutions, lambda: torch.randn(2, 2, 4, 4, 4), {"head": "head"}, True),
    "integers": (Words, lambda: torch.randint(7, (3, 4)), {"head": "head"}, True),
    "a frozen norm": (Frozen, lambda: torch.randn(2, 1, 6, 6), {"head": "head"}, True),
    "a split into heads": (HeadSplit, VECTORS, {"head": "head"}, True),
}  # fmt: skip


@cache
def setting(name: str) -> tuple[nn.Module, Tensor, hatfn.HAT]:
    torch.manual_seed(0)
    make, inputs, told, _ = NETS[name]
    module, x = make(), inputs()
    wiring = hatfn.trace(module, x[:1], **told)
    return module, x, hatfn.build(module, wiring, [3, 2, 5], torchopt.sgd(0.1))


def masked(hat: hatfn.HAT, density: float, seed: int = 0) -> HATState:
    """Every task learned, with random gates and with numbers under which every layer has a say."""
    generator = torch.Generator().manual_seed(seed)
    state = hat.init(0)

    def drawn(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        tasks = [lively(take(tree, task), generator) for task in range(hat.tasks)]
        return {name: torch.stack([task[name] for task in tasks]) for name in tree}

    masks = {g: torch.rand(m.shape, generator=generator) < density for g, m in state.masks.items()}
    return state._replace(
        params=lively(state.params, generator),
        task_params=drawn(state.task_params),
        task_buffers=drawn(state.task_buffers),
        masks=masks,
        learned=torch.ones_like(state.learned),
    )


def assert_close(output: Any, expected: Any) -> None:
    pairs = zip(optree.tree_leaves(output), optree.tree_leaves(expected), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_a_subnetwork_gives_the_outputs_of_the_masked_network(name: str) -> None:
    module, x, hat = setting(name)
    state = masked(hat, 0.4)
    small = hat.compact(state, 2, x if name == "integers" else None)
    expected = hat.forward(state, x, 2)
    assert_close(small(x), expected)
    assert_close(small(x[:1]), hat.forward(state, x[:1], 2))
    if NETS[name][-1]:
        assert_close(functional_call(module.eval(), {**small.params, **small.buffers}, (x,)), expected)
    assert not small.report.empty or name == "a head behind open features"


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_the_masks_are(data: st.DataObject) -> None:
    quick = ["mlp", "conv net", "densenet", "transformer", "input gate", "a head behind", "a layer used twice",
             "two heads", "an ungated input", "convolutions", "a split into heads", "a frozen norm"]  # fmt: skip
    _, x, hat = setting(data.draw(st.sampled_from(quick)))
    task = data.draw(st.integers(0, 2))
    state = masked(hat, data.draw(st.sampled_from([0.1, 0.5, 0.9])), data.draw(st.integers(0, 9)))
    for group, units in hat.wiring.groups.items():
        ids = torch.arange(units)
        override = {
            "random": state.masks[group],
            "off": (ids < 0).expand(3, -1),
            "one": (ids == data.draw(st.integers(0, units - 1))).expand(3, -1),
            "on": (ids >= 0).expand(3, -1),
        }[data.draw(st.sampled_from(["random", "random", "off", "one", "on"]))]
        state = state._replace(masks=state.masks | {group: override})
    small = hat.compact(state, task)
    assert_close(small(x), hat.forward(state, x, task))
    report = small.report
    assert (report.kept >= 1).all()
    assert (report.kept >= report.used).all()
    assert (report.kept[report.became != "sliced"] == report.units[report.became != "sliced"]).all()
    sliced = report[report.became == "sliced"]
    assert (sliced.kept == sliced.used.clip(lower=1)).all()


def test_a_residual_network_at_a_fifth_of_its_units_is_a_tenth_of_its_size() -> None:
    module, _, hat = setting("resnet18s")
    small = hat.compact(masked(hat, 0.2), 2)
    assert (small.report.became == "sliced").all()
    assert small.sizes[1] <= 0.1 * small.sizes[0]
    assert small.sizes[1] == sum(value.numel() for value in small.params.values())
    whole = sum(p.numel() for p in module.parameters())
    assert small.sizes[0] == whole + 2 * (512 + 1), "the task has 5 classes, the module 3"
    stem = small.report.kept["conv1"]
    assert small.params["conv1.weight"].shape == (stem, 3, 3, 3)
    assert small.buffers["bn1.running_var"].shape == (stem,)
    last = hat.wiring.params["fc.weight"].in_units.group
    assert small.params["fc.weight"].shape == (5, small.report.kept[last])


def test_of_a_transformer_the_hidden_layers_shrink_and_the_report_says_what_stayed() -> None:
    _, _, hat = setting("vit")
    report = hat.compact(masked(hat, 0.3), 0).report
    became = report.became
    assert became["patch_embed.proj"] == "whole", "the stream: layer norms fix its width"
    assert (became[became.index.str.endswith("attn.qkv")] == "whole").all()
    assert (became[became.index.str.endswith("mlp.fc1")] == "sliced").all()
    assert report.kept["blocks.0.mlp.fc1"] == report.used["blocks.0.mlp.fc1"]
    assert report.kept["patch_embed.proj"] == report.units["patch_embed.proj"]


def test_heads_are_cut_on_both_sides() -> None:
    _, _, hat = setting("two heads")
    state = masked(hat, 0.5)
    small = hat.compact(state, 1)
    used = {group: int(mask[1].sum()) for group, mask in state.masks.items()}
    assert small.params["head.weight"].shape == (2, used["a"] + used["b"])
    assert small.params["other.weight"].shape == (2, used["b"])
    _, _, hat = setting("a head behind")
    state = masked(hat, 0.5)
    assert hat.compact(state, 1).params["head.weight"].shape == (2, int(state.masks["2"][1].sum()))


@pytest.mark.parametrize("junk", [1e38, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv net", "resnet18s", "vit", "input gate", "convolutions"])
def test_what_lies_in_unprotected_weights_does_not_matter(name: str, junk: float) -> None:
    _, x, hat = setting(name)
    state = hat.begin(masked(hat, 0.4), 0, locked=[1])
    expected = hat.compact(state, 1)
    spoiled = {n: torch.where(state.protection[n], p, junk) for n, p in state.params.items()}
    small = hat.compact(state._replace(params=spoiled), 1)
    assert equal((small.params, small.buffers), (expected.params, expected.buffers))
    assert small.report.equals(expected.report)
    assert_close(small(x), hat.forward(state, x, 1))


@pytest.mark.parametrize("bias", [0.0, -100.0], ids=["alive", "dead"])
def test_a_slice_that_only_the_numbers_show_to_be_wrong_is_refused(bias: float) -> None:
    """With a large negative bias no random input passes the layer, and every slice would look right."""
    module = HeadSplit(bias)
    hat = learner(module, torch.randn(1, 5))
    state = hat.init(0)
    mask = torch.arange(16) % 8 < torch.tensor([[5], [5], [5]])
    uneven = torch.arange(16) < torch.tensor([[10], [10], [10]])
    for fc in (mask, uneven):
        masks = {"fc": fc, "mid": state.masks["mid"].logical_not()}
        learned = state._replace(masks=masks, learned=torch.ones_like(state.learned))
        small = hat.compact(learned, 0)
        assert small.report.became.to_dict() == {"fc": "whole", "mid": "full"}
        x = torch.randn(4, 5) * 1000
        assert_close(small(x), hat.forward(learned, x, 0))


def test_nothing_is_shared_with_what_training_may_change() -> None:
    module, x, hat = setting("conv net")
    state = masked(hat, 0.4)
    small = hat.compact(state, 1)
    before = small(x)
    functional_call(module.train(), {**small.params, **small.buffers}, (x,))  # moves statistics
    module.eval()
    assert torch.equal(hat.compact(state, 1)(x), before)


def test_trials_are_few() -> None:
    calls: list[int] = []

    def even(groups: Any) -> bool:
        calls.append(len(groups))
        return not any("qkv" in group for group in groups)

    groups = [f"blocks.{i}.{layer}" for i in range(12) for layer in ("qkv", "fc1")]
    found = trials._largest(even, groups)
    assert sorted(found) == sorted(group for group in groups if "fc1" in group)
    assert len(calls) <= 26


def test_a_module_that_will_not_agree_is_named() -> None:
    calls = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return self.head(torch.relu(self.fc(x))) * len(calls)

    hat = learner(Counting(), torch.randn(1, 5))
    with pytest.raises(RuntimeError, match=r"compact: .* two calls of it must agree"):
        hat.compact(masked(hat, 0.5), 0)


def test_what_a_module_keeps_from_one_call_to_the_next_stays_where_it_is() -> None:
    class Keeping(nn.Module):
        """As LeViT keeps its table of biases once it is in eval mode."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.table, self.kept = nn.Parameter(torch.randn(8)), {}

        def train(self, mode: bool = True) -> Keeping:
            self.kept = {} if mode else self.kept
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            table = self.table if self.training else self.kept.setdefault("table", self.table.exp())
            return self.head(torch.relu(self.fc(x) + table))

    x = torch.randn(4, 5)
    hat = learner(Keeping(), x)
    state = masked(hat, 0.5)
    first, second = hat.compact(state, 0), hat.compact(state, 2)
    assert not hat.network.evaluate.kept
    for _ in range(2):
        assert first(x).shape == (4, 3)
        assert_close(second(x), hat.forward(state, x, 2))
