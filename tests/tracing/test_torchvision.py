"""The classifiers of torchvision's families, found without their names."""

from __future__ import annotations

import pytest
import torch
import torchvision

import hatfn
from hatfn.tracing.graph import _export
from hatfn.tracing.heads import last_heads
from hatfn.tracing.inputs import checked_call

HEADS = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "regnet_y_400mf": "fc",
    "resnet18": "fc",
    "resnext50_32x4d": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "swin_v2_t": "head",
    "vgg11": "classifier.6",
    "vit_b_16": "heads.head",
    "wide_resnet50_2": "fc",
}
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_b_16": 224}
SETTINGS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


@pytest.mark.parametrize("name", HEADS)
def test_the_classifier_is_found(name: str) -> None:
    size = SIZES.get(name, 64)
    with torch.device("cpu" if name == "regnet_y_400mf" else "meta"):  # regnet draws by copying
        module = torchvision.models.get_model(name, **SETTINGS.get(name, {}))
    module.to("meta")
    call = checked_call("trace", torch.zeros(2, 3, size, size, device="meta"))
    (head,) = last_heads(_export(module, call), module)
    assert head.weight == f"{HEADS[name]}.weight"


def test_it_is_the_head_of_the_wiring() -> None:
    module = torchvision.models.resnet18(num_classes=7)
    wiring = hatfn.trace(module, torch.randn(2, 3, 32, 32))
    assert wiring.heads == (("fc.weight", "fc.bias"),)
    assert wiring.measures.shared > 0.99
    assert wiring.headless.heads == ()
    none = hatfn.trace(module, torch.randn(2, 3, 32, 32), head=False)
    assert none.heads == ()
    assert none.fingerprint == wiring.headless.fingerprint


def test_probabilities_are_refused_with_the_lines_to_write() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3), torch.nn.Softmax(-1)
    )
    with pytest.raises(ValueError, match=r"ends in the layer '2' and softmax.*head='2'.*head=False"):
        hatfn.trace(module, torch.randn(1, 4))
    assert hatfn.trace(module, torch.randn(1, 4), head="2").heads[0].weight == "2.weight"
