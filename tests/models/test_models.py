"""The small-image ResNets: as timm makes them, with its own way to pretrained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchopt
from safetensors.torch import save_file
from timm.models.resnet import ResNet

import hatfn
import hatfn.models


@pytest.mark.parametrize("name", ["resnet18s", "resnet34s", "resnet50_small"])
def test_the_stem_keeps_the_size_of_small_images(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=7)
        x = torch.empty(2, 3, 32, 32)
        assert module.eval()(x).shape == (2, 7)
        assert module.forward_features(x).shape[-2:] == (4, 4)
    assert type(module) is ResNet, "nothing of hatfn's is needed to load it"
    assert module.get_classifier() is module.fc


def test_residual_branches_are_not_born_off() -> None:
    module = timm.create_model("resnet18s")
    hat = hatfn.build(module, hatfn.trace(module, torch.zeros(1, 3, 32, 32)), [2], torchopt.sgd(0.1))
    last = [f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3, 4) for block in (0, 1)]
    for state in (hat.init(0), hat.init(0, fresh=True)):  # a fresh start draws as the module draws
        assert all((state.task_params[name] == 1).all() for name in last)
    zero = timm.create_model("resnet18s", zero_init_last=True)
    assert not zero.layer1[0].bn2.weight.any(), "timm's own, for who wants it"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18s.safetensors"
    save_file(timm.create_model("resnet18s").state_dict(), path)
    return path


def test_pretrained_weights_come_by_timms_own_path(checkpoint: Path) -> None:
    saved = timm.create_model("resnet18s", checkpoint_path=str(checkpoint)).state_dict()
    module = timm.create_model(
        "resnet18s", pretrained=True, num_classes=4, pretrained_cfg_overlay={"file": str(checkpoint)}
    )
    weights = module.state_dict()
    for name, tensor in saved.items():
        if not name.startswith("fc."):  # timm drops a classifier of another width
            assert torch.equal(weights[name], tensor), name
    x = torch.randn(2, 3, 32, 32)
    hat = hatfn.build(module, hatfn.trace(module, x), [4, 4], torchopt.sgd(0.1))
    state = hat.init(seed=0)
    assert torch.equal(state.params["layer1.0.conv1.weight"], saved["layer1.0.conv1.weight"])
    assert torch.equal(state.task_buffers["bn1.running_var"][1], saved["bn1.running_var"])


def test_pretrained_without_weights_says_so() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("resnet18s", pretrained=True)
