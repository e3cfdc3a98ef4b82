"""How many units and weights tasks use, and how much memory a state takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import pandas as pd

from hatfn.checks.calls import check_state, check_unspent
from hatfn.checks.values import check_kind
from hatfn.method.protection import exact_protection
from hatfn.numerics.trees import unstack
from hatfn.state import HATState
from hatfn.wiring import Wiring


def usage(state: HATState, wiring: Wiring) -> pd.DataFrame:
    """How much of each group each learned task uses, and how much is free.

    Args:
        state: any state, or stacked states.
        wiring: the wiring of the learner.

    Returns:
        A row per group, or per (replica, group). A column per learned task has the share of the group's
        units that are on for the task. "free" is the share that no learned task uses, and "units" the
        number of units.
    """
    states = _checked("usage", state, wiring)
    if isinstance(states, list):
        return pd.concat({i: usage(one, wiring) for i, one in enumerate(states)}, names=["replica"])
    tasks = state.learned.nonzero().flatten().tolist()
    rows = {}
    for group, units in wiring.groups.items():
        masks = state.masks[group]
        shares = {task: masks[task].double().mean().item() for task in tasks}
        free = 1 - masks.any(0).double().mean().item()
        rows[group] = {**shares, "free": free, "units": units}
    return pd.DataFrame.from_dict(rows, orient="index")


def overlap(state: HATState, wiring: Wiring) -> pd.DataFrame:
    """How many units of each group two learned tasks have in common.

    Args:
        state: any state, or stacked states.
        wiring: the wiring of the learner.

    Returns:
        A row for each (group, task), or (replica, group, task), and a column for each task, in units.
        The entry of a task with itself is the number of units that it uses.
        ``overlap(...).groupby("task").sum()`` gives the sums over all groups.

    Example:
        >>> import hatfn, torch, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> hat = hatfn.build(
        ...     net, wiring := hatfn.trace(net, torch.zeros(1, 4), head="2"), [2, 2], torchopt.sgd(0.1)
        ... )
        >>> overlap(hat.consolidate(hat.consolidate(hat.init(0), 0), 1), wiring).shape
        (2, 2)
    """
    states = _checked("overlap", state, wiring)
    if isinstance(states, list):
        return pd.concat({i: overlap(one, wiring) for i, one in enumerate(states)}, names=["replica"])
    tasks = state.learned.nonzero().flatten().tolist()
    rows: list[list[int]] = []
    for group in wiring.groups:
        on = state.masks[group][tasks].long()
        rows += (on @ on.T).tolist()
    index = pd.MultiIndex.from_product([[*wiring.groups], tasks], names=["group", "task"])
    return pd.DataFrame(rows, index=index, columns=tasks)


def memory(state: HATState) -> pd.Series[int]:
    """The bytes of each part of a state.

    A state has one copy of the shared weights, one byte per shared weight for its (exact) protection,
    and T copies of everything that tasks do not share.

    Args:
        state: any state.

    Returns:
        Bytes of "params", "protection", "task_params", "task_buffers", "embeddings", "masks",
        "opt_state" and "rest" (flags and other small leaves). Their sum is the size of the state.
    """
    check_kind("memory", "state", state, HATState, "a HATState, or stacked ones")
    check_unspent("memory", state)
    parts = {
        name: sum(leaf.numel() * leaf.element_size() for leaf in optree.tree_leaves(part))
        for name, part in state._asdict().items()
    }
    named = {name: parts.pop(name) for name in _PARTS}
    return pd.Series({**named, "rest": sum(parts.values())})


_PARTS = (
    "params", "protection", "task_params", "task_buffers", "embeddings", "masks", "opt_state",
)  # fmt: skip


def free_weights(state: HATState, wiring: Wiring) -> Any:
    """The share of shared weight entries that no learned task depends on, in [0, 1].

    Args:
        state: any state, or stacked states.
        wiring: the wiring of the learner.

    Returns:
        A float; for stacked states an array (S,).
    """
    states = _checked("free_weights", state, wiring)
    if isinstance(states, list):
        return np.array([free_weights(one, wiring) for one in states])
    every = exact_protection(wiring, state.masks, state.learned)
    protected = {name: entries for name, entries in every.items() if name in state.params}
    total = sum(entries.numel() for entries in protected.values())
    return 1 - sum(int(entries.sum()) for entries in protected.values()) / max(total, 1)


def _checked(where: str, state: HATState, wiring: Wiring) -> HATState | list[HATState]:
    """The state after checks, or a list of the states that were stacked."""
    check_kind(where, "wiring", wiring, Wiring, "that of the learner: hat.wiring")
    if isinstance(state, HATState) and state.learned.dim() == 2:
        return unstack(state, len(state.learned))
    check_state(where, state, wiring)
    return state
