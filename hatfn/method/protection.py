"""Protection rules: they decide which weights stay unchanged because earlier tasks use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hatfn.method.masks import binary_gates
from hatfn.method.names import LockName
from hatfn.numerics.concrete import read
from hatfn.state import HATState
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


@dataclass(frozen=True)
class Locked:
    """What a protection rule receives.

    Attributes:
        state: the state with the new ``locked``.
        used: {group: (U,)}, the cumulative mask of the protected tasks: bool, or in [0, 1] if the
            rule has ``units="soft"``.
        locked: (T,) bool, the tasks to protect.
        params: {name: tensor}, the shared weights.
        before: {name: tensor}, the protection until now.
        locked_before: (T,) bool, the tasks that were protected until now.
        added: the tasks that become protected, if all that were protected stay so; None if a task loses
            its protection, or if numbers cannot be read.
    """

    state: HATState
    used: dict[str, Tensor]
    before: dict[str, Tensor]
    locked_before: Tensor
    added: Sequence[int] | None

    @property
    def locked(self) -> Tensor:
        """(T,) bool, the tasks to protect."""
        return self.state.locked

    @property
    def params(self) -> dict[str, Tensor]:
        """{name: tensor}, the shared weights."""
        return self.state.params

    @cached_property
    def gates(self) -> dict[str, Tensor]:
        """{group: (T, U)} bool, the binary gates of all tasks."""
        return binary_gates(self.state)


class Lock(NamedTuple):
    """A protection rule: it decides which weights stay unchanged, and how strictly.

    A method that differs from HAT only in its protection is a ``Lock``.

    Attributes:
        rule: (wiring, :class:`Locked`) -> {name: tensor shaped like the weight}, the protection of
            every entry: bool, or p in [0, 1]. An entry with p = 1 does not move at all.
        soft: whether the rule returns numbers instead of bools.
        on: where the factor 1 - p acts on entries with p below 1: on the "gradient", as in the papers,
            or on the "update" that the optimizer computes from it.
        units: the gates that tell which units are already used, so that a task uses them without
            penalty: "binary" gates, or "soft" gates at s_max.
    """

    rule: Callable[[Wiring, Locked], dict[str, Tensor]]
    soft: bool = False
    on: Literal["gradient", "update"] = "gradient"
    units: Literal["binary", "soft"] = "binary"


def exact() -> Lock:
    """Protect the entries that a protected task depends on, and no others: :func:`exact_protection`."""

    def rule(wiring: Wiring, inputs: Locked) -> dict[str, Tensor]:
        if inputs.added is None:
            return exact_protection(wiring, inputs.gates, inputs.locked)
        before = {name: inputs.before[name] for name in wiring.shared}
        if not inputs.added:
            return before
        gates, every = binary_gates(inputs.state, inputs.added), [True] * len(inputs.added)
        more = exact_protection(wiring, gates, torch.tensor(every, device=inputs.locked.device))
        return {name: before[name] | more[name] for name in before}

    return Lock(rule)


def paper() -> Lock:
    """The papers' rule: see :func:`paper_protection`."""
    return Lock(
        lambda wiring, inputs: paper_protection(wiring, inputs.used),
        soft=True,
        on="gradient",
        units="soft",
    )


def adaptive(alpha: float = 1e-3, epsilon: float = 0.1) -> Lock:
    """Soft protection in the spirit of AdaHAT: updates of used entries become small instead of zero.

        rate = r / (n + r),  r = alpha / (F + epsilon),  p = 1 - rate

    Here n is the number of protected tasks that depend on an entry, and F is the share of entries on
    which no protected task depends. The rate falls with n. As free capacity runs out, r rises up to
    alpha / epsilon, and the rate rises with it. Drift is not zero; it is bounded by the sum of all
    updates times the rate.

    Args:
        alpha: > 0; at 0 the rule would be :func:`exact`.
        epsilon: > 0.

    Source:
        After Wang et al. 2024 (AdaHAT, ECML PKDD). They count the tasks of the unit at each end of a
        weight, and measure free capacity by their regularisation term.
    """
    if not (alpha > 0 and epsilon > 0):
        raise ValueError(f"adaptive: alpha={alpha}, epsilon={epsilon}. Expected numbers above 0.")

    def rule(wiring: Wiring, inputs: Locked) -> dict[str, Tensor]:
        counts = {
            name: sum(uses, torch.zeros_like(inputs.params[name]))
            for name, uses in _uses(wiring, inputs.gates, inputs.locked)
        }
        total = sum(count.numel() for count in counts.values())
        free = sum((count == 0).sum() for count in counts.values()) / max(total, 1)
        r = alpha / (free + epsilon)
        return {name: count / (count + r).to(count.dtype) for name, count in counts.items()}

    return Lock(rule, soft=True, on="update")


