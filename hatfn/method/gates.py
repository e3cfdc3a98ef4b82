"""Gates: from task embeddings to unit activations, soft while training and binary when served."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hatfn.checks.values import check_real
from hatfn.method.names import Init


def gate(
    embedding: Float[Tensor, "*shape"],
    scale: float | Tensor,
    gate_fn: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Float[Tensor, "*shape"]:
    """The soft gate a = sigmoid(s * e), in [0, 1].

    Args:
        embedding: task embedding e, any shape.
        scale: mask scale s >= 0; the larger, the closer to binary. At 0 every gate is 1/2.
        gate_fn: the function in the place of the sigmoid.

    Raises:
        TypeError, ValueError: a scale that is no number, or negative.

    Example:
        >>> gate(torch.tensor([-1.0, 0.0, 1.0]), 400.0)
        tensor([0.0000, 0.5000, 1.0000])

    Source:
        Serrà et al. 2018, equation 1.
    """
    check_real("gate", "scale", scale, lambda s: s >= 0, "of at least 0: below it masks invert")
    return gate_fn(scale * embedding)


def hard_gate(embedding: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """The binary gate e > 0: the limit of :func:`gate` at infinite scale.

    Example:
        >>> hard_gate(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([False, False,  True])
    """
    return embedding > 0


def flush(gates: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Gates with those too small to matter set to zero, gradients as they were.

    A gate below eps^2 moves no sum of numbers near one, but its products are subnormal, and a CPU
    multiplies matrices of subnormal numbers several times more slowly.
    """
    small = gates < torch.finfo(gates.dtype).eps ** 2
    return gates - torch.where(small, gates, 0).detach()


def initial_embeddings(
    init: Init, tasks: int, units: int, generator: torch.Generator
) -> Float[Tensor, " units"]:
    """One task's embeddings before training.

    "normal" is N(0, 1), the first paper's: half of the units start on. "dense" is 1: all start on.
    "sparse" is N(Phi^-1(1/T), 1): a unit starts on with probability 1/T, so that one of the T tasks
    claims it on average; this p = 1/T maximises p (1 - p)^(T - 1), the chance that a given task
    alone does.

    Args:
        init: which.
        tasks: T.
        units: U.
        generator: a CPU generator; the global one is not touched.

    Source:
        Serrà et al. 2018, section 2.2 (normal); Duan 2023, section 3 (dense, sparse).
    """
    if init == "dense":
        return torch.ones(units)
    mean = 0.0
    if init == "sparse":  # a single task would start at infinity
        share = torch.tensor(min(1 / tasks, 0.98), dtype=torch.float64)
        mean = float(torch.special.ndtri(share))
    return torch.randn(units, generator=generator) + mean
