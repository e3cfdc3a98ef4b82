"""States of modules that differ only in what they compute: each is for its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import ConvNet, equal, learn, learner
from torch import Tensor, nn

import hatfn

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def feedforward(act: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16), act, nn.Dropout(0.5), nn.Linear(16, 16), act, nn.Linear(16, 3)
    )


def convolved(**how: Any) -> nn.Module:
    module = ConvNet()
    module.conv2 = nn.Conv2d(8, 8, 3, **how)
    return module


class Scaled(nn.Module):
    """What it multiplies by is neither a parameter nor a buffer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.head = torch.full((5,), factor), nn.Linear(16, 3)
        self.body, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(x * self.factor))))


def attention(heads: int) -> nn.Module:
    return timm.create_model("test_vit", img_size=32, num_classes=3, num_heads=heads)


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...], str]] = {
    "activation": (lambda: feedforward(nn.ReLU()), lambda: feedforward(nn.Tanh()), (8, 5), "5"),
    "dilation": (
        partial(convolved, padding=1),
        partial(convolved, padding=2, dilation=2),
        (8, 1, 6, 6),
        "head",
    ),
    "heads": (lambda: attention(2), lambda: attention(1), (2, 3, 32, 32), "head"),
    "a constant": (lambda: Scaled(1.0), lambda: Scaled(2.0), (8, 5), "head"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_a_module_that_computes_something_else_is_refused(name: str, tmp_path: Path) -> None:
    """Though its parameters have the same names and shapes, and the same units feed them."""
    make, another, shape, head = OTHERS[name]
    x = torch.randn(shape)
    hat, other = (learner(module(), x, head) for module in (make, another))
    assert hat.wiring == other.wiring
    state = learn(hat, hat.init(0), x, 0, steps=1)
    hatfn.save(tmp_path / "s", state, hat)
    logits = hat.forward(state, x, 0)
    assert not torch.allclose(other.forward(state, x, 0), logits), "what would come of it"
    for reader in (other, other.wiring):
        with pytest.raises(hatfn.CheckpointError, match="that computes something else"):
            hatfn.load(tmp_path / "s", reader)
    again = learner(make(), x, head)
    assert torch.equal(again.forward(hatfn.load(tmp_path / "s", again), x, 0), logits)


def test_what_is_not_served_may_differ(tmp_path: Path) -> None:
    """Another rate of dropout, another size of input; a wiring by hand says nothing of computing."""
    x = torch.randn(8, 5)
    hat = learner(feedforward(nn.ReLU()), x, "5")
    state = hat.init(0)
    hatfn.save(tmp_path / "s", state, hat)
    calm = feedforward(nn.ReLU())
    calm[2].p = 0.1
    other = learner(feedforward(nn.Tanh()), x, "5").network
    for wiring in (
        hatfn.trace(calm, x[:1], head="5"),
        hatfn.trace(nn.Sequential(*feedforward(nn.ReLU())).train(), x.repeat(3, 1), head="5"),
        replace(other.wiring, computed=None),
        replace(other.wiring, computed=other.wiring.computed._replace(under="torch 3.0")),
    ):
        assert equal(hatfn.load(tmp_path / "s", wiring), state._replace(opt_state=()))
