"""An exported task gives the learner's logits without hatfn."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from exported import NETS, called, setting, small, storages, tensors
from nets import ConvNet, equal, learn, masked, mlp
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import hatfn

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


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
