"""Binary masks: which units a task uses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hatfn.method.gates import hard_gate
from hatfn.numerics.trees import over_groups
from hatfn.state import HATState


def binary_gates(state: HATState, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The binary gates of all tasks, {group: (T, U)} bool; of stacked states (S, T, U).

    A learned task has its mask. For any other task, a gate is on where its embedding is above 0.

    Args:
        state: any state, or stacked ones.
        rows: the tasks, for the gates of a few of them, (K, U); None: all tasks.
    """
    learned, masks, embeddings = state.learned, state.masks, state.embeddings
    if rows is not None:
        learned = learned[[*rows]]
        masks, embeddings = ({g: leaf[[*rows]] for g, leaf in t.items()} for t in (masks, embeddings))
    known = learned[..., None]
    return over_groups(lambda mask, e: (known & mask) | (~known & hard_gate(e)), masks, embeddings)