def magnitude(share: float = 0.5) -> Lock:
    """Protect single weights in PackNet's manner: the largest of the entries that a task uses.

    When a task becomes protected, the rule looks at the entries of each weight that the task depends
    on and that are still free. It protects a share of them, the largest in magnitude. Later tasks may
    change the others, although this task still reads them, so its drift is not zero. (PackNet sets
    them to zero for the task and trains it once more.)

    Args:
        share: in (0, 1]; at 1 the rule equals :func:`exact`.

    Source:
        After Mallya and Lazebnik 2018 (PackNet, arXiv 1711.05769), section 3.
    """
    if not 0 < share <= 1:
        raise ValueError(f"magnitude: share={share}. Expected a number above 0, up to 1.")

    def largest(entries: Tensor, size: Tensor) -> Tensor:
        ranked = torch.where(entries, size, -1).flatten().sort(descending=True).values
        count = (share * entries.sum()).ceil().long()
        return entries & (size >= ranked.gather(0, (count - 1).clamp(min=0)[None])) & (count > 0)

    def rule(wiring: Wiring, inputs: Locked) -> dict[str, Tensor]:
        fresh = inputs.locked & ~inputs.locked_before
        used = exact_protection(wiring, inputs.gates, inputs.locked & inputs.locked_before)
        protection = {name: used[name] & (inputs.before[name] == 1) for name in used}
        for name, uses in _uses(wiring, inputs.gates, fresh):
            for use in uses:
                free = use.expand(protection[name].shape) & ~protection[name]
                protection[name] = protection[name] | largest(free, inputs.params[name].abs())
        return protection

    return Lock(rule)


LOCKS: Mapping[LockName, Callable[[], Lock]] = {
    "exact": exact, "paper": paper, "adaptive": adaptive, "magnitude": magnitude,
}  # fmt: skip
"""The rules by name, each with its default settings."""


def exact_protection(wiring: Wiring, masks: Mapping[str, Tensor], locked: Tensor) -> dict[str, Tensor]:
    """The entries that a protected task depends on: their out unit and in unit are both on.

        protection[i, j] = any over locked t of (mask_t[out i] and mask_t[in j])

    If an entry has only one of the two units (a bias has no in unit), that unit alone decides.

    Args:
        wiring: the out unit and the in unit of each entry.
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
    """Pairs of a shared parameter's name and, for each protected task, the entries that it uses.

    The entries are a bool tensor that broadcasts to the parameter.
    """
    known = read(locked)
    tasks = [task for task in range(len(locked)) if known is None or known[task]]
    lookups = [(locked[t], wiring.lookup({g: m[t] for g, m in masks.items()})) for t in tasks]

    def uses(param: ParamWiring) -> Iterator[Tensor]:
        for is_locked, lookup in lookups:
            ends = [lookup(units) for units in (param.out_units, param.in_units) if units is not None]
            yield reduce(torch.logical_and, ends, is_locked)

    for name, param in wiring.shared.items():
        yield name, uses(param)


def paper_protection(wiring: Wiring, cumulative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The papers' cumulative mask per weight: min(post, pre) on weights, post on biases.

    It is soft. It also protects entries between units of *different* tasks, which no task uses.

    Args:
        wiring: the out unit and the in unit of each entry.
        cumulative: {group: (U,)} in [0, 1], the maximum over protected tasks of their gates at s_max.

    Returns:
        {name: float tensor shaped like the weight, in [0, 1]}, for the shared parameters.

    Source:
        Serrà et al. 2018, equation 2.
    """
    lookup = wiring.lookup(cumulative)

    def smaller(out: Units | None, into: Units | None, shape: tuple[int, ...]) -> Tensor:
        ends = [lookup(units) for units in (out, into) if units is not None]
        return torch.stack([end.expand(shape) for end in ends]).amin(0)

    return {n: smaller(p.out_units, p.in_units, p.shape) for n, p in wiring.shared.items()}
