"""Opening a task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from hatfn.lifecycle.similarity import similarity
from hatfn.numerics.trees import over_groups, put, take
from hatfn.state import HATState

if TYPE_CHECKING:
    from hatfn.learner import HAT


def warm_start(
    hat: HAT,
    state: HATState,
    task: int,
    source: int | Literal["similar"],
    batch: tuple[Tensor, Tensor] | None,
) -> HATState:
    """The state with a task that starts from another's subnetwork: gates, norms and statistics.

        e <- (clip(e_source, -1, 1) + e) / sqrt(2)

    Learned embeddings lie far out, where gates hardly move: taken as they are, they leave a task no
    choice and little capacity of its own. So they are drawn in to the spread of initial ones, and mixed
    with the task's.

    Args:
        hat: the learner.
        state: any state.
        task: that starts.
        source: a learned task, or "similar": the one that is most like it, if there is any.
        batch: of the task, where the most similar one is asked for.
    """
    row = source
    if row == "similar":
        others = [other for other in state.learned.nonzero().flatten().tolist() if other != task]
        if not others or batch is None:
            return state
        row = others[int(similarity(hat, state, batch, others).argmin())]
    mixed = over_groups(
        lambda theirs, own: (theirs.clamp(-1, 1) + own) / math.sqrt(2),
        take(state.embeddings, row),
        take(state.embeddings, task),
    )
    heads = hat.network.heads if hat.classes else ()
    lent = {name: leaf for name, leaf in state.task_params.items() if name not in heads}
    return state._replace(
        task_params=state.task_params | put(lent, task, take(lent, row)),
        task_buffers=put(state.task_buffers, task, take(state.task_buffers, row)),
        embeddings=put(state.embeddings, task, mixed),
    )
