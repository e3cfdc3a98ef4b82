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
from hatfn.checks.values import check_list
from hatfn.engine.optimizer import Optimizer, fresh_opt_state, possible_opt_states
from hatfn.lifecycle.init import TaskValues, initial_values, padded
from hatfn.method.losses import Loss, Losses, check_losses, warn_one_class
from hatfn.numerics.ownership import aliased
from hatfn.numerics.trees import tree_map
from hatfn.spec import Spec
from hatfn.state import HATState

S = TypeVar("S", bound=Spec)


def grow(
    hat: S,
    state: HATState,
    classes: Sequence[int] | None = None,
    *,
    num_tasks: int | None = None,
    loss: Sequence[Loss] | None = None,
) -> tuple[S, HATState]:
    """A learner and a state with more tasks; the outputs of the old tasks stay equal to the bit.

    The new tasks start from the values that the seed gives them, as if they had been planned. (Only
    "sparse" embeddings depend on the number of tasks; those of the old tasks stay as they are.) The new
    tasks have the sparsity and quota of the last old task.

    Args:
        hat: the learner.
        state: any state of it; a task may be in the middle of its training.
        classes: the number of classes of each new task; heads are padded to the widest task.
        num_tasks: the number of new tasks, if the learner has no classes.
        loss: the loss of each new task, (output, y) -> (). None: the learner's own loss, or the loss of
            its last task if each task has its own.

    Returns:
        The learner of all tasks, and its state. The old pair can still be used.

    Raises:
        TypeError, ValueError: ``classes`` for a learner without classes; ``num_tasks`` for a learner
            with classes; no task.

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
    losses = _more_losses(hat, more, loss)
    warn_one_class("grow", classes, losses, first=hat.tasks)
    grown = replace(hat, network=network, tasks=tasks, hyper=hyper, loss=losses)

    seed, fresh = int(state.seed), bool(state.fresh)
    _, added = initial_values(grown, range(hat.tasks, tasks), seed, fresh)
    old = TaskValues(_wider(grown, state.task_params), state.task_buffers, state.embeddings)
    values: TaskValues = tree_map(
        lambda old, *new: torch.cat([old, torch.stack(new)]), old, *added.values()
    )
    false = torch.zeros(more, dtype=torch.bool, device=state.learned.device)
    new = state._replace(
        task_params=values.params,
        task_buffers=values.buffers,
        embeddings=values.embeddings,
        masks={g: torch.cat([m, m.new_zeros(more, m.shape[1])]) for g, m in state.masks.items()},
        learned=torch.cat([state.learned, false]),
        locked=torch.cat([state.locked, false]),
        active=torch.cat([state.active, false]),
        hyper={name: _longer(value, more) for name, value in state.hyper.items()},
    )
    opt_state = _wider_opt_state(hat.optimizer, state.opt_state, new)
    return grown, aliased(new._replace(opt_state=opt_state))


def _more_losses(hat: Spec, more: int, loss: Sequence[Loss] | None) -> Losses:
    """The losses of a learner with ``more`` further tasks; see :func:`grow`."""
    if loss is None:
        return (*hat.loss, *hat.loss[-1:] * more) if isinstance(hat.loss, tuple) else hat.loss
    check_list("grow", "loss", loss, "one function for each new task")
    added = check_losses("grow", tuple(loss), more)
    return (*(hat.loss_of(task) for task in range(hat.tasks)), *added)  # type: ignore[misc]


def _wider(hat: Spec, task_params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of tasks (T, ...), with heads padded to the classes of the widest task."""
    if hat.classes is None:
        return task_params
    widen = torch.vmap(partial(padded, widest=max(hat.classes)))
    return {**task_params, **{name: widen(task_params[name]) for name in hat.network.heads}}


def _longer(value: Tensor, more: int) -> Tensor:
    """A setting for ``more`` further tasks: if each task has its own, that of the last is repeated."""
    return torch.cat([value, value[-1:].expand(more)]) if value.dim() else value


def _wider_opt_state(optimizer: Optimizer, old: Any, state: HATState) -> Any:
    """The old optimizer state, padded to wider heads by a new one; or a new one if there is no old."""
    if optree.tree_structure(old) != optree.tree_structure(fresh_opt_state(optimizer, state)):
        return fresh_opt_state(optimizer, state)  # a loaded state may have no optimizer state

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
