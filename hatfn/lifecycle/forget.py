"""The life of tasks after training: forgetting them, and adding new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from hatfn.checks.calls import check_each_task, check_locked, check_state
from hatfn.checks.capacity import warn_untouched
from hatfn.engine.optimizer import fresh_moments
from hatfn.lifecycle.init import Own, _initial
from hatfn.method.masks import binary_gates
from hatfn.method.protection import exact_protection
from hatfn.numerics.trees import put
from hatfn.state import HATState

if TYPE_CHECKING:
    from hatfn.learner import HAT


class Forgotten(NamedTuple):
    """What forgetting gives back, or would.

    Attributes:
        tasks: that are forgotten.
        params: {name: bool tensor shaped like the weight}: the shared entries that only these tasks
            used, which go back to their initial values.
        counts: a row per shared parameter, in entries: "forgotten", "kept" (a task that stays uses
            it), "unused" (no task did).
    """

    tasks: tuple[int, ...]
    params: dict[str, Tensor]
    counts: pd.DataFrame


def forget(
    hat: HAT, state: HATState, task: Any, locked: Sequence[int] | None, dry_run: bool
) -> tuple[HATState, Forgotten]:
    """The body of :meth:`hatfn.HAT.forget`, which says what goes in and comes out."""
    check_state("forget", state, hat.wiring, hat.tasks)
    rows = check_each_task("forget", task, hat.tasks)
    kept = check_locked("forget", locked, rows, hat.tasks)
    new, report = _forget(hat, state, rows, kept, dry_run)
    if untouched := [row for row in rows if row not in report.tasks]:
        which = ", ".join(map(str, untouched))
        warn_untouched("forget", f"task {which} was never trained, or was forgotten already")
    if not rows:
        warn_untouched("forget", "no task was given")
    return new, report


def prune(hat: HAT, state: HATState, keep: Any, dry_run: bool) -> tuple[HATState, Forgotten]:
    """The body of :meth:`hatfn.HAT.prune`."""
    check_state("prune", state, hat.wiring, hat.tasks)
    kept = check_each_task("prune", keep, hat.tasks)
    rest = [task for task in range(hat.tasks) if task not in kept]
    new, report = _forget(hat, state, rest, kept, dry_run)
    if not report.tasks:  # of "every other task" it is no surprise that some were never trained
        warn_untouched("prune", "no other task was ever trained, or all were forgotten already")
    return new, report


def _forget(
    hat: HAT, state: HATState, asked: Sequence[int], kept: Sequence[int] | None, dry_run: bool
) -> tuple[HATState, Forgotten]:
    """Forget those of the tasks that hold anything; ``kept`` is what ``forget`` calls ``locked``."""
    gone = hat.flags(state, asked)
    stays = (state.learned | state.active) & ~gone if kept is None else hat.flags(state, kept)
    initial, owns = _initial(hat, state, asked)
    touched = {row: own for row, own in owns.items() if not _untouched(state, row, own)}

    gates = binary_gates(state)
    used = exact_protection(hat.wiring, gates, hat.flags(state, [*touched]))
    held = exact_protection(hat.wiring, gates, stays)
    freed = {name: used[name] & ~held[name] for name in used}
    report = Forgotten(tuple(touched), freed, _counts(freed, held))
    if dry_run or not touched:
        return state, report

    own = Own(state.task_params, state.task_buffers, state.embeddings)
    for row, values in touched.items():
        own = Own(*(put(tree, row, new) for tree, new in zip(own, values, strict=True)))
    new = state._replace(
        params={n: torch.where(freed[n], initial[n], value) for n, value in state.params.items()},
        task_params=own.params,
        task_buffers=own.buffers,
        embeddings=own.embeddings,
        masks={group: mask & ~gone[:, None] for group, mask in state.masks.items()},
        learned=state.learned & ~gone,
        locked=state.locked & stays,
        active=state.active & ~gone,
    )
    moments = fresh_moments(hat.optimizer, new)
    return new._replace(protection=hat.protect(new, state), opt_state=moments), report


def _untouched(state: HATState, task: int, initial: Own) -> bool:
    """Whether a task is as it was before any training."""
    if bool(state.learned[task] | state.active[task]):
        return False
    now = Own(state.task_params, state.task_buffers, state.embeddings)
    return all(
        torch.equal(tree[name][task], value)
        for tree, values in zip(now, initial, strict=True)
        for name, value in values.items()
    )


def _counts(freed: dict[str, Tensor], held: dict[str, Tensor]) -> pd.DataFrame:
    rows = {}
    for name, entries in freed.items():
        gone, kept = int(entries.sum()), int(held[name].sum())
        rows[name] = {"forgotten": gone, "kept": kept, "unused": entries.numel() - gone - kept}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["forgotten", "kept", "unused"])
