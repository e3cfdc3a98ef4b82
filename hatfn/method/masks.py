"""Binary masks: which units a task uses."""

from __future__ import annotations

from torch import Tensor

from hatfn.method.gates import hard_gate
from hatfn.numerics.trees import over_groups
from hatfn.state import HATState


def binary_gates(state: HATState) -> dict[str, Tensor]:
    """{group: (T, U)} bool: the masks of learned tasks, and what the others' embeddings would give.

    Of stacked states (S, T, U).
    """
    learned = state.learned[..., None]
    return over_groups(
        lambda mask, e: (learned & mask) | (~learned & hard_gate(e)), state.masks, state.embeddings
    )
