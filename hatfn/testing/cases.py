"""Small modules that are built from plain data, which can be printed, hashed and copied into a test."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
import torchopt
from torch import Tensor, nn

from hatfn.builder import build
from hatfn.checks.capacity import HATWarning
from hatfn.engine.optimizer import Optimizer
from hatfn.learner import HAT
from hatfn.network.probe import lively
from hatfn.numerics.seeds import seeded
from hatfn.numerics.trees import take
from hatfn.state import HATState
from hatfn.tracing import trace
from hatfn.wiring import Wiring

Family = Literal["mlp", "conv", "attention"]
Kind = Literal["plain", "residual", "concat", "grouped", "depthwise", "attention"]
Norm = Literal["none", "batch", "layer", "group"]

KINDS: dict[Family, tuple[Kind, ...]] = {
    "mlp": ("plain", "residual", "concat"),
    "conv": ("plain", "residual", "concat", "grouped", "depthwise"),
    "attention": ("residual", "attention"),
}
"""The kinds of blocks in each family, simplest first."""

NORMS: dict[Family, tuple[Norm, ...]] = {
    "mlp": ("none", "batch", "layer", "group"),
    "conv": ("none", "batch", "layer", "group"),
    "attention": ("none", "layer"),
}
"""The norms in each family, simplest first."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
}
"""Activations by name; all but the last keep a zero."""

OPTIMIZERS: Mapping[str, Callable[[], Optimizer]] = {
    "sgd": partial(torchopt.sgd, 0.1),
    "momentum": partial(torchopt.sgd, 0.1, momentum=0.9),
    "decay": partial(torchopt.sgd, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": partial(torchopt.adam, 1e-2),
    "adamw": partial(torchopt.adamw, 1e-2, weight_decay=0.1),
}
"""Optimizers by name; the last ones also move weights that have no gradient."""

_INPUTS: dict[Family, tuple[int, ...]] = {"mlp": (5,), "conv": (2, 6, 6), "attention": (4, 5)}
_CLASSES = 3


class Block(NamedTuple):
    """One block of a module.

    Attributes:
        kind: how the layer's result f(x) is used: "plain" f(x), "residual" x + f(x), "concat"
            [x, f(x)]. "grouped" and "depthwise" are plain with such convolutions; "attention" is
            residual with two heads.
        width: units of a plain or concatenated layer, even; other layers keep the width of their input.
        norm: the norm after the layer; in the family "attention", before it.
        activation: a name in :data:`ACTIVATIONS`.
        bias: whether the layer has one.
    """

    kind: Kind = "plain"
    width: int = 4
    norm: Norm = "none"
    activation: str = "relu"
    bias: bool = True


@dataclass(frozen=True)
class Case:
    """A module, an input to trace it with, and the name of its classifier.

    Attributes:
        family: the family of layers: linear, convolutions on images, or attention over tokens.
        blocks: the blocks between a stem and the classifier, "head".
        width: units of the stem, even.
        seed: the seed of weights and input.
        dtype: the type of weights and input.

    Example:
        >>> Case("mlp", ())
        Case(family='mlp', blocks=(), width=4, seed=0, dtype=torch.float32)
        >>> case = Case("conv", (Block("residual", norm="batch"),))
        >>> case.module(case.x).shape, dict(case.wiring.groups)
        (torch.Size([3, 3]), {'stem': 4})
    """

    family: Family
    blocks: tuple[Block, ...]
    width: int = 4
    seed: int = 0
    dtype: torch.dtype = torch.float32
    head = "head"

    @cached_property
    def module(self) -> nn.Module:
        """The module, in eval mode; PyTorch's random state does not change."""
        with seeded("cpu", self.seed):
            return _Net(self.family, self.blocks, self.width).to(self.dtype).eval()

    @cached_property
    def x(self) -> Tensor:
        """(3, ...), an input."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(3, *_INPUTS[self.family], generator=generator).to(self.dtype)

    @property
    def wiring(self) -> Wiring:
        """The traced wiring; it is the same for any seed, so it is traced only once."""
        return _traced(Case(self.family, self.blocks, self.width, 0, self.dtype))


@lru_cache(maxsize=256)
def _traced(case: Case) -> Wiring:
    return trace(case.module, case.x[:1], head=case.head)


class _Net(nn.Module):
    """A stem, blocks, and a classifier on the mean over positions."""

    def __init__(self, family: Family, blocks: Sequence[Block], width: int) -> None:
        super().__init__()
        shape = _INPUTS[family]
        self.stem = _layer(family, shape[0] if family == "conv" else shape[-1], width)
        tokens = family == "attention"
        self.position = nn.Parameter(torch.randn(shape[0], width)) if tokens else None
        self.blocks = nn.Sequential()
        for block in blocks:
            layer = _Block(family, block, width)
            self.blocks.append(layer)
            width = layer.width
        self.positions = {"mlp": None, "conv": (2, 3), "attention": (1,)}[family]
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.blocks(x if self.position is None else x + self.position)
        mean = x if self.positions is None else x.mean(self.positions)
        return self.head(mean)  # type: ignore[no-any-return]


class _Block(nn.Module):
    """The module of a :class:`Block`; ``width`` is the number of units that it returns."""

    def __init__(self, family: Family, block: Block, width: int) -> None:
        super().__init__()
        kind, wide = block.kind, block.width
        keeps_width = kind in ("residual", "grouped", "depthwise", "attention")
        activation = ACTIVATIONS[block.activation]()
        if family == "attention":
            norm = _norm(family, block.norm, width)
            mixing = nn.Sequential(
                nn.Linear(width, wide, block.bias), activation, nn.Linear(wide, width)
            )
            body = [norm, _Attention(width, block.bias) if kind == "attention" else mixing]
        else:
            out = width if keeps_width else wide
            groups = {"grouped": 2, "depthwise": width}.get(kind, 1)
            layer = _layer(family, width, out, block.bias, groups)
            body = [layer, _norm(family, block.norm, out), activation]
        self.body, self.kind = nn.Sequential(*body), kind
        self.width = width if keeps_width else wide + width * (kind == "concat")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.kind in ("residual", "attention"):
            return x + y
        return torch.cat([x, y], 1) if self.kind == "concat" else y


class _Attention(nn.Module):
    """Self-attention with two heads."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def _layer(family: Family, into: int, out: int, bias: bool = True, groups: int = 1) -> nn.Module:
    if family == "conv":
        return nn.Conv2d(into, out, 3, padding=1, groups=groups, bias=bias)
    return nn.Linear(into, out, bias)


def _norm(family: Family, norm: Norm, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width) if family == "conv" else nn.BatchNorm1d(width)
    if norm == "layer":
        return nn.GroupNorm(1, width) if family == "conv" else nn.LayerNorm(width)
    return nn.GroupNorm(2, width) if norm == "group" else nn.Identity()


def learner(case: Case, classes: Sequence[int], optimizer: str, **settings: Any) -> HAT:
    """A learner of a case's module.

    Args:
        case: the case.
        classes: the number of classes of each task.
        optimizer: a name in :data:`OPTIMIZERS`.
        settings: arguments of :func:`hatfn.build`.
    """
    with quiet():
        return build(case.module, case.wiring, classes, OPTIMIZERS[optimizer](), **settings)


def random_embeddings(
    wiring: Wiring, tasks: int, dtype: torch.dtype, size: float, seed: int
) -> dict[str, Tensor]:
    """{group: (tasks, U)} in [-6, 6]: normal numbers, but an eighth of them are edge cases."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.tensor([0.0, 6.0, -6.0, 1e-6, -1e-6])

    def draw(units: int) -> Tensor:
        normal = (torch.randn(tasks, units, generator=generator) * size).clamp(-6, 6)
        edge = edges[torch.randint(len(edges), normal.shape, generator=generator)]
        return torch.where(torch.rand(normal.shape, generator=generator) < 1 / 8, edge, normal).to(
            dtype
        )

    return {group: draw(units) for group, units in wiring.groups.items()}


def random_masks(wiring: Wiring, tasks: int, density: float, seed: int) -> dict[str, Tensor]:
    """{group: (tasks, U)} bool, each unit on with probability ``density``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group: torch.rand(tasks, units, generator=generator) < density
        for group, units in wiring.groups.items()
    }


