"""Who holds the memory of a tensor, and how a tensor gives it away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import optree
import torch
from torch import Tensor
from torch._C import _functorch

from hatfn.numerics.trees import Tree, put_rows, tree_map

T = TypeVar("T")

EMPTY = torch.Size([0])
"""The shape of a tensor that gave its memory away."""


def holders(tensor: Tensor) -> int:
    """The number of tensors that share the memory of this one, this one included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # ``storage`` itself is one more


def is_owned(tensor: Tensor) -> bool:
    """Whether no other tensor, array or file shares the memory of this one.

    PyTorch cannot resize memory that belongs to an array of numpy or to a file.
    """
    return holders(tensor) == 1 and tensor.untyped_storage().resizable()


def is_exported(tensor: Tensor) -> bool:
    """Whether a view of the tensor, an array made by DLPack or a graph of autograd holds it."""
    count = getattr(tensor, "_use_count", None)  # PyTorch has it since 2.10
    return count is not None and count() > 1


def aliased(tree: T) -> T:
    """The same numbers in new tensor objects, so that one object can be spent without the other.

    Tensors inside a gradient or a transform stay as they are: a new object would cut the gradient.
    """

    def alias(leaf: Tensor) -> Tensor:
        if leaf.requires_grad or _functorch.is_functorch_wrapped_tensor(leaf):
            return leaf
        return leaf.detach()

    return tree_map(alias, tree)  # type: ignore[no-any-return]


def owned(tree: T) -> T:
    """The same numbers, each tensor in dense memory that it alone holds; others are copied."""

    def own(leaf: Tensor) -> Tensor:
        if leaf.is_contiguous() and is_owned(leaf):
            return leaf
        return leaf.clone(memory_format=torch.contiguous_format)

    return tree_map(own, tree)  # type: ignore[no-any-return]


def empty(tree: Tree) -> None:
    """Let every tensor of a tree give its memory away; each has shape (0,) afterwards."""
    leaves: list[Tensor] = optree.tree_leaves(tree)
    for inference in {leaf.is_inference() for leaf in leaves}:
        with torch.no_grad(), torch.inference_mode(inference):
            for leaf in leaves:
                if leaf.is_inference() == inference:
                    leaf.set_()  # type: ignore[call-overload]


def write_rows(
    tree: Mapping[str, Tensor], values: Mapping[str, Tensor], rows: Sequence[int], lead: int = 0
) -> dict[str, Tensor]:
    """:func:`~hatfn.numerics.trees.put_rows`; a leaf whose memory nobody else holds is overwritten."""
    new = {}
    for name, leaf in tree.items():
        value, alone = values[name], is_owned(leaf)
        first = leaf.data_ptr() + rows[0] * leaf.stride(lead) * leaf.element_size()
        if len(rows) == 1 and value.data_ptr() == first:
            new[name] = leaf  # the values are a view of the leaf: nothing changes
        elif alone:
            for row, part in zip(rows, value.unbind(lead), strict=True):
                leaf.select(lead, row).copy_(part)
            new[name] = leaf
        else:
            new |= put_rows({name: leaf}, {name: value}, rows, lead)
    return new
