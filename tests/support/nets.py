"""Small modules and learners that several test files use."""

from __future__ import annotations

from typing import Any

import optree
import timm
import torch
import torchopt
from hypothesis import settings
from torch import Tensor, nn

import hatfn
from hatfn.models import MLP, AlexNet
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.trees import take
from hatfn.state import HATState
from hatfn.subnet.slicing import numbers, run


def mlp(features: int = 5, classes: int = 3, width: int = 16) -> nn.Sequential:
    """A network with two hidden layers; its classifier is called 4."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


class Fn(nn.Module):
    """A module made of named layers, and a function of the module and x."""

    def __init__(self, forward, **layers) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class ConvNet(nn.Module):
    """A residual block with batch norm: per-task norms and running statistics."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """One pre-norm block over tokens with learned positions."""

    def __init__(self, features: int = 5, width: int = 8, tokens: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """An LSTM read at its last step, which vmap cannot batch."""

    def __init__(self, features: int = 5, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, width, batch_first=True), nn.Linear(width, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


MODULES = {
    "mlp": (lambda: MLP(5, 3, width=16), lambda: torch.randn(4, 5)),
    "alexnet": (lambda: AlexNet(3, width=0.1), lambda: torch.randn(4, 3, 32, 32)),
    "conv net": (ConvNet, lambda: torch.randn(4, 1, 6, 6)),
    "transformer": (Transformer, lambda: torch.randn(4, 4, 5)),
    "resnet18s": (
        lambda: timm.create_model("resnet18s", num_classes=3),
        lambda: torch.randn(2, 3, 32, 32),
    ),
    "lstm": (Recurrent, lambda: torch.randn(4, 6, 5)),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3),
        lambda: torch.randn(2, 3, 32, 32),
    ),
}
"""Modules of every kind, with their inputs."""


def learner(module: nn.Module, x: Tensor, head: str = "head", **settings: Any) -> hatfn.HAT:
    """A learner of three tasks with 3, 2 and 3 classes by default."""
    settings = {"classes": [3, 2, 3], "optimizer": torchopt.sgd(0.1, momentum=0.9)} | settings
    return hatfn.build(module, hatfn.trace(module, x[:1], head=head), **settings)


def learn(
    hat: hatfn.HAT, state: HATState, x: Tensor, task: int, steps: int = 4, **begin: Any
) -> HATState:
    """Train a task on random labels for a few steps and consolidate it."""
    classes = hat.classes[task] if hat.classes else 1
    y = torch.randint(classes, (len(x),), generator=torch.Generator().manual_seed(task))
    begun = state = hat.begin(state, task, **begin)
    for step in range(steps):
        state, info = hat.update(state, (x, y), task, scale=20.0 * (step + 1))
        assert info.ok
    assert moved(begun, state), "nothing was learned, so nothing that follows is proven"
    return hat.consolidate(state, task, [])


def moved(before: HATState, after: HATState) -> bool:
    """Whether training has changed any number that it trains."""
    return not equal(*((s.params, s.task_params, s.embeddings) for s in (before, after)))


def outputs(hat: hatfn.HAT, state: HATState, x: Tensor, *tasks: int) -> list[Tensor]:
    """The outputs of some tasks, as they are served."""
    return [hat.forward(state, x, task) for task in tasks]


def examples(count: int) -> settings:
    """Set the number of examples of a law; ``--examples`` multiplies it."""
    return settings(max_examples=max(1, count * settings.default.max_examples // 100))


def masked(hat: hatfn.HAT, state: HATState, x: Tensor, task: int) -> Tensor:
    """The output of a learned task when all units are computed and then gated, none skipped."""
    with torch.no_grad():
        return run(
            hat.network, numbers(hat.network, state, task), Inputs((x,)), gates=take(state.masks, task)
        )


def near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether numbers agree to about half of their digits, relative to the largest.

    This compares two ways to compute the same thing that may round at every layer. In double precision
    the comparison is close; in narrow types it only tells wrong results from rounded ones.
    """
    largest = max(theirs.abs().max().item(), 1e-6)
    return (ours - theirs).abs().max().item() <= 3 * torch.finfo(theirs.dtype).eps ** 0.5 * largest


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same to the bit."""
    pairs = zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def image(channels: int = 2, size: int = 8) -> Tensor:
    """A batch of two images."""
    return torch.randn(2, channels, size, size)
