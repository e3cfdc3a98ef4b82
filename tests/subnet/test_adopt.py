"""A learner starts from the numbers of any module of its architecture."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
import torchopt
from exported import called, setting, storages, tensors
from nets import equal, learn, masked
from torch import nn

import hatfn

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


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
