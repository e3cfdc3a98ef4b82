"""``vmap`` as this library calls it: over any trees, with kernels that have batching rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import optree
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hatfn.numerics.trees import Structure, flatten, unflatten

_UNBATCHABLE = (
    "atching rule not implemented",  # a recurrent layer
    "expected scalar type",  # a batch norm of two precisions
    "forward AD",  # an operator without a forward derivative
    "functorch",  # an operator that another library defines
)
"""Parts of PyTorch's messages that say: an operator has no batching rule or no forward derivative."""


def is_unbatchable(error: Exception) -> bool:
    """Whether an error says that an operator has no batching rule or no forward derivative."""
    return any(words in str(error) for words in _UNBATCHABLE)


@contextmanager
def batchable(device: torch.device) -> Iterator[None]:
    """Turn off fused attention, which vmap cannot batch because it has no batching rule.

    vmap runs other operators without a rule slice by slice; its warning about that is silenced.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def batched(
    function: Callable[..., Any], axes: Sequence[Any], chunk_size: int | None = None
) -> Callable[..., Any]:
    """``vmap`` over trees of any kind: one axis for each argument, and different random numbers for
    each slice.

    ``vmap`` itself receives flat lists, because optree flattens a tree in a tenth of the time that
    torch's own pytrees take.

    Args:
        function: a function of trees of tensors; it may return what a module returns, such as a
            ModelOutput.
        axes: for each argument, the axis of all its leaves, or None; or a tree of both whose leaves
            stand for parts of the argument.
        chunk_size: as in ``vmap``.
    """

    def every(*arguments: Any) -> Any:
        leaves: list[Any]
        leaves, structure = optree.tree_flatten(arguments)  # type: ignore[arg-type]
        dims: list[int | None] = []
        for axis, argument, part in zip(axes, arguments, structure.children(), strict=True):
            if axis is None or isinstance(axis, int):
                dims += [axis] * part.num_leaves
            else:
                dims += optree.broadcast_prefix(axis, argument, none_is_leaf=True)
        returned: list[Structure] = []

        def flat(*leaves: Any) -> tuple[Any, ...]:
            results, shape = flatten(function(*optree.tree_unflatten(structure, leaves)))
            returned.append(shape)
            return tuple(results)

        over = torch.vmap(flat, tuple(dims), randomness="different", chunk_size=chunk_size)
        results = over(*leaves)
        return unflatten(returned[-1], results)

    return every
