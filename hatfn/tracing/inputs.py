"""The inputs that a module is traced with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hatfn.numerics.arguments import Inputs, Signature, named_leaves, signature


class Call(NamedTuple):
    """The call of a module that is traced; ``args`` and ``kwargs`` are new copies each time.

    Attributes:
        signature: the signature of the module.
        inputs: the inputs, (B, ...) with B >= 2.
    """

    signature: Signature
    inputs: Inputs

    @property
    def args(self) -> tuple[Any, ...]:
        """Copies of the positional arguments."""
        return self._copies()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Copies of the keyword arguments."""
        return self._copies()[1]

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.inputs.device

    def __str__(self) -> str:
        """The shapes of the inputs, as a part of a sentence."""
        batched, fixed = iter(self.inputs.batched), iter(self.inputs.fixed)
        values = {leaf: next(batched if leaf.batched else fixed) for leaf in self.signature.leaves}
        if len(values) == 1 and self.signature.structure is None:
            return f"an input of shape {tuple(self.inputs.batched[0].shape)}"
        shapes = (f"{leaf.path} {tuple(value.shape)}" for leaf, value in values.items())
        return f"inputs of shapes {', '.join(shapes)}"

    def _copies(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        copies = Inputs(*(tuple(value.clone() for value in part) for part in self.inputs))
        return self.signature.arguments(copies)


def checked_call(where: str, x: Any, unbatched: Sequence[str] = ()) -> Call:
    """The call to trace a module with, after checks; a single sample is repeated.

    With a batch of one, an operator that mixes samples could not be told from one that mixes features.

    Args:
        where: the function that was called.
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        unbatched: the paths of inputs that do not lead with the samples.

    Raises:
        TypeError: ``x`` is something else, or one of its leaves is not a tensor.
        ValueError: there is no leaf; numbers of samples differ; ``unbatched`` has an unknown path.
    """
    if not isinstance(x, Tensor | tuple | list | dict):
        raise TypeError(
            f"{where}: x is a {type(x).__name__}. Expected a tensor, a tuple of positional arguments "
            f"or a dict of keyword arguments: torch.zeros(1, 3, 32, 32)."
        )
    if isinstance(x, tuple | list) and x and all(isinstance(size, int) for size in x):
        raise TypeError(
            f"{where}: x={x} is a {type(x).__name__} of numbers. Expected a tensor of that shape: "
            f"torch.zeros({', '.join(map(str, x))})."
        )
    leaves = named_leaves(x)
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{where}: {path} is a {type(leaf).__name__}. Expected a tensor: torch.as_tensor(...)."
                f" Store a value that is the same for every call in the module."
            )
    if unknown := [path for path in unbatched if path not in leaves]:
        raise ValueError(
            f"{where}: unbatched names {unknown[0]!r}, which is no input. Expected some of "
            f"{', '.join(leaves) or 'none'}."
        )
    counts = {path: leaf.shape[:1] for path, leaf in leaves.items() if path not in unbatched}
    if not counts or len({*counts.values()}) > 1 or () in counts.values():
        shapes = ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in leaves.items()) or "nothing"
        raise ValueError(
            f"{where}: the inputs are {shapes}. Expected inputs that lead with the samples, as many in "
            f"each. Name an input that does not: {where}(module, x, unbatched=[...])."
        )
    found = signature(x, unbatched)
    inputs = found.inputs(leaves)
    if inputs.samples == 1:
        inputs = inputs.map(lambda value: torch.cat([value, value]))
    return Call(found, inputs)
