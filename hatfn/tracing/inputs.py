"""The inputs that a module is traced with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hatfn.numerics.arguments import Inputs, Signature, named_leaves, signature


class Call(NamedTuple):
    """The arguments of a call of a module, and where it computes; each call gets copies.

    Attributes:
        signature: of the module.
        inputs: (B, ...), B >= 2.
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
        """Where it computes."""
        return self.inputs.device

    def __str__(self) -> str:
        """The inputs' shapes, in words."""
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
    """The call that a module is traced with, of two samples at least.

    With one sample, what mixes samples would look like what mixes features.

    Args:
        where: the function that was called.
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        unbatched: paths of what does not lead with the samples.

    Raises:
        TypeError: something else, or a leaf that is no tensor.
        ValueError: no leaf, different numbers of samples, an unknown path.
    """
    if not isinstance(x, Tensor | tuple | list | dict):
        raise TypeError(
            f"{where}: x is a {type(x).__name__}. Expected a tensor, a tuple of positional arguments "
            f"or a dict of keyword arguments: torch.zeros(1, 3, 32, 32)."
        )
    leaves = named_leaves(x)
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{where}: {path} is a {type(leaf).__name__}. Expected a tensor: torch.as_tensor(...)."
                f" What is the same for every call belongs into the module."
            )
    if odd := [path for path in unbatched if path not in leaves]:
        raise ValueError(
            f"{where}: unbatched names {odd[0]!r}, which is no input. Expected some of "
            f"{', '.join(leaves) or 'none'}."
        )
    counts = {path: leaf.shape[:1] for path, leaf in leaves.items() if path not in unbatched}
    if not counts or len({*counts.values()}) > 1 or () in counts.values():
        said = ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in leaves.items()) or "nothing"
        raise ValueError(
            f"{where}: the inputs are {said}. Expected the samples in front of each, as many in all. "
            f"Name what does not lead with samples: {where}(module, x, unbatched=[...])."
        )
    found = signature(x, unbatched)
    inputs = found.inputs(leaves)
    if inputs.samples == 1:
        inputs = inputs.map(lambda value: torch.cat([value, value]))
    return Call(found, inputs)
