"""Who uses how much of a network, and what a state holds."""

from __future__ import annotations

import optree
import pandas as pd

from hatfn.checks.calls import check_state
from hatfn.checks.values import check_kind
from hatfn.method.protection import exact_protection
from hatfn.state import HATState
from hatfn.wiring import Wiring


def usage(state: HATState, wiring: Wiring) -> pd.DataFrame:
    """How much of each group each learned task uses, and how much is free.

    Args:
        state: any state.
        wiring: of the learner.

    Returns:
        A row per group: a column per learned task with the share of its units that are on, "free" the
        share that no learned task uses, and "units", their number.
    """
    _check_owned("usage", state, wiring)
    tasks = state.learned.nonzero().flatten().tolist()
    rows = {}
    for group, units in wiring.groups.items():
        masks = state.masks[group]
        shares = {task: masks[task].double().mean().item() for task in tasks}
        free = 1 - masks.any(0).double().mean().item()
        rows[group] = {**shares, "free": free, "units": units}
    return pd.DataFrame.from_dict(rows, orient="index")


def overlap(state: HATState, wiring: Wiring) -> pd.DataFrame:
    """How many units of each group two learned tasks have in common: what later ones reuse.

    Args:
        state: any state.
        wiring: of the learner.

    Returns:
        A row for each (group, task), a column for each task, in units; where a task meets itself: all
        units that it uses. ``overlap(...).groupby("task").sum()`` is over all groups.

    Example:
        >>> import hatfn, torch, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> hat = hatfn.build(
        ...     net, wiring := hatfn.trace(net, torch.zeros(1, 4), head="2"), [2, 2], torchopt.sgd(0.1)
        ... )
        >>> overlap(hat.consolidate(hat.consolidate(hat.init(0), 0), 1), wiring).shape
        (2, 2)
    """
    _check_owned("overlap", state, wiring)
    tasks = state.learned.nonzero().flatten().tolist()
    rows: list[list[int]] = []
    for group in wiring.groups:
        on = state.masks[group][tasks].long()
        rows += (on @ on.T).tolist()
    index = pd.MultiIndex.from_product([[*wiring.groups], tasks], names=["group", "task"])
    return pd.DataFrame(rows, index=index, columns=tasks)


def memory(state: HATState) -> pd.Series[int]:
    """The bytes of each part of a state.

    One copy of the weights, one byte per shared weight for its (exact) protection, and T of everything
    that every task has for itself.

    Args:
        state: any state.

    Returns:
        Bytes of "params", "protection", "task_params", "task_buffers", "embeddings", "masks",
        "opt_state" and "rest" (numbers and flags); their sum is all that the state holds.
    """
    check_kind("memory", "state", state, HATState, "a HATState, or stacked ones")
    parts = {
        name: sum(leaf.numel() * leaf.element_size() for leaf in optree.tree_leaves(part))
        for name, part in state._asdict().items()
    }
    named = {name: parts.pop(name) for name in _PARTS}
    return pd.Series({**named, "rest": sum(parts.values())})


_PARTS = (
    "params", "protection", "task_params", "task_buffers", "embeddings", "masks", "opt_state",
)  # fmt: skip


def free_weights(state: HATState, wiring: Wiring) -> float:
    """The share of shared weight entries that no learned task depends on, in [0, 1]."""
    _check_owned("free_weights", state, wiring)
    held = exact_protection(wiring, state.masks, state.learned)
    total = sum(entries.numel() for entries in held.values())
    return 1 - sum(int(entries.sum()) for entries in held.values()) / max(total, 1)


def _check_owned(where: str, state: HATState, wiring: Wiring) -> None:
    check_kind(where, "wiring", wiring, Wiring, "that of the learner: hat.wiring")
    check_state(where, state, wiring)
