"""An exported task gives the learner's logits without hatfn; a learner starts from any module's numbers."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import optree
import pytest
import timm
import torch
import torchopt
from nets import ConvNet, Recurrent, Transformer, equal, learn, masked, mlp
from safetensors.torch import load_model, save_model
from timm.models.densenet import DenseNet
from timm.models.levit import Levit
from torch import Tensor, nn

import hatfn
from hatfn.models import MLP, AlexNet
from hatfn.state import HATState

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def small(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=3, **settings)


def encoder() -> nn.Module:
    """PyTorch's own layer, which has a fused path of its own in eval mode."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.Linear(5, 16), layer, nn.Flatten(), nn.Linear(64, 3))


def features(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), *last)


VECTORS, IMAGES = (4, 5), (4, 3, 64, 64)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    # name: module, input, what trace is told
    "mlp": (mlp, VECTORS, {"head": "4"}),
    "of ours": (partial(MLP, 5, 3, width=16, dropout=0.2), VECTORS, {}),
    "of ours, inside": (lambda: nn.Sequential(AlexNet(8, width=0.1), nn.ReLU(), nn.Linear(8, 3)),
                        (4, 3, 32, 32), {"head": "2"}),
    "conv net": (ConvNet, (4, 1, 6, 6), {}),
    "block": (Transformer, (4, 4, 5), {}),
    "encoder": (encoder, (4, 4, 5), {"head": "3"}),
    "lstm": (Recurrent, (4, 6, 5), {}),
    "resnet18s": (small("resnet18s", channels=(16, 24, 32, 48)), (4, 3, 8, 8), {}),
    "dense": (partial(DenseNet, growth_rate=8, block_config=(2, 2), num_classes=3, bn_size=2), IMAGES, {}),
    "depthwise": (small("test_convnext"), IMAGES, {}),
    "squeeze-excite": (small("test_efficientnet"), IMAGES, {}),
    "standardised weights": (small("test_nfnet"), IMAGES, {}),
    "vit": (small("test_vit", img_size=64), IMAGES, {}),
    "two heads": (
        small("deit_tiny_distilled_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2),
        IMAGES, {}),
    "remembers": (
        partial(Levit, img_size=32, num_classes=3, embed_dim=(16, 24), num_heads=(2, 2), depth=(1, 1),
                key_dim=8),
        (4, 3, 32, 32), {}),
    "input gate": (mlp, VECTORS, {"head": "4", "input_gate": True}),
    "a head behind": (partial(features, nn.ReLU()), VECTORS, {"output_gate": True}),
    "a head and an input gate": (features, VECTORS, {"input_gate": True}),
    "no classes": (features, VECTORS, {}),
}  # fmt: skip


@cache
def setting(name: str) -> tuple[hatfn.HAT, HATState, Tensor]:
    """A learner of two learned tasks of three, with different masks, and an input."""
    torch.manual_seed(0)
    make, shape, told = NETS[name]
    module, x = make(), torch.randn(shape)
    tasks: dict[str, Any] = {"classes": [3, 2, 5]}
    if name == "no classes":
        tasks = {"classes": None, "num_tasks": 3, "loss": lambda output, _: output.square().mean()}
    settings = {"optimizer": torchopt.adam(1e-2), "s_max": 80.0, "sparsity": 0.0} | tasks
    hat = hatfn.build(module, hatfn.trace(module, x[:1], **told), **settings)
    state = learn(hat, learn(hat, hat.init(0), x, 0, steps=2), x, 1, steps=2)
    assert any(not torch.equal(*mask[:2]) for mask in state.masks.values())
    return hat, state, x


def called(module: nn.Module, x: Tensor) -> Tensor:
    """As it is served. Where gradients are asked for, or weights say that they require them, PyTorch
    takes other kernels of attention and of products: equal to rounding."""
    flags = [param.requires_grad for param in module.parameters()]
    with torch.no_grad():
        output = module.requires_grad_(False)(x)
    for param, flag in zip(module.parameters(), flags, strict=True):
        param.requires_grad_(flag)
    return output


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves(tree)} - {0}


