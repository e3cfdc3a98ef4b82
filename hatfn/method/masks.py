"""Binary masks: which units a task uses."""

from __future__ import annotations

from torch import Tensor

from hatfn.method.gates import hard_gate
from hatfn.numerics.trees import over_groups
from hatfn.state import HATState


def binary_gates(state: HATState) -> dict[str, Tensor]:
    """The binary gates of all tasks, {group: (T, U)} bool; of stacked states (S, T, U).

    A learned task has its mask. For any other task, a gate is on where its embedding is above 0.
    """
    learned = state.learned[..., None]
    return over_groups(
        lambda mask, e: (learned & mask) | (~learned & hard_gate(e)), state.masks, state.embeddings
    )