def random_state(
    hat: HAT, learned: Sequence[int], opened: int | None, size: float, seed: int
) -> HATState:
    """A state with random numbers in all leaves, with learned tasks and perhaps an open one.

    Args:
        hat: the learner.
        learned: the learned tasks, in this order.
        opened: the open task, or None. If it is one of the learned tasks, it is not learned any more.
        size: the size of the embeddings, see :func:`random_embeddings`.
        seed: the seed of all numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    state = hat.init(seed)

    def lively_rows(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = [lively(take(tree, task), generator) for task in range(hat.tasks)]
        return {name: torch.stack([row[name] for row in rows]) for name in tree}

    kind = next((e.dtype for e in state.embeddings.values()), torch.float32)
    state = state._replace(
        params=lively(state.params, generator),
        task_params=lively_rows(state.task_params),
        task_buffers=lively_rows(state.task_buffers),
        embeddings=random_embeddings(hat.wiring, hat.tasks, kind, size, seed),
    )
    with quiet():
        for task in learned:
            state = hat.consolidate(hat.begin(state, task), task)
        return state if opened is None else hat.begin(state, opened)


def random_batch(hat: HAT, task: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """x (B, ...) of the module's dtype, and y: labels (B,) of the task, or numbers without classes."""
    generator = torch.Generator().manual_seed(seed)
    weight = next(iter(hat.network.initial.values()))
    x = torch.randn(size, *hat.wiring.input_shape, generator=generator).to(weight)
    if hat.classes is None:
        return x, torch.randn(size, *hat.wiring.output_shape, generator=generator).to(weight)
    return x, torch.randint(hat.classes[task], (size,), generator=generator).to(weight.device)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings about small networks, whose groups are soon used up or switched off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HATWarning)
        yield
