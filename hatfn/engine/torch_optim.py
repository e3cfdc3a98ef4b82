"""Any optimiser of ``torch.optim`` as a pure pair: its own kernels, on copies of its own state."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from hatfn.engine.optimizer import PureOptimizer
from hatfn.numerics.concrete import read
from hatfn.numerics.trees import Tree, tree_map

Kept = tuple[dict[str, Tensor], ...]
"""For each parameter, in the order of the tree, {name: tensor}, such as Adam's "exp_avg"."""


class TorchState(NamedTuple):
    """What an optimiser of torch keeps between steps.

    Attributes:
        begun: () bool; False before the first step, when an optimiser sets up what it keeps.
        kept: what it keeps for each parameter.
    """

    begun: Tensor
    kept: Kept


def from_torch(kind: type[torch.optim.Optimizer], **settings: Any) -> PureOptimizer:
    """An optimiser of ``torch.optim`` as an optax-style pair of pure functions.

    Each update makes a new optimiser, gives it copies of what it kept, and lets it take one step, by
    the kernels that it has; with ``fused=True`` it has the fastest. :class:`~hatfn.Replicas` step at
    once if the optimiser treats every number by itself, as most do, else one by one; ``vmap`` cannot.

    Args:
        kind: its class, such as :class:`torch.optim.AdamW`; not one whose ``step`` needs a closure.
        settings: what the class takes beside parameters, ``lr`` first of all: one group of settings.

    Returns:
        The pair, for :func:`hatfn.build`. Its updates are what a step adds to the parameters.

    Raises:
        TypeError: no class of optimisers, or one whose ``step`` needs a closure.
        ValueError: a setting that the class refuses.

    Example:
        >>> optimizer = from_torch(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> params, gradients = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, -1.0])}
        >>> updates, state = optimizer.update(gradients, optimizer.init(params), params=params)
        >>> updates
        {'w': tensor([-0.1000,  0.1000])}
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise TypeError(
            f"from_torch: kind={kind!r}. Expected a class of torch.optim, its settings behind it: "
            f"from_torch(torch.optim.Adam, lr=1e-3)."
        )
    if inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"from_torch: the step of kind={kind.__name__} needs a closure. Expected a class whose "
            f"step takes gradients: from_torch(torch.optim.Adam, lr=1e-3)."
        )
    blind, apart = _blind(kind, settings), _apart(kind, settings)

    def init(params: Tree) -> TorchState:
        leaves: list[Tensor] = optree.tree_leaves(params)
        zeros = [torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in leaves]
        _, kept = _step(kind, settings, zeros, [torch.zeros_like(zero) for zero in zeros], None)
        begun = torch.zeros((), dtype=torch.bool, device=leaves[0].device)
        return TorchState(begun, tree_map(torch.zeros_like, kept))

    def update(gradients: Tree, state: TorchState, params: Tree) -> tuple[Tree, TorchState]:
        begun = read(state.begun)
        if begun is None:
            raise ValueError(
                f"update: vmap cannot batch torch.optim's {kind.__name__}. Expected hatfn.Replicas, "
                f"which need no vmap for it, or pure functions, such as torchopt.adam(1e-3)."
            )
        slopes: list[Tensor]
        slopes, structure = optree.tree_flatten(gradients)
        old: list[Tensor] = optree.tree_leaves(params)
        start = [torch.zeros_like(leaf) if blind else leaf.clone() for leaf in old]
        new, kept = _step(kind, settings, start, slopes, state.kept if begun else None)
        steps = new if blind else [a - b for a, b in zip(new, old, strict=True)]
        return optree.tree_unflatten(structure, steps), TorchState(torch.ones_like(state.begun), kept)

    def stacked(gradients: Tree, state: TorchState, params: Tree) -> tuple[Tree, TorchState]:
        count = len(state.begun)
        leaves: list[Tensor] = optree.tree_leaves(params)
        together = _common(state, leaves) if apart else None
        if together is not None:
            steps, new = update(gradients, together, params)
            return steps, tree_map(
                lambda leaf, old: leaf.expand_as(old).clone() if leaf.dim() < old.dim() else leaf,
                new,
                state,
            )
        trees = [tree_map(lambda leaf, i=i: leaf[i], (gradients, state, params)) for i in range(count)]
        every: tuple[Tree, TorchState] = tree_map(
            lambda *each: torch.stack(each), *(update(*tree) for tree in trees)
        )
        return every

    return PureOptimizer(init, update, stacked)


def _step(
    kind: type[torch.optim.Optimizer],
    settings: dict[str, Any],
    start: list[Tensor],
    slopes: list[Tensor],
    kept: Kept | None,
) -> tuple[list[Tensor], Kept]:
    """One step of a new optimiser, from what another kept; may write to ``start``.

    Returns:
        where the parameters are then, and what is kept for each.
    """
    # Fused kernels read memory from end to end, whatever the strides.
    params = [leaf.detach().contiguous() for leaf in start]
    for param, slope in zip(params, slopes, strict=True):
        param.grad = slope.detach().contiguous()
    optimizer = kind(params, **settings)
    for param, own in zip(params, kept or (), strict=kept is not None):
        optimizer.state[param] = {
            name: value.clone(memory_format=torch.contiguous_format) for name, value in own.items()
        }
    optimizer.step()
    states = (optimizer.state[param] for param in params)
    seen = tuple({n: v for n, v in own.items() if isinstance(v, Tensor)} for own in states)
    return [param.detach() for param in params], seen  # without the gradient that it was given


def _common(state: TorchState, leaves: list[Tensor]) -> TorchState | None:
    """The state as one of stacked parameters: what all replicas have in common, such as a count, once.

    Returns:
        it, or None where they differ, as after a step that one of them refused, or where a parameter
        of a single number cannot be told from a count.
    """
    every: list[Tensor] = optree.tree_leaves(state)  # type: ignore[arg-type]
    counts = [leaf for leaf in every if leaf.dim() < 2]
    if any(leaf.dim() < 2 for leaf in leaves) or any(len({*count.tolist()}) > 1 for count in counts):
        return None
    common: TorchState = tree_map(lambda leaf: leaf[0] if leaf.dim() < 2 else leaf, state)
    return common


_SLOPES = torch.tensor([[-1.0, 1e-6, 0.5], [3e9, -0.1, 2.0]], dtype=torch.float64)


def _blind(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> bool:
    """Whether the step does not depend on where the parameters are: then it may start from zero.

    It does with weight decay. Tried where decay by a billionth of a step would show.
    """
    here, there = (torch.full_like(_SLOPES, value) for value in (0.0, 1024.0))
    near, far = (_step(kind, settings, [at.clone()], [_SLOPES], None)[0][0] for at in (here, there))
    return torch.allclose(far - there, near, rtol=1e-9, atol=1e-12)


def _apart(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> bool:
    """Whether every number is treated by itself: tried on numbers of all sizes, and with each alone."""
    whole, kept = _SLOPES.clone(), None
    parts: list[Any] = [(row.clone()[None], None) for row in _SLOPES]
    for factor in (1.0, -3.0, 0.1):
        (whole,), kept = _step(kind, settings, [whole], [_SLOPES * factor], kept)
        stepped = [
            _step(kind, settings, [row], [slope[None] * factor], own)
            for (row, own), slope in zip(parts, _SLOPES, strict=True)
        ]
        parts = [(rows[0], own) for rows, own in stepped]
    return torch.allclose(whole, torch.cat([row for row, _ in parts]), rtol=1e-12, atol=0)
