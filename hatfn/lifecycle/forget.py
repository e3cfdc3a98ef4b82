"""Forgetting tasks: what only they used goes back to its initial values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from hatfn.engine.optimizer import fresh_opt_state
from hatfn.lifecycle.init import TaskValues, initial_values
from hatfn.method.masks import binary_gates
from hatfn.method.protection import exact_protection
from hatfn.numerics.ownership import aliased
from hatfn.numerics.trees import put
from hatfn.spec import Spec
from hatfn.state import HATState


class Forgotten(NamedTuple):
    """A report of the weights that forgetting gives back, or would give back in a dry run.

    Attributes:
        tasks: the tasks that are forgotten.
        params: {name: bool tensor shaped like the weight}: the shared entries that only these tasks
            used. They go back to their initial values.
        counts: a row per shared parameter with numbers of entries: "forgotten", "kept" (a remaining
            task uses them), "unused" (no task used them).
    """

    tasks: tuple[int, ...]
    params: dict[str, Tensor]
    counts: pd.DataFrame

    def __repr__(self) -> str:
        """One line: the tasks, and the number of weights that are given back."""
        count = int(self.counts["forgotten"].sum())
        return f"Forgotten(tasks {[*self.tasks]}, {count} shared weights given back)"


def forget(
    spec: Spec, state: HATState, asked: Sequence[int], kept: Sequence[int] | None, dry_run: bool
) -> tuple[HATState, Forgotten]:
    """Forget those of the tasks that have more than initial values; see :meth:`hatfn.HAT.forget`.

    Args:
        spec: the settings of the learner.
        state: any state.
        asked: the tasks to forget.
        kept: the tasks that stay unchanged; None: every other task that is learned or open.
        dry_run: change nothing, report only.
    """
    forgotten = spec.flags(state, asked)
    stays = (state.learned | state.active) & ~forgotten if kept is None else spec.flags(state, kept)
    initial, of_tasks = initial_values(spec, asked, int(state.seed), bool(state.fresh))
    touched = {row: own for row, own in of_tasks.items() if not _untouched(state, row, own)}

    gates = binary_gates(state)
    used = exact_protection(spec.wiring, gates, spec.flags(state, [*touched]))
    still_used = exact_protection(spec.wiring, gates, stays)
    freed = {name: used[name] & ~still_used[name] for name in used}
    # These tasks also trained the weights that no output depends on.
    unread = spec.wiring.unread
    freed |= {name: torch.ones_like(state.params[name], dtype=torch.bool) for name in unread}
    still_used |= {name: ~freed[name] for name in unread}
    report = Forgotten(tuple(touched), freed, _counts(freed, still_used))
    if dry_run or not touched:
        return state, report

    values = TaskValues(state.task_params, state.task_buffers, state.embeddings)
    for row, reset in touched.items():
        values = TaskValues(*(put(tree, row, new) for tree, new in zip(values, reset, strict=True)))
    new = state._replace(
        params={n: torch.where(freed[n], initial[n], value) for n, value in state.params.items()},
        task_params=values.params,
        task_buffers=values.buffers,
        embeddings=values.embeddings,
        masks={group: mask & ~forgotten[:, None] for group, mask in state.masks.items()},
        learned=state.learned & ~forgotten,
        locked=state.locked & stays,
        active=state.active & ~forgotten,
    )
    protection, used = spec.protect(new, state)
    opt_state = fresh_opt_state(spec.optimizer, new)
    return aliased(new._replace(protection=protection, used=used, opt_state=opt_state)), report


def _untouched(state: HATState, task: int, initial: TaskValues) -> bool:
    """Whether a task is as it was before any training."""
    if bool(state.learned[task] | state.active[task]):
        return False
    now = TaskValues(state.task_params, state.task_buffers, state.embeddings)
    return all(
        torch.equal(tree[name][task], value)
        for tree, values in zip(now, initial, strict=True)
        for name, value in values.items()
    )


def _counts(freed: dict[str, Tensor], still_used: dict[str, Tensor]) -> pd.DataFrame:
    rows = {}
    for name, entries in freed.items():
        forgotten, kept = int(entries.sum()), int(still_used[name].sum())
        unused = entries.numel() - forgotten - kept
        rows[name] = {"forgotten": forgotten, "kept": kept, "unused": unused}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["forgotten", "kept", "unused"])
