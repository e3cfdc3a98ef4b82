"""Lock rules: how weights that earlier tasks depend on are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hatfn.method.names import LockName
from hatfn.numerics.concrete import read
from hatfn.wiring import ParamWiring, Units, Wiring

__all__ = [
    "LOCKS",
    "Lock",
    "LockName",
    "Locked",
    "adaptive",
    "exact",
    "exact_protection",
    "magnitude",
    "paper",
    "paper_protection",
]


class Locked(NamedTuple):
    """What a rule is told when a task is begun.

    Attributes:
        gates: {group: (T, U)} bool, the binary gates of all tasks.
        used: {group: (U,)}, the cumulative mask of the locked tasks, bool or, as the rule says, soft.
        locked: (T,) bool, the tasks to hold.
        params: {name: tensor}, the shared weights.
        before: {name: tensor}, what was held until now.
        locked_before: (T,) bool, the tasks that were held until now.
    """

    gates: dict[str, Tensor]
    used: dict[str, Tensor]
    locked: Tensor
    params: dict[str, Tensor]
    before: dict[str, Tensor]
    locked_before: Tensor


class Lock(NamedTuple):
    """A lock rule: a method that differs from HAT only in what it holds, and how firmly.

    Attributes:
        rule: (wiring, :class:`Locked`) -> {name: tensor shaped like the weight}, how firmly every entry
            is held: bool, or p in [0, 1]. An entry that is held by 1 does not move at all.
        soft: whether the rule gives numbers instead of bools.
        on: where 1 - p acts on entries that are held less firmly: on the "gradient", as the papers have
            it, or on the "update" that the optimiser makes of it.
        units: what counts as used when a task pays for free units: "binary" gates, or "soft" ones at
            s_max.
    """

    rule: Callable[[Wiring, Locked], dict[str, Tensor]]
    soft: bool = False
    on: Literal["gradient", "update"] = "gradient"
    units: Literal["binary", "soft"] = "binary"


def exact() -> Lock:
    """Holds what some locked task depends on, and nothing else: see :func:`exact_protection`."""
    return Lock(lambda wiring, seen: exact_protection(wiring, seen.gates, seen.locked))


def paper() -> Lock:
    """The papers' rule: see :func:`paper_protection`."""
    return Lock(
        lambda wiring, seen: paper_protection(wiring, seen.used), soft=True, on="gradient", units="soft"
    )


def adaptive(alpha: float = 1e-3, epsilon: float = 0.1) -> Lock:
    """A soft lock in the spirit of AdaHAT: updates of what is in use become small instead of none.

        rate = r / (n + r),  r = alpha / (F + epsilon),  p = 1 - rate

    with n the number of locked tasks that depend on an entry and F the share of entries on which none
    does. The rate falls with n and rises, up to alpha / epsilon, as free capacity runs out. Drift is
    bounded by what all updates times the rate add up to; it is not zero.

    Args:
        alpha: > 0; 0 would be the exact lock.
        epsilon: > 0.

    Source:
        After Wang et al. 2024 (AdaHAT, ECML PKDD), who count a unit's tasks at each end of a weight and
        take their regularisation term for what is free.
    """
    if not (alpha > 0 and epsilon > 0):
        raise ValueError(f"adaptive: alpha={alpha}, epsilon={epsilon}. Expected numbers above 0.")

    def rule(wiring: Wiring, seen: Locked) -> dict[str, Tensor]:
        counts = {
            name: sum(uses, torch.zeros_like(seen.params[name]))
            for name, uses in _uses(wiring, seen.gates, seen.locked)
        }
        total = sum(count.numel() for count in counts.values())
        free = sum((count == 0).sum() for count in counts.values()) / max(total, 1)
        r = alpha / (free + epsilon)
        return {name: count / (count + r).to(count.dtype) for name, count in counts.items()}

    return Lock(rule, soft=True, on="update")


