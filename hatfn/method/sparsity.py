"""Sparsity: the penalty of a task for using units that no earlier task uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hatfn.checks.values import check_alike, check_real


def sparsity(
    gates: Mapping[str, Tensor],
    cumulative: Mapping[str, Tensor],
    quota: float | Tensor = 0.0,
    over: Literal["all", "groups"] = "all",
) -> Tensor:
    """The mean gate over the units that are still free; a unit in use costs nothing.

    Let a be the gates of this task and c the cumulative mask of the earlier ones. The result is

        all:     sum(a (1 - c)) / sum(1 - c)                 over all groups together
        groups:  mean over groups of max(0, sum(a (1 - c)) - quota U) / sum(1 - c)

    and 0 if no unit is free.

    Args:
        gates: a, {group: (U,)} in [0, 1].
        cumulative: c, {group: (U,)} in [0, 1], or bool.
        quota: share of a group's U units, in [0, 1], that a task may use without penalty; HAT-CL
            uses 1/T. With "all" it is a share of the units of all groups together.
        over: "all" (the first paper) or "groups" (HAT-CL).

    Returns:
        (), in [0, 1].

    Raises:
        TypeError, ValueError: groups or shapes differ, the quota is out of its range, or ``over`` is
            another word.

    Example:
        >>> sparsity({"fc": torch.tensor([1.0, 1.0, 0.0])}, {"fc": torch.tensor([True, False, False])})
        tensor(0.5000)

    Source:
        Serrà et al. 2018, equation 5; Duan 2023, section 3.
    """
    if over not in ("all", "groups"):
        raise ValueError(f'sparsity: over={over!r}. Expected "all" or "groups".')
    check_alike("sparsity", "cumulative", gates, cumulative)
    if not isinstance(quota, Tensor):  # a tensor comes from a state, and build() has checked it
        check_real("sparsity", "quota", quota, lambda share: 0 <= share <= 1, "from 0 to 1")
    if not gates:
        return torch.zeros(())
    if over == "all":
        parts = [(torch.cat([gates[g] for g in gates]), torch.cat([cumulative[g] for g in gates]))]
    else:
        parts = [(gates[group], cumulative[group]) for group in gates]
    costs = []
    for a, c in parts:
        free = 1 - c.to(a.dtype)
        budget = torch.as_tensor(quota, dtype=a.dtype, device=a.device) * a.numel()
        paid = ((a * free).sum() - budget).clamp(min=0)
        costs.append(paid / free.sum().clamp(min=torch.finfo(a.dtype).tiny))
    return torch.stack(costs).mean()
