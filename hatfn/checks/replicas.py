"""What replicate() and Replicas refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hatfn.checks.calls import check_scale
from hatfn.checks.settings import check_number
from hatfn.checks.values import check_kind, check_list, check_seed


def check_seeds(seeds: Any) -> list[int]:
    """One integer per replica."""
    check_list("replicate", "seeds", seeds, "one per replica, such as range(8)")
    found = [check_seed("replicate", seed) for seed in seeds]
    if not found:
        raise ValueError("replicate: no seeds. Expected one per replica, such as range(8).")
    return found


def check_replicated(
    hyper: Mapping[str, Any], known: Mapping[str, Any], replicas: int
) -> dict[str, list[float]]:
    """A value of each setting for every replica."""
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


def check_scales(where: str, scale: Any, s_max: Tensor) -> None:
    """One scale for all replicas, or (S,), one for each; None for binary gates."""
    if scale is None:
        return
    if not isinstance(scale, Tensor) or not scale.dim():
        check_scale(where, scale, s_max.min())
        return
    if scale.shape != s_max.shape:
        raise ValueError(
            f"{where}: scale has shape {tuple(scale.shape)} for {len(s_max)} replicas. Expected one "
            f"number, or one for each, ({len(s_max)},)."
        )
    for one, top in zip(scale, s_max, strict=True):
        check_scale(where, one, top)


def check_axis(where: str, x: Any, replicas: int, shared: bool | None = False) -> None:
    """A batch of its own for every replica; ``shared``: None where there is no other way."""
    check_kind(where, "x", x, Tensor, "a tensor")
    if x.dim() < 2 or len(x) != replicas:
        other = "" if shared is None else "; for the same one give shared=True"
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)} for {replicas} replicas. Expected a batch for "
            f"each, (S, B, ...){other}."
        )