def pickled(module: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


@pytest.mark.parametrize("name", NETS)
def test_an_exported_task_gives_the_logits_of_the_learner_to_the_bit(name: str) -> None:
    hat, state, x = setting(name)
    first, second = hatfn.export(hat, state, 0), hatfn.export(hat, state, 1)
    for _ in range(2):  # what the module remembers of a call is its own task's
        for task, module in enumerate((first, second)):
            assert torch.equal(called(module, x), masked(hat, state, x, task))
            torch.testing.assert_close(called(module, x), hat.forward(state, x, task))
    width = 8 if name == "no classes" else 2
    assert called(second, x).shape == (len(x), width)
    assert not any(child.training for child in second.modules())
    assert all(type(param) is nn.Parameter and param.requires_grad for param in second.parameters())
    theirs = (state, hat.network.initial, hat.network.constants)
    assert not storages(tensors(second)) & storages(theirs)
    assert b"hatfn" not in pickled(second)
    assert (b"hatfn" in pickled(NETS[name][0]())) == ("of ours" in name), "the scan would find it"


@pytest.mark.parametrize("samples", [1, 500], ids=["gates on outputs", "gates on weights"])
def test_wherever_the_learner_puts_its_gates(samples: int) -> None:
    hat, state, _ = setting("mlp")
    x = torch.randn(samples, 5)
    assert torch.equal(called(hatfn.export(hat, state, 1), x), hat.forward(state, x, 1))


@pytest.mark.parametrize("name", NETS)
def test_a_compact_one_is_smaller(name: str) -> None:
    hat, state, x = setting(name)
    whole, compact = hatfn.export(hat, state, 1), hatfn.export(hat, state, 1, compact=True)
    expected = called(whole, x)
    assert (called(compact, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    sizes = [sum(param.numel() for param in module.parameters()) for module in (compact, whole)]
    sliced = (hat.compact(state, 1).report.became == "sliced").any()
    assert (sizes[0] < sizes[1]) == sliced
    assert sliced or name == "lstm"
    assert not storages(tensors(compact)) & storages(state)


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # PyTorch's, of these modules themselves
@pytest.mark.parametrize("name", NETS)
def test_torch_exports_it(name: str) -> None:
    hat, state, x = setting(name)
    module = hatfn.export(hat, state, 1)
    program = torch.export.export(module, (x,)).module()
    if name == "encoder":  # traced without its fused path
        torch.testing.assert_close(called(program, x), called(module, x))
    else:
        assert torch.equal(called(program, x), called(module, x))


LOADER = """
import sys
sys.modules["hatfn"] = None  # from now on its import fails
import torch
for path in sys.argv[1:]:
    module, x, y, threads = torch.load(path, weights_only=False)
    torch.set_num_threads(threads)
    with torch.no_grad():
        assert torch.equal(module.requires_grad_(False)(x), y), path
    print(type(module).__name__)
try:
    import hatfn
except ImportError:
    print("no hatfn")
"""


def test_it_is_loaded_where_there_is_no_hatfn(tmp_path: Path) -> None:
    names = ["mlp", "of ours", "resnet18s", "vit", "remembers", "a head and an input gate"]
    for name in names:
        hat, state, x = setting(name)
        module = hatfn.export(hat, state, 1)
        shipped = (module, x, masked(hat, state, x, 1), torch.get_num_threads())
        torch.save(shipped, tmp_path / name)
    command = [sys.executable, "-c", LOADER, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = [
        "Sequential",
        "GraphModule",
        "ResNet",
        "VisionTransformer",
        "Levit",
        "GraphModule",
        "no hatfn",
    ]
    assert done.stdout.split("\n")[:-1] == kinds


@pytest.mark.parametrize("make", [ConvNet, small("test_efficientnet")], ids=["conv net", "timm"])
def test_safetensors_carry_it_into_the_module_itself(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    hat, state, x = setting("conv net" if make is ConvNet else "squeeze-excite")
    save_model(hatfn.export(hat, state, 1), tmp_path / "task")
    plain = (make(2) if make is ConvNet else make(num_classes=2)).eval()
    assert not torch.allclose(called(plain, x), hat.forward(state, x, 1))
    load_model(plain, tmp_path / "task")
    assert torch.equal(called(plain, x), masked(hat, state, x, 1))


def test_training_it_changes_no_state() -> None:
    hat, state, x = setting("conv net")
    kept, module = copy.deepcopy(state), hatfn.export(hat, state, 1).train()
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(x).square().mean().backward()
    optimizer.step()
    for name in ("conv1.weight", "norm1.weight", "norm2.running_mean", "head.bias"):
        assert not torch.equal(module.state_dict()[name], before[name])
    assert equal(state, kept)


@pytest.mark.parametrize("name", ["conv net", "vit", "a head and an input gate"])
def test_what_lies_in_entries_that_are_off_does_not_matter(name: str) -> None:
    hat, state, _ = setting(name)
    held = hat.begin(state, 0, locked=[1]).protection
    spoiled = {n: torch.where(held[n], param, torch.inf) for n, param in state.params.items()}
    assert not equal(spoiled, state.params)
    for compact in (False, True):
        ours, theirs = (
            hatfn.export(hat, s, 1, compact) for s in (state, state._replace(params=spoiled))
        )
        assert equal(tensors(ours), tensors(theirs))


def test_an_input_that_is_off_may_be_anything() -> None:
    hat, state, x = setting("input gate")
    off = ~state.masks[hat.wiring.input.group][1]
    assert 0 < off.sum() < len(off)
    spoiled = torch.where(off, torch.nan, x)
    for compact in (False, True):
        module = hatfn.export(hat, state, 1, compact)
        assert torch.equal(called(module, spoiled), called(module, x))
    assert not called(hatfn.export(hat, state, 1), torch.where(off, x, torch.nan)).isfinite().any()


def doubled(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def halved(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] / 2


def test_hooks_of_the_users_stay_and_those_of_hatfn_go() -> None:
    module, x = mlp(), torch.randn(4, 5)
    module[1].register_forward_hook(doubled)
    module[2].register_forward_pre_hook(halved)
    hat = hatfn.build(module, hatfn.trace(module, x, head="4"), [3, 2], torchopt.sgd(0.1))
    assert set(hat.wiring.outputs) == {"0", "2"}, "layers that hatfn hooks"
    assert all(hat.network.evaluate[i]._forward_hooks for i in (0, 1, 2))
    state = learn(hat, hat.init(0), x, 1)
    exported = hatfn.export(hat, state, 1)
    assert [list(layer._forward_hooks.values()) for layer in exported] == [[], [doubled], [], [], []]
    assert list(exported[2]._forward_pre_hooks.values()) == [halved]
    assert not list(exported.buffers())
    assert torch.equal(called(exported, x), hat.forward(state, x, 1))
    exported[1]._forward_hooks.clear()
    assert not torch.allclose(called(exported, x), hat.forward(state, x, 1))


class Tied(nn.Module):
    """Two layers of one weight, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(5, 8)
        self.b.weight = self.a.weight
        self.c.weight.requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(torch.relu(self.c(x)))))))


def test_tied_weights_stay_tied_and_frozen_ones_frozen() -> None:
    module, x = Tied(), torch.randn(4, 5)
    hat = hatfn.build(module, hatfn.trace(module, x, head="head"), [3, 2], torchopt.sgd(0.1))
    state = learn(hat, hat.init(0), x, 1)
    exported = hatfn.export(hat, state, 1)
    assert exported.a.weight is exported.b.weight
    frozen = [name for name, param in exported.named_parameters() if not param.requires_grad]
    assert frozen == ["c.weight"]
    assert torch.equal(called(exported, x), hat.forward(state, x, 1))


class Widths(nn.Module):
    """Layers that keep their widths in attributes: grouped, transposed, with a learned slope."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(1, 8, 2, 2), nn.BatchNorm2d(8)
        self.up, self.slope = nn.ConvTranspose2d(8, 6, 2, 2), nn.PReLU(6)
        self.each, self.last = nn.Conv2d(6, 12, 1, groups=2), nn.Conv2d(12, 9, 1)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.up(torch.relu(self.norm(self.down(x)))))
        return self.head(torch.relu(self.last(self.each(x))).mean((2, 3)))


def test_attributes_tell_the_widths() -> None:
    module, x = Widths(), torch.randn(4, 1, 6, 6)
    hat = hatfn.build(module, hatfn.trace(module, x, head="head"), [3, 2], torchopt.sgd(0.1))
    net = hatfn.export(hat, learn(hat, hat.init(0), x, 1), 1, compact=True)
    kept = [net.down.weight.shape[0], net.last.weight.shape[0]]
    assert kept[0] < 8
    assert kept[1] < 9
    assert (net.down.in_channels, net.down.out_channels, net.norm.num_features) == (1, kept[0], kept[0])
    assert (net.up.in_channels, net.up.out_channels) == net.up.weight.shape[:2] == (kept[0], 6)
    assert net.slope.num_parameters == 6
    assert (net.each.in_channels, net.each.out_channels) == (6, 12), "groups fix them"
    assert (net.last.in_channels, net.last.out_channels) == (12, kept[1])
    assert (net.head.in_features, net.head.out_features) == (kept[1], 2)


def test_a_timm_model_knows_its_classifier() -> None:
    hat, state, x = setting("resnet18s")
    module = hatfn.export(hat, state, 1, compact=True)
    assert (module.num_classes, module.fc.out_features) == (2, 2)
    assert module.num_features == module.fc.in_features == module.fc.weight.shape[1] < 48
    module.reset_classifier(7)  # reads num_features
    assert called(module, x).shape == (4, 7)
    hat, state, _ = setting("two heads")
    module = hatfn.export(hat, state, 1)
    assert (module.num_classes, module.head.out_features, module.head_dist.out_features) == (2, 2, 2)


def test_integers_need_an_input_to_try_slices_on() -> None:
    words = nn.Sequential(
        nn.Embedding(7, 16), nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    x = torch.randint(7, (4, 2))
    hat = hatfn.build(words, hatfn.trace(words, x, head="4"), [3, 2], torchopt.sgd(0.1))
    state = learn(hat, hat.init(0), x, 1)
    with pytest.raises(ValueError, match="random numbers"):
        hatfn.export(hat, state, 1, compact=True)
    module = hatfn.export(hat, state, 1, compact=True, x=x)
    assert module[2].out_features == len(module[2].weight) < 12
    torch.testing.assert_close(called(module, x), hat.forward(state, x, 1))


# Another module's numbers.


def efficientnet(classes: int, seed: int) -> nn.Module:
    """With running statistics that are not those of a new module."""
    torch.manual_seed(seed)
    module = timm.create_model("test_efficientnet", num_classes=classes)
    for _ in range(2):
        called(module.train(), torch.randn(4, 3, 32, 32))
    return module


@cache
def images() -> hatfn.HAT:
    module = efficientnet(10, seed=0)
    wiring = hatfn.trace(module, torch.randn(1, 3, 64, 64))
    return hatfn.build(module, wiring, [10, 5], torchopt.adam(1e-3))


def test_a_learner_starts_from_pretrained_numbers() -> None:
    hat, pretrained = images(), efficientnet(1000, seed=1)
    kept, adopted = copy.deepcopy(pretrained.state_dict()), hatfn.adopt(hat, pretrained)
    old, new = hat.init(3), adopted.init(3)
    params, buffers = dict(pretrained.named_parameters()), dict(pretrained.named_buffers())
    for name, value in new.params.items():
        assert torch.equal(value, params[name])
    for tree, theirs in ((new.task_params, params), (new.task_buffers, buffers)):
        for name in tree.keys() - {*hat.network.heads}:
            assert torch.equal(tree[name], theirs[name].expand_as(tree[name]))
    assert not torch.equal(new.params["conv_stem.weight"], old.params["conv_stem.weight"])
    assert not torch.equal(new.task_buffers["bn1.running_mean"], old.task_buffers["bn1.running_mean"])
    assert equal(new.embeddings, old.embeddings)
    assert all(torch.equal(new.task_params[name], old.task_params[name]) for name in hat.network.heads)
    assert equal(pretrained.state_dict(), kept)
    assert not storages((new, adopted.network.initial)) & storages(tensors(pretrained))
    assert equal(hat.init(3), old), "the learner itself is what it was"
    x = torch.randn(4, 3, 64, 64)
    state = learn(adopted, new, x, 0, steps=1)
    assert torch.equal(called(hatfn.export(adopted, state, 0), x), masked(adopted, state, x, 0))


def test_a_head_of_equal_width_is_taken_over() -> None:
    pretrained = efficientnet(10, seed=1).double()  # to the learner's own type
    state = hatfn.adopt(images(), pretrained).init(0)
    weight = state.task_params["classifier.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight[0], pretrained.classifier.weight.float())
    assert not torch.equal(weight[1, :5], weight[0, :5])


@pytest.mark.parametrize(
    "name", ["conv net", "vit", "input gate", "a head behind", "a head and an input gate"]
)
def test_an_exported_module_is_adopted(name: str) -> None:
    hat, state, x = setting(name)
    exported = hatfn.export(hat, state, 0)
    adopted = hatfn.adopt(hat, exported)
    plain = adopted.forward(adopted.init(0), x, None)
    expected = exported.get_submodule(
        "body.body" if "and" in name else "body" if "behind" in name else ""
    )
    torch.testing.assert_close(plain, called(expected, x))
    assert not torch.allclose(plain, hat.forward(hat.init(0), x, None))
