"""grow(): more tasks for a learner and its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from hatfn.checks.calls import check_owned
from hatfn.checks.capacity import check_groups
from hatfn.checks.settings import check_more
from hatfn.engine.optimizer import Optimizer, fresh_opt_state, possible_opt_states
from hatfn.lifecycle.init import Own, initial_values, padded
from hatfn.numerics.trees import tree_map
from hatfn.spec import Spec
from hatfn.state import HATState

S = TypeVar("S", bound=Spec)


def grow(
    hat: S, state: HATState, classes: Sequence[int] | None = None, *, num_tasks: int | None = None
) -> tuple[S, HATState]:
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
    check_owned("grow", hat, state)
    more = check_more(classes, num_tasks, hat.classes, hat.wiring)
    tasks = hat.tasks + more
    check_groups(hat.wiring, tasks, "grow")
    counts = None if hat.classes is None else (*hat.classes, *(classes or ()))
    hyper = {
        name: (*value, *value[-1:] * more) if isinstance(value, tuple) else value
        for name, value in hat.hyper.items()
    }
    network = hat.network._replace(classes=counts)
    grown = replace(hat, network=network, tasks=tasks, hyper=hyper)

    seed, fresh = int(state.seed), bool(state.fresh)
    _, added = initial_values(grown, range(hat.tasks, tasks), seed, fresh)
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
    return grown, new._replace(opt_state=_wider_opt_state(hat.optimizer, state.opt_state, new))


def _wider(hat: Spec, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked heads (T, ...) as wide as the widest task's."""
    if hat.classes is None:
        return own
    widen = torch.vmap(partial(padded, widest=max(hat.classes)))
    return {**own, **{name: widen(own[name]) for name in hat.network.heads}}


def _longer(value: Tensor, more: int) -> Tensor:
    """A setting of more tasks, if it is one of each task: the last one's, again."""
    return torch.cat([value, value[-1:].expand(more)]) if value.dim() else value


def _wider_opt_state(optimizer: Optimizer, old: Any, state: HATState) -> Any:
    """The moments there were, those of wider heads with the new ones' values behind; else new ones."""
    if optree.tree_structure(old) != optree.tree_structure(fresh_opt_state(optimizer, state)):
        return fresh_opt_state(optimizer, state)  # a loaded state may have none

    def fits(old: Tensor, new: Tensor) -> bool:
        return all(had <= has for had, has in zip(old.shape, new.shape, strict=True))

    def pad(old: Tensor, new: Tensor) -> Tensor:
        if old.shape == new.shape:
            return old
        wide = new.clone()
        wide[tuple(map(slice, old.shape))] = old
        return wide

    possible = possible_opt_states(optimizer, state)
    leaves = optree.tree_leaves
    return next(tree_map(pad, old, new) for new in possible if all(map(fits, leaves(old), leaves(new))))
