"""Every rule on a module of a few lines, perturbed; and the eight architectures of the promise."""

from __future__ import annotations

import pytest
import timm
import torch
from layer_cases import LAYERS
from torch import nn
from value_cases import VALUES
from weight_cases import WEIGHTS

import hatfn
from hatfn.models import MLP, AlexNet
from hatfn.testing import verify_wiring

RULES = LAYERS | VALUES | WEIGHTS


@pytest.mark.parametrize("name", RULES)
def test_rule_is_sound(name: str) -> None:
    module, x, head = RULES[name]
    if isinstance(x, tuple):  # a graph: nodes, and edges between all of them
        wiring = hatfn.trace(module, x, head=head, unbatched=["1"])
    else:
        wiring = hatfn.trace(module, x[:1], head=head)
    seen = verify_wiring(module, wiring, x)
    assert not seen.untested
    assert wiring.groups, "a trace that gates nothing proves nothing"


SHARED = [
    "tied weights", "a module used twice", "an lstm of two layers in both directions", "two steps of a gru",
    "einsum into, in and out of heads", "a matrix that is repeated for each sample",
]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_what_can_be_shared_is_shared(name: str) -> None:
    module, x, head = RULES[name]
    kinds = {role.kind for role in hatfn.trace(module, x[:1], head=head).params.values()}
    assert kinds == {"shared", "head"}


@pytest.mark.parametrize(
    "name",
    ["padding for a maximum", "unfold and fold", "a sum of two paths", "attention with one head of values",
     "einsum", "written into zeros", "addmm", "the largest of some places", "the larger of two",
     "positions that are resized", "two steps of a gru", "two steps of an lstm",
     "a matrix on the left of units", "a matrix that is repeated for each sample", "a spectrum and back"],
)  # fmt: skip
def test_units_reach_the_layer_behind(name: str) -> None:
    module, x, head = RULES[name]
    assert hatfn.trace(module, x, head=head).params["b.weight"].in_units is not None


def test_one_number_for_all_channels_is_gated_channel_by_channel() -> None:
    module, x, head = RULES["add: one number to all channels"]
    wiring = hatfn.trace(module, x, head=head)
    assert wiring.params["b.weight"].in_units.group == "a"
    assert wiring.params["shift"].out_units.index.shape == (8, 1, 1)


def test_no_group_of_one_unit_is_made_of_a_scalar() -> None:
    module, x, head = RULES["a temperature"]
    assert dict(hatfn.trace(module, x, head=head).groups) == {"a": 8}


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(), nn.CELU(), nn.SELU(),
    nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.Tanh(), nn.Hardtanh(), nn.Hardtanh(1, 6), nn.ReLU6(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Softplus(), nn.Softsign(), nn.Mish(), nn.LogSigmoid(),
    nn.Tanhshrink(), nn.Hardshrink(), nn.Softshrink(), nn.Threshold(0.1, 0.0), nn.Threshold(0.1, 2.0),
    nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.GLU(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Identity(),
]  # fmt: skip
KEEPS_ZERO = {
    "ReLU", "GELU", "SiLU", "ELU", "CELU", "SELU", "LeakyReLU", "PReLU", "RReLU", "Tanh", "ReLU6",
    "Hardswish", "Softsign", "Mish", "Tanhshrink", "Hardshrink", "Softshrink", "Dropout", "AlphaDropout",
    "GLU", "Identity",
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activation_keeps_units_only_if_it_keeps_zero(activation: nn.Module) -> None:
    width = 4 if isinstance(activation, nn.GLU) else 8
    module = nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(2, 5)
    wiring = hatfn.trace(module, x, head="4")
    verify_wiring(module, wiring, x)
    keeps = type(activation).__name__ in KEEPS_ZERO
    if isinstance(activation, nn.Hardtanh | nn.Threshold):
        keeps = bool(activation(torch.zeros(1)) == 0)
    assert (wiring.params["2.weight"].in_units is not None) == keeps


ARCHITECTURES = {
    "mlp": (lambda: MLP(64, 10), (64,)),
    "alexnet": (lambda: AlexNet(10, width=0.5), (3, 32, 32)),
    "resnet18": (lambda: timm.create_model("resnet18"), (3, 64, 64)),
    "resnet50": (lambda: timm.create_model("resnet50"), (3, 64, 64)),
    "vit_tiny_patch16_224": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), (3, 64, 64),
    ),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), (3, 64, 64)),
    "densenet121": (lambda: timm.create_model("densenet121"), (3, 64, 64)),
    "mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), (3, 64, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_sound_and_well_traced(name: str) -> None:
    make, shape = ARCHITECTURES[name]
    module, x = make(), torch.randn(2, *shape)
    wiring = hatfn.trace(module, x[:1])
    assert not verify_wiring(module, wiring, x).untested
    measures = wiring.measures
    assert wiring.heads
    assert measures.shared >= 0.95
    assert measures.pair_gated >= 0.90
    assert measures.protected <= 0.30
    assert not wiring.fallbacks
