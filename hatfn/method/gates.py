"""Gates: from task embeddings to unit activations, soft in training and binary in serving."""

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
        scale: mask scale s >= 0; the larger it is, the closer gates are to binary. At 0 every gate
            is 1/2.
        gate_fn: the function that replaces the sigmoid.

    Raises:
        TypeError, ValueError: ``scale`` is not a number, or is negative.

    Example:
        >>> gate(torch.tensor([-1.0, 0.0, 1.0]), 400.0)
        tensor([0.0000, 0.5000, 1.0000])

    Source:
        Serrà et al. 2018, equation 1.
    """
    check_real("gate", "scale", scale, lambda s: s >= 0, "of at least 0: a negative one inverts masks")
    return gate_fn(scale * embedding)


def hard_gate(embedding: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """The binary gate e > 0: the limit of :func:`gate` at infinite scale.

    Example:
        >>> hard_gate(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([False, False,  True])
    """
    return embedding > 0


def flush(gates: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Set gates that are too small to matter to zero; their gradients stay the same.

    A gate below eps^2 changes no sum of numbers near one, but its products are subnormal numbers,
    and a CPU multiplies matrices of subnormal numbers several times more slowly.
    """
    small = gates < torch.finfo(gates.dtype).eps ** 2
    return gates - torch.where(small, gates, 0).detach()


def initial_embeddings(
    init: Init, tasks: int, units: int, generator: torch.Generator
) -> Float[Tensor, " units"]:
    """One task's embeddings before training.

    "normal" draws from N(0, 1), as the first paper does: half of the units start on. "dense" is 1:
    all units start on. "sparse" draws from N(Phi^-1(1/T), 1): a unit starts on with probability 1/T,
    so on average it starts on for one of the T tasks. This p = 1/T maximises p (1 - p)^(T - 1), the
    probability that a unit starts on for one given task and for no other.

    Args:
        init: the name of the distribution.
        tasks: T, the number of tasks.
        units: U, the number of units.
        generator: a CPU generator; the global one is not used.

    Source:
        Serrà et al. 2018, section 2.2 (normal); Duan 2023, section 3 (dense, sparse).
    """
    if init == "dense":
        return torch.ones(units)
    mean = 0.0
    if init == "sparse":  # for a single task, 1/T = 1 would give an infinite mean
        share = torch.tensor(min(1 / tasks, 0.98), dtype=torch.float64)
        mean = float(torch.special.ndtri(share))
    return torch.randn(units, generator=generator) + mean
