"""The life of tasks after training: forgetting them, and adding new ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import pandas as pd
import torch
from torch import Tensor

from hatfn import checks, settings
from hatfn.initial import Own, initial_own, initial_values, widened
from hatfn.locks import exact_protection
from hatfn.optimizer import Optimizer, fresh_moments, possible_moments
from hatfn.state import HATState, binary_gates, put, tree_map

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
    checks.check_state("forget", state, hat.wiring, hat.tasks)
    rows = checks.check_each_task("forget", task, hat.tasks)
    kept = checks.check_locked("forget", locked, rows, hat.tasks)
    new, report = _forget(hat, state, rows, kept, dry_run)
    if untouched := [row for row in rows if row not in report.tasks]:
        which = ", ".join(map(str, untouched))
        checks.warn_untouched("forget", f"task {which} was never trained, or was forgotten already")
    if not rows:
        checks.warn_untouched("forget", "no task was given")
    return new, report


def prune(hat: HAT, state: HATState, keep: Any, dry_run: bool) -> tuple[HATState, Forgotten]:
    """The body of :meth:`hatfn.HAT.prune`."""
    checks.check_state("prune", state, hat.wiring, hat.tasks)
    kept = checks.check_each_task("prune", keep, hat.tasks)
    rest = [task for task in range(hat.tasks) if task not in kept]
    new, report = _forget(hat, state, rest, kept, dry_run)
    if not report.tasks:  # of "every other task" it is no surprise that some were never trained
        checks.warn_untouched("prune", "no other task was ever trained, or all were forgotten already")
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


def grow(
    hat: HAT, state: HATState, classes: Sequence[int] | None = None, *, num_tasks: int | None = None
) -> tuple[HAT, HATState]:
    """A learner and a state with more tasks; what was there keeps its outputs to the bit.

    The new tasks start from what the seed gives them, as if they had been planned. (Embeddings drawn as
    "sparse" depend on the number of tasks, and those that were drawn stay.) Sparsity and quota of the
    last task hold for them as well.

    Args:
        hat: the learner.
        state: any state of it, in the middle of a task's training or not.
        classes: the number of classes of each new task; heads are padded to the widest.
        num_tasks: how many new tasks, where the learner has no classes.

    Returns:
        The learner of all tasks, and its state. The old pair can still be used.

    Raises:
        TypeError, ValueError: classes of a learner that has none, or the other way round; no task.

    Warns:
        HATWarning: a group with fewer units than there are tasks.

    Example:
        >>> import hatfn, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4), head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2], optimizer=torchopt.adam(1e-3))
        >>> state = hat.consolidate(hat.init(seed=0), task=0)
        >>> hat, state = grow(hat, state, classes=[5, 3])
        >>> hat.classes, state.learned.tolist()
        ((2, 5, 3), [True, False, False])
    """
    checks.check_owned("grow", hat, state)
    more = settings.check_more(classes, num_tasks, hat.classes, hat.wiring)
    tasks = hat.tasks + more
    settings.check_groups(hat.wiring, tasks, "grow")
    counts = None if hat.classes is None else (*hat.classes, *(classes or ()))
    hyper = {
        name: (*value, *value[-1:] * more) if isinstance(value, tuple) else value
        for name, value in hat.hyper.items()
    }
    grown = hat._replace(network=hat.network._replace(classes=counts), tasks=tasks, hyper=hyper)

    _, added = _initial(grown, state, range(hat.tasks, tasks))
    own = Own(_wider(grown, state.task_params), state.task_buffers, state.embeddings)
    own = tree_map(lambda old, *new: torch.cat([old, torch.stack(new)]), own, *added.values())
    no = torch.zeros(more, dtype=torch.bool, device=state.learned.device)
    new = state._replace(
        task_params=own.params,
        task_buffers=own.buffers,
        embeddings=own.embeddings,
        masks={g: torch.cat([m, m.new_zeros(more, m.shape[1])]) for g, m in state.masks.items()},
        learned=torch.cat([state.learned, no]),
        locked=torch.cat([state.locked, no]),
        active=torch.cat([state.active, no]),
        hyper={name: _longer(value, more) for name, value in state.hyper.items()},
    )
    return grown, new._replace(opt_state=_wider_moments(hat.optimizer, state.opt_state, new))


def _initial(
    hat: HAT, state: HATState, tasks: Sequence[int]
) -> tuple[dict[str, Tensor], dict[int, Own]]:
    """What the shared weights of a state, and some of its tasks, started with."""
    seed, fresh = int(state.seed), bool(state.fresh)
    values = initial_values(hat.network, seed, fresh)
    owns = {
        task: initial_own(hat.network, values, hat.tasks, task, hat.embedding_init, seed, fresh)
        for task in tasks
    }
    return values, owns


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


def _wider(hat: HAT, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked heads (T, ...) as wide as the widest task's."""
    if hat.classes is None:
        return own
    widen = torch.vmap(partial(widened, widest=max(hat.classes)))
    return {**own, **{name: widen(own[name]) for name in hat.network.heads}}


def _longer(value: Tensor, more: int) -> Tensor:
    """A setting of more tasks, if it is one of each task: the last one's, again."""
    return torch.cat([value, value[-1:].expand(more)]) if value.dim() else value


def _wider_moments(optimizer: Optimizer, old: Any, state: HATState) -> Any:
    """The moments there were, those of wider heads with the new ones' values behind; else new ones."""
    if optree.tree_structure(old) != optree.tree_structure(fresh_moments(optimizer, state)):
        return fresh_moments(optimizer, state)  # a loaded state may have none

    def fits(old: Tensor, new: Tensor) -> bool:
        return all(had <= has for had, has in zip(old.shape, new.shape, strict=True))

    def pad(old: Tensor, new: Tensor) -> Tensor:
        if old.shape == new.shape:
            return old
        wide = new.clone()
        wide[tuple(map(slice, old.shape))] = old
        return wide

    possible = possible_moments(optimizer, state)
    leaves = optree.tree_leaves
    return next(tree_map(pad, old, new) for new in possible if all(map(fits, leaves(old), leaves(new))))