def magnitude(share: float = 0.5) -> Lock:
    """A lock of single weights in PackNet's manner: of what a task uses, the largest entries.

    Of the entries of a weight that a newly locked task depends on and that are not held yet, those of
    the largest magnitude are held, a share of them. The others go to later tasks, although the task
    reads them: its drift is not zero. (PackNet sets them to zero for the task and trains it once more.)

    Args:
        share: in (0, 1]; at 1 it is the exact lock.

    Source:
        After Mallya and Lazebnik 2018 (PackNet, arXiv 1711.05769), section 3.
    """
    if not 0 < share <= 1:
        raise ValueError(f"magnitude: share={share}. Expected a number above 0, up to 1.")

    def largest(entries: Tensor, size: Tensor) -> Tensor:
        ranked = torch.where(entries, size, -1).flatten().sort(descending=True).values
        kept = (share * entries.sum()).ceil().long()
        return entries & (size >= ranked.gather(0, (kept - 1).clamp(min=0)[None])) & (kept > 0)

    def rule(wiring: Wiring, seen: Locked) -> dict[str, Tensor]:
        fresh = seen.locked & ~seen.locked_before
        kept = exact_protection(wiring, seen.gates, seen.locked & seen.locked_before)
        found = {name: kept[name] & (seen.before[name] == 1) for name in kept}
        for name, uses in _uses(wiring, seen.gates, fresh):
            for use in uses:
                entries = use.expand(found[name].shape) & ~found[name]
                found[name] = found[name] | largest(entries, seen.params[name].abs())
        return found

    return Lock(rule)


LOCKS: Mapping[LockName, Callable[[], Lock]] = {
    "exact": exact, "paper": paper, "adaptive": adaptive, "magnitude": magnitude,
}  # fmt: skip
"""The rules by name, each with its own defaults."""


def exact_protection(wiring: Wiring, masks: Mapping[str, Tensor], locked: Tensor) -> dict[str, Tensor]:
    """Which entries some locked task depends on: its out unit and its in unit are both on.

        protection[i, j] = any over locked t of (mask_t[out i] and mask_t[in j])

    An entry without an in unit (a bias) needs its out unit only, and the other way round.

    Args:
        wiring: which units stand behind each entry.
        masks: {group: (T, U)} bool, the binary gates.
        locked: (T,) bool.

    Returns:
        {name: bool tensor shaped like the weight}, for the shared parameters.
    """

    def nothing(name: str) -> Tensor:
        return torch.zeros(wiring.params[name].shape, dtype=torch.bool, device=locked.device)

    return {
        name: reduce(torch.logical_or, uses, nothing(name))
        for name, uses in _uses(wiring, masks, locked)
    }


def _uses(
    wiring: Wiring, masks: Mapping[str, Tensor], locked: Tensor
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """For each shared parameter, the entries that each locked task depends on, broadcastable, bool."""
    known = read(locked)
    tasks = [task for task in range(len(locked)) if known is None or known[task]]
    looks = [(locked[t], wiring.lookup({g: m[t] for g, m in masks.items()})) for t in tasks]

    def uses(param: ParamWiring) -> Iterator[Tensor]:
        for on, look in looks:
            ends = [look(units) for units in (param.out_units, param.in_units) if units is not None]
            yield reduce(torch.logical_and, ends, on)

    for name, param in wiring.shared.items():
        yield name, uses(param)


def paper_protection(wiring: Wiring, cumulative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The papers' cumulative mask per weight: min(post, pre) on weights, post on biases.

    It is soft, and it also holds entries between units of *different* tasks, which no task uses.

    Args:
        wiring: which units stand behind each entry.
        cumulative: {group: (U,)} in [0, 1], the maximum over locked tasks of their gates at s_max.

    Returns:
        {name: float tensor shaped like the weight, in [0, 1]}, for the shared parameters.

    Source:
        Serrà et al. 2018, equation 2.
    """
    look = wiring.lookup(cumulative)

    def held(out: Units | None, into: Units | None, shape: tuple[int, ...]) -> Tensor:
        sides = [look(units) for units in (out, into) if units is not None]
        return torch.stack([side.expand(shape) for side in sides]).amin(0)

    return {n: held(p.out_units, p.in_units, p.shape) for n, p in wiring.shared.items()}
