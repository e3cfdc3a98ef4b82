"""What a module takes and returns: trees of tensors, as PyTorch's own pytree knows them."""

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
        path: how a user finds it: "input_ids", "0", "graph.edges"; "x" where it is the only input.
        shape: without the batch dimension, if it has one.
        dtype: of its numbers.
        batched: whether it leads with the samples of a batch.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool = True


class Inputs(NamedTuple):
    """The inputs of one call, in the order of the :class:`Signature`.

    Attributes:
        batched: tensors (B, ...), each leads with the samples.
        fixed: tensors that all samples share, such as the edges of a graph.
    """

    batched: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()

    @property
    def samples(self) -> int:
        """B."""
        return len(self.batched[0])

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.batched[0].device

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """A function of the batched tensors; fixed ones stay as they are."""
        return Inputs(tuple(map(function, self.batched)), self.fixed)


@dataclass(frozen=True, eq=False)
class Signature:
    """What a module takes.

    Attributes:
        leaves: in the order of the structure.
        structure: of positional and keyword arguments; None: one tensor.
    """

    leaves: tuple[Leaf, ...]
    structure: pytree.TreeSpec | None = None

    @property
    def batched(self) -> tuple[Leaf, ...]:
        """The leaves that lead with the samples."""
        return tuple(leaf for leaf in self.leaves if leaf.batched)

    def inputs(self, leaves: Mapping[str, Tensor]) -> Inputs:
        """Inputs from tensors by their paths."""
        batched, fixed = (
            tuple(leaves[leaf.path] for leaf in self.leaves if leaf.batched is kind)
            for kind in (True, False)
        )
        return Inputs(batched, fixed)

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of the module."""
        if self.structure is None:
            return inputs.batched, {}
        batched, fixed = iter(inputs.batched), iter(inputs.fixed)
        ordered = [next(batched if leaf.batched else fixed) for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(ordered, self.structure)
        return args, kwargs


def named_leaves(x: Any) -> dict[str, Any]:
    """{path: leaf} of the inputs that a user gives; arguments that are None are left out."""
    if isinstance(x, Tensor):
        return {ALONE: x}
    pairs, _ = pytree.tree_flatten_with_path(_without_none(x))
    return {".".join(map(_step, path)): leaf for path, leaf in pairs}


def map_leaves(function: Callable[[str, Any], Any], x: Any) -> Any:
    """``function`` of each leaf of inputs and its path."""
    if isinstance(x, Tensor):
        return function(ALONE, x)
    return pytree.tree_map_with_path(
        lambda path, leaf: function(".".join(map(_step, path)), leaf), _without_none(x)
    )


def as_call(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: of a tensor, a tuple (positional) or a dict (keywords)."""
    x = _without_none(x)
    if isinstance(x, Mapping):
        return (), dict(x)
    return ((x,), {}) if isinstance(x, Tensor) else (tuple(x), {})


def signature(x: Any, unbatched: Sequence[str] = ()) -> Signature:
    """The signature of a module that takes ``x``.

    Args:
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments, nested.
        unbatched: paths of the leaves that do not lead with the samples.
    """
    leaves = tuple(
        Leaf(path, tuple(leaf.shape[path not in unbatched :]), leaf.dtype, path not in unbatched)
        for path, leaf in named_leaves(x).items()
    )
    structure = None if isinstance(x, Tensor) else pytree.tree_flatten(as_call(x))[1]
    return Signature(leaves, structure)


def _without_none(x: Any) -> Any:
    """Arguments that are given: those that are None are left out, whether by keyword or at the end."""
    if isinstance(x, Mapping):
        return {name: value for name, value in x.items() if value is not None}
    if isinstance(x, tuple | list):
        given = list(x)
        while given and given[-1] is None:
            given.pop()
        return tuple(given)
    return x


def _step(key: Any) -> str:
    """One step of a path, as a user would write it."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)
