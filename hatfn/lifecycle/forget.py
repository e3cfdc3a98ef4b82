"""The life of tasks after training: forgetting them, and adding new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from hatfn.engine.optimizer import fresh_opt_state
from hatfn.lifecycle.init import Own, initial_values
from hatfn.method.masks import binary_gates
from hatfn.method.protection import exact_protection
from hatfn.numerics.trees import put
from hatfn.spec import Spec
from hatfn.state import HATState


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

    def __repr__(self) -> str:
        """One line: the tasks, and how many weights are given back."""
        given = int(self.counts["forgotten"].sum())
        return f"Forgotten(tasks {[*self.tasks]}, {given} shared weights given back)"


def forget(
    spec: Spec, state: HATState, asked: Sequence[int], kept: Sequence[int] | None, dry_run: bool
) -> tuple[HATState, Forgotten]:
    """Forget those of the tasks that hold anything; see :meth:`hatfn.HAT.forget`.

    Args:
        spec: of the learner.
        state: any state.
        asked: the tasks to forget.
        kept: the tasks that stay unchanged; None: every other one that is learned or open.
        dry_run: only report.
    """
    gone = spec.flags(state, asked)
    stays = (state.learned | state.active) & ~gone if kept is None else spec.flags(state, kept)
    initial, owns = initial_values(spec, asked, int(state.seed), bool(state.fresh))
    touched = {row: own for row, own in owns.items() if not _untouched(state, row, own)}

    gates = binary_gates(state)
    used = exact_protection(spec.network.wiring, gates, spec.flags(state, [*touched]))
    held = exact_protection(spec.network.wiring, gates, stays)
    freed = {name: used[name] & ~held[name] for name in used}
    # What no output depends on was trained by these tasks, too.
    unread = spec.network.wiring.unread
    freed |= {name: torch.ones_like(state.params[name], dtype=torch.bool) for name in unread}
    held |= {name: ~freed[name] for name in unread}
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
    protection, _ = spec.protect(new, state)
    return new._replace(protection=protection, opt_state=fresh_opt_state(spec.optimizer, new)), report


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
