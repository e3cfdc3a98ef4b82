"""The pure functions on trees that make up an update: protect, compensate, clip, apply, clamp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import optree
import torch
from torch import Tensor

from hatfn.checks.values import check_alike, check_kind, check_real
from hatfn.numerics.concrete import read_at_hand
from hatfn.numerics.trees import Tree, over_groups, tree_map
from hatfn.numerics.zeros import add, drop
from hatfn.state import Trainable


def protect(tree: Mapping[str, Tensor], protection: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set protected entries to 0; multiply entries with soft protection p by (1 - p).

    Protected entries are replaced, not multiplied by 0, so a non-finite number there becomes 0 too.

    Args:
        tree: {name: tensor}, gradients or updates of shared parameters.
        protection: {name: tensor of the same shape}: bool, or p in [0, 1].

    Example:
        >>> grads = {"w": torch.tensor([1.0, float("nan")])}
        >>> protect(grads, {"w": torch.tensor([False, True])})
        {'w': tensor([1., 0.])}

    Source:
        Serrà et al. 2018, equation 2, for the factor (1 - p).
    """

    def reduced(value: Tensor, p: Tensor) -> Tensor:
        if p.dtype != torch.bool:
            value, p = value * (1 - p).to(value.dtype), p == 1
        return drop(p, value)

    check_alike("protect", "protection", tree, protection)
    return {name: reduced(value, protection[name]) for name, value in tree.items()}


def compensate(
    gradients: Mapping[str, Tensor],
    embeddings: Mapping[str, Tensor],
    scale: float | Tensor,
    s_max: float | Tensor,
    factor: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Make the gradient of an embedding what it would be at s = 1, times ``factor``.

        g <- g * factor / s * (cosh(clip(s e, -50, 50)) + 1) / (cosh(e) + 1)

    While s is annealed, the slope of the gate is near zero for most of training; this factor makes up
    for it.

    Args:
        gradients: g, {group: (U,)}.
        embeddings: e, {group: (U,)}.
        scale: s > 0.
        s_max: the largest scale.
        factor: HAT-CL's separate factor; default ``s_max``, the first paper's.

    Source:
        Serrà et al. 2018, section 2.5; Duan 2023, section 3, for the factor.
    """
    factor = s_max if factor is None else factor
    check_alike("compensate", "embeddings", gradients, embeddings)
    for name, number in (("scale", scale), ("s_max", s_max)):
        check_real("compensate", name, number, lambda value: value > 0, "above 0")
    check_real("compensate", "factor", factor, math.isfinite, "that is finite")

    def steepen(g: Tensor, e: Tensor) -> Tensor:
        soft, plain = torch.cosh((scale * e).clamp(-50, 50)) + 1, torch.cosh(e) + 1
        return (g * (factor / scale) * (soft / plain)).to(g.dtype)

    return over_groups(steepen, gradients, {group: embeddings[group] for group in gradients})


def clip_by_norm(tree: Tree, max_norm: float | None, lead: int = 0) -> tuple[Tree, Tensor]:
    """Scale the whole tree so that its 2-norm is at most ``max_norm``.

    Args:
        tree: gradients, any structure.
        max_norm: > 0, or None for no clipping.
        lead: number of axes in front of every leaf that count states; each state has its own norm.

    Returns:
        the tree, and its norm before clipping: (), or (S,) for S stacked states.
    """
    norms = [torch.linalg.vector_norm(_flat(leaf, lead), dim=-1) for leaf in optree.tree_leaves(tree)]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    if max_norm is None:
        return tree, norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if agreed(factor) == 1.0:
        return tree, norm
    return tree_map(lambda leaf: leaf * spread(factor, leaf.dim()).to(leaf.dtype), tree), norm


def _flat(leaf: Tensor, lead: int) -> Tensor:
    """The leaf with all axes behind the first ``lead`` ones as one axis."""
    return leaf.unsqueeze(-1).flatten(lead)


def spread(number: Tensor, dims: int) -> Tensor:
    """A number, or one for each replica, in a shape that broadcasts to a leaf of ``dims`` axes.

    The first axis of the leaf counts replicas if there are several numbers.
    """
    return number.reshape((*number.shape, *(1,) * (dims - number.dim())))


def apply_updates(
    old: Trainable, updates: Trainable, rate: Tensor, protection: Mapping[str, Tensor]
) -> Trainable:
    """``old + rate * updates``; a protected entry stays ``old``, even if its update is not finite.

    Args:
        old: the values before the step.
        updates: from the optimizer.
        rate: (), a factor on the learning rate; (S,) for S stacked states.
        protection: {name: tensor}, bool or in [0, 1], for the shared weights; an entry is protected
            where it is True or 1.
    """
    protected = {name: p if p.dtype == torch.bool else p == 1 for name, p in protection.items()}
    unshared: Trainable = tree_map(
        lambda p, u: torch.addcmul(p, u, spread(rate, p.dim()).to(u.dtype)),
        old._replace(params={}),
        updates._replace(params={}),
    )
    params = {
        name: add(protected[name], value, updates.params[name], spread(rate, value.dim()))
        for name, value in old.params.items()
    }
    return unshared._replace(params=params)


def clamp_embeddings(embeddings: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Keep embeddings in [-limit, limit], where the sigmoid at s = 1 still has a slope.

    Source:
        Serrà et al. 2018, section 2.5 (limit 6).
    """
    check_kind("clamp_embeddings", "embeddings", embeddings, Mapping, "{group: tensor}, a dict")
    check_real("clamp_embeddings", "limit", limit, lambda value: value > 0, "above 0")
    return {group: e.clamp(-limit, limit) for group, e in embeddings.items()}


def finite(tree: Tree, lead: int = 0) -> Tensor:
    """Whether every number of every floating leaf is finite, () bool; (S,) for S stacked states.

    The test is one pass over each leaf: its sum is not finite if one of its numbers is not. A leaf
    also counts as not finite if its numbers are finite but their sum overflows.

    Args:
        tree: any structure.
        lead: number of axes in front of every leaf that count states.
    """
    floating = [leaf for leaf in optree.tree_leaves(tree) if leaf.is_floating_point()]
    if not floating:
        return torch.tensor(True)
    wide = reduce(torch.promote_types, {leaf.dtype for leaf in floating}, torch.float32)
    sums = [_flat(leaf, lead).sum(-1, dtype=wide) for leaf in floating]
    return torch.isfinite(torch.stack(sums)).all(0)


def agreed(numbers: Tensor) -> Any:
    """The common value of the numbers, if they are all the same and at hand; else None.

    Callers use the value to save work; it never changes a result.
    """
    known = read_at_hand(numbers)
    values = {*known} if isinstance(known, list) else {known}
    return values.pop() if len(values) == 1 else None


def choose(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """``new`` where the condition holds, else ``old``.

    Nothing is copied if the condition can be read for free and is the same everywhere.

    Args:
        condition: () bool, or (S,) for trees whose leaves have S as first axis.
        new: a tree of tensors.
        old: a tree of the same structure and shapes.
    """
    known = agreed(condition)
    if known is not None:
        return new if known else old
    return tree_map(lambda new, old: torch.where(spread(condition, new.dim()), new, old), new, old)
