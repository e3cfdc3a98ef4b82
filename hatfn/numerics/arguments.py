"""The inputs of a module: nested arguments, their signature and the paths of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ALONE = "x"
"""The path of an input that is one tensor."""


class Leaf(NamedTuple):
    """A tensor among the inputs of a module.

    Attributes:
        path: its name or number in the inputs, with dots if nested: "input_ids", "0", "graph.edges";
            "x" if the inputs are a single tensor.
        shape: its shape, without the batch dimension if it has one.
        dtype: its type of number.
        batched: whether its first axis counts the samples of a batch.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool = True


class Inputs(NamedTuple):
    """The inputs of one call, in the order of the :class:`Signature`.

    Attributes:
        batched: the tensors (B, ...) whose first axis counts samples.
        fixed: the tensors that all samples share, such as the edges of a graph.
    """

    batched: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()

    @property
    def samples(self) -> int:
        """B, the number of samples."""
        return len(self.batched[0])

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.batched[0].device

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Inputs with ``function`` applied to each batched tensor; fixed tensors stay the same."""
        return Inputs(tuple(map(function, self.batched)), self.fixed)


@dataclass(frozen=True, eq=False)
class Signature:
    """The arguments that a module takes.

    Attributes:
        leaves: the tensors, in the order of the structure.
        structure: the nesting of positional and keyword arguments; None: a single tensor.
    """

    leaves: tuple[Leaf, ...]
    structure: pytree.TreeSpec | None = None

    @property
    def batched(self) -> tuple[Leaf, ...]:
        """The leaves whose first axis counts samples."""
        return tuple(leaf for leaf in self.leaves if leaf.batched)

    def inputs(self, leaves: Mapping[str, Tensor]) -> Inputs:
        """The inputs, from {path: tensor}."""
        batched, fixed = (
            tuple(leaves[leaf.path] for leaf in self.leaves if leaf.batched is kind)
            for kind in (True, False)
        )
        return Inputs(batched, fixed)

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments for the module, from its inputs."""
        if self.structure is None:
            return inputs.batched, {}
        batched, fixed = iter(inputs.batched), iter(inputs.fixed)
        ordered = [next(batched if leaf.batched else fixed) for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(ordered, self.structure)
        return args, kwargs


def named_leaves(x: Any) -> dict[str, Any]:
    """{path: leaf} of a user's inputs, without arguments that are None."""
    if isinstance(x, Tensor):
        return {ALONE: x}
    pairs, _ = pytree.tree_flatten_with_path(_without_none(x))
    return {".".join(map(_step, path)): leaf for path, leaf in pairs}


def map_leaves(function: Callable[[str, Any], Any], x: Any) -> Any:
    """Inputs with each leaf replaced by ``function(path, leaf)``."""
    if isinstance(x, Tensor):
        return function(ALONE, x)
    return pytree.tree_map_with_path(
        lambda path, leaf: function(".".join(map(_step, path)), leaf), _without_none(x)
    )


def as_call(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments in a tensor, a tuple (positional) or a dict (keywords)."""
    x = _without_none(x)
    if isinstance(x, Mapping):
        return (), dict(x)
    return ((x,), {}) if isinstance(x, Tensor) else (tuple(x), {})


def signature(x: Any, unbatched: Sequence[str] = ()) -> Signature:
    """The signature of a module that takes ``x``.

    Args:
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments; may be nested.
        unbatched: the paths of the leaves whose first axis does not count samples.
    """
    leaves = tuple(
        Leaf(path, tuple(leaf.shape[path not in unbatched :]), leaf.dtype, path not in unbatched)
        for path, leaf in named_leaves(x).items()
    )
    structure = None if isinstance(x, Tensor) else pytree.tree_flatten(as_call(x))[1]
    return Signature(leaves, structure)


def _without_none(x: Any) -> Any:
    """Inputs without keyword arguments that are None and without None at the end of a tuple."""
    if isinstance(x, Mapping):
        return {name: value for name, value in x.items() if value is not None}
    if isinstance(x, tuple | list):
        given = list(x)
        while given and given[-1] is None:
            given.pop()
        return tuple(given)
    return x


def _step(key: Any) -> str:
    """One part of a path, as a user would write it."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)
