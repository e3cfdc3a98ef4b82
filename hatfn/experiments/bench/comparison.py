"""What ``hatfn bench`` compares: several ways to do the same work, and the optimizers of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torchopt
from torch import nn

from hatfn.engine.optimizer import Optimizer
from hatfn.engine.torch_optim import from_torch
from hatfn.experiments.bench.timing import Contender
from hatfn.state import HATState

SCALE = 50.0
"""The mask scale of the training steps."""

BATCHES = 8
"""The batches that training steps cycle through; with a single one, gradients become subnormal."""


class Target(NamedTuple):
    """The target of a ratio.

    Attributes:
        bound: the number.
        least: True if the ratio should be at least the number, False if at most.
    """

    bound: float
    least: bool = False

    def met(self, ratio: float) -> bool:
        """Whether a ratio meets the target."""
        return ratio >= self.bound if self.least else ratio <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.least else '<='} {self.bound:.2f}"


class Comparison(NamedTuple):
    """Several ways to do the same work; all are compared with the first one.

    Attributes:
        model: the name of the case.
        what: the work.
        optimizer: the optimizer of the learner, or empty.
        contenders: the ways to do the work; the first is the reference.
        targets: {name of a contender: the target of its ratio}.
        throughput: whether the ratio compares throughputs (the reference's time is the numerator)
            instead of times.
        state: the state of a learner whose memory gets a row, or None.
        plain: the optimizer of the reference, or empty.
    """

    model: str
    what: str
    optimizer: str
    contenders: list[Contender]
    targets: Mapping[str, Target]
    throughput: bool = False
    state: HATState | None = None
    plain: str = ""


class Pair(NamedTuple):
    """The same optimizer, for a learner and for plain torch.

    Attributes:
        name: the name of both.
        pure: makes a pair of pure functions.
        plain: makes an optimizer of torch from parameters.
        compiles: whether the functions are made of operators alone.
    """

    name: str
    pure: Callable[[], Optimizer]
    plain: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    compiles: bool


def _sgd(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


OPTIMIZERS = {
    "torchopt.sgd, momentum 0.9": Pair("SGD", lambda: torchopt.sgd(0.01, momentum=0.9), _sgd, True),
    "torch.optim.SGD, momentum 0.9, fused": Pair(
        "SGD", lambda: from_torch(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True), _sgd, False
    ),
    "torchopt.adam": Pair("Adam", lambda: torchopt.adam(1e-3), _adam, True),
    "torch.optim.Adam, fused": Pair(
        "Adam", lambda: from_torch(torch.optim.Adam, lr=1e-3, fused=True), _adam, False
    ),
}
"""The optimizers of the training steps, by the name of the learner's optimizer in the table."""
