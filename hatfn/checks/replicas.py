"""Checks of the arguments of replicate(), replica(), stack() and Replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from hatfn.checks.calls import bounded_scale, check_unspent
from hatfn.checks.settings import check_number
from hatfn.checks.values import check_integer, check_kind, check_list, check_seed
from hatfn.numerics.concrete import reads_freely
from hatfn.state import HATState


def check_seeds(seeds: Any) -> list[int]:
    """The seeds as a list of ints, one per replica."""
    check_list("replicate", "seeds", seeds, "one per replica, such as range(8)")
    found = [check_seed("replicate", seed) for seed in seeds]
    if not found:
        raise ValueError("replicate: no seeds. Expected one per replica, such as range(8).")
    return found


def check_replicated(
    hyper: Mapping[str, Any], known: Mapping[str, Any], replicas: int
) -> dict[str, list[float]]:
    """The values of settings, a list of one number per replica for each setting."""
    values = {}
    for name, value in hyper.items():
        if name not in known:
            raise ValueError(f"replicate: {name} is no setting. Expected one of {', '.join(known)}.")
        try:
            numbers = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"replicate: {name}={value!r}. Expected a number, or a list of one for each replica."
            ) from error
        if len(numbers) not in (1, replicas):
            raise ValueError(
                f"replicate: {len(numbers)} values of {name} for {replicas} replicas. Expected one "
                f"number, or one for each."
            )
        values[name] = [check_number("replicate", name, number) for number in numbers]
        values[name] *= replicas // len(numbers)
    return values


def check_stacked(where: str, states: Any) -> None:
    """Check that states are stacked."""
    check_kind(where, "states", states, HATState, "stacked ones: hatfn.replicate(hat, seeds)")
    check_unspent(where, states)
    if states.learned.dim() != 2:
        raise ValueError(
            f"{where}: states.learned has shape {tuple(states.learned.shape)}. Expected states "
            f"with an axis in front: hatfn.replicate(hat, seeds), or hatfn.stack([state, ...])."
        )


def check_replica(index: Any, replicas: int) -> None:
    """Check that the index of a replica is in its range."""
    number = check_integer("replica", "index", index, such_as=0)
    if not 0 <= number < replicas:
        raise ValueError(
            f"replica: index={number}. Expected an int from 0 to {replicas - 1} ({replicas} replicas)."
        )


def check_alike_states(states: Any) -> None:
    """Check that there is at least one state, and that all have the same structure and shapes."""
    check_list("stack", "states", states, "a list of states [state, ...]")
    for state in states:
        check_kind("stack", "states", state, HATState, "a list of states [state, ...]")
        check_unspent("stack", state)
    shapes = [[leaf.shape for leaf in optree.tree_leaves(state)] for state in states]
    if not shapes or any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"stack: {len(shapes)} states{' of different shapes' if shapes else ''}. Expected at least "
            f"one state; all must be of the same learner and have the same number of open tasks."
        )


def bounded_scales(where: str, scale: Any, s_max: Tensor) -> float | Tensor | None:
    """One scale for all replicas, or (S,), one for each, after a check; None for binary gates.

    See :func:`~hatfn.checks.calls.bounded_scale` for states on a GPU.
    """
    if scale is None:
        return None
    if not isinstance(scale, Tensor) or not scale.dim():
        return bounded_scale(where, scale, s_max.min())
    if scale.shape != s_max.shape:
        raise ValueError(
            f"{where}: scale has shape {tuple(scale.shape)} for {len(s_max)} replicas. Expected one "
            f"number, or one for each, ({len(s_max)},)."
        )
    pairs = zip(scale.unbind(), s_max.unbind(), strict=True)
    each: list[Any] = [bounded_scale(where, one, top) for one, top in pairs]
    return scale if reads_freely(s_max.device) else torch.stack(each)
