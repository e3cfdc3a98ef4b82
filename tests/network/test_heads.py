"""Heads of every kind, and modules that return more than one tensor."""

from __future__ import annotations

import pytest
import timm
import torch
import torchopt
from nets import learn
from torch import Tensor, nn

import hatfn
from hatfn.tracing.heads import named_heads

KINDS = {
    "linear": ("test_vit", {}, ["head"]),
    "a convolution": ("test_efficientnet", {"num_classes": 0}, []),
    "two in a tuple": ("deit_tiny_distilled_patch16_224", {}, ["head", "head_dist"]),
    "two in a list": ("crossvit_tiny_240", {}, ["head.0", "head.1"]),
    "four in a list": ("efficientvim_m1", {}, [f"heads.{i}" for i in range(4)]),
    "wrapped": ("cpubone_nano", {}, ["head.classifier.linear"]),
    "wrapped behind a norm": ("levit_128s", {}, ["head.linear", "head_dist.linear"]),
    "an auxiliary one": ("volo_d1_224", {}, ["aux_head", "head"]),
    "inside a head of its own": ("convnext_atto", {}, ["head.fc"]),
    "none": ("test_resnet", {"num_classes": 0}, []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_timm_classifiers_are_found(kind: str) -> None:
    name, settings, expected = KINDS[kind]
    with torch.device("meta"):
        module = timm.create_model(name, **settings)
    assert sorted(head.weight for head in named_heads(module, None)) == sorted(
        f"{layer}.weight" for layer in expected
    )


class Distilled(nn.Module):
    """Two heads: a tuple in train mode, their mean in eval mode, as DeiT's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.head_dist = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        a, b = self.head(x), self.head_dist(x)
        return (a, b) if self.training else (a + b) / 2


class Two(Distilled):
    """Two outputs in every mode."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return self.head(x), self.head_dist(x)


@pytest.mark.parametrize("cls", [Distilled, Two])
def test_several_outputs_train_and_are_kept(cls: type[nn.Module]) -> None:
    module, x = cls(), torch.randn(8, 5)
    hat = hatfn.build(module, hatfn.trace(module, x), [4, 3], torchopt.adam(1e-2))
    state = hat.begin(hat.init(seed=0), 0)
    state, info = hat.update(state, (x, torch.randint(4, (8,))), 0, 10.0)
    assert [tuple(out.shape) for out in info.logits] == [(8, 4), (8, 4)]
    state = learn(hat, state, x, 0)
    before = hat.forward(state, x, 0)
    state = learn(hat, state, x, 1)
    after = hat.forward(state, x, 0)
    everything = hat.predict(state, x)
    if cls is Distilled:
        before, after, everything = (before,), (after,), (everything,)
    for old, new, rows in zip(before, after, everything, strict=True):
        assert torch.equal(old, new)
        assert rows.shape == (2, 8, 4)
        assert torch.allclose(rows[0], new, atol=1e-5)
        assert (rows[1, :, 3] == -torch.inf).all()


def test_both_heads_of_a_distilled_module_learn() -> None:
    module, x = Distilled(), torch.randn(8, 5)
    hat = hatfn.build(module, hatfn.trace(module, x), [4], torchopt.sgd(0.1))
    start = hat.begin(hat.init(seed=0), 0)
    state, _ = hat.update(start, (x, torch.randint(4, (8,))), 0, 10.0)
    for name in ("head.weight", "head_dist.weight"):
        assert not torch.equal(state.task_params[name], start.task_params[name])


def test_a_head_cannot_be_put_behind_several_outputs() -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    module, x = Headless(), torch.randn(8, 5)
    hat = hatfn.build(module, hatfn.trace(module, x), [4], torchopt.sgd(0.1))
    with pytest.raises(ValueError, match="returns a tuple, behind which no classifier can be put"):
        hat.update(hat.begin(hat.init(seed=0), 0), (x, torch.randint(4, (8,))), 0, 10.0)
