"""The settings that build() fixed, and what follows from them for any state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hatfn.checks.values import shortened
from hatfn.engine.compiled import Graphs, Part
from hatfn.engine.memory import Memory
from hatfn.engine.optimizer import PureOptimizer
from hatfn.engine.ranks import Ranks
from hatfn.method.gates import flush, gate, hard_gate
from hatfn.method.losses import Loss, Losses, of_task, reads_labels
from hatfn.method.masks import binary_gates
from hatfn.method.names import Init
from hatfn.method.protection import Lock, Locked
from hatfn.network.network import Network
from hatfn.numerics.concrete import is_concrete
from hatfn.numerics.trees import over_groups, take
from hatfn.state import HATState
from hatfn.wiring import Wiring


@dataclass(frozen=True, eq=False, repr=False)
class Spec:
    """Everything about a learner that no step changes.

    :func:`hatfn.build` describes the settings that have the names of its arguments. A spec is equal
    only to itself. ``dataclasses.replace`` makes a new spec with an empty cache of compiled graphs.

    Attributes:
        network: the module, its wiring and its heads, without the numbers that tasks change.
        wiring: the wiring of the module, as it was traced.
        tasks: T, the number of tasks.
        optimizer: a pair of pure functions.
        loss: the losses of the tasks; :meth:`loss_of` gives that of one task.
        regularizer: (gates, cumulative mask, quota) -> ().
        gate: the function from s * e to a gate.
        embedding_init: build's ``init``, the name of how task embeddings start.
        protection: the protection rule.
        hyper: settings that become data of a state, see :class:`~hatfn.state.HATState`.
        compensated: whether the gradients of embeddings are compensated.
        max_norm: the largest norm of the gradient, or None.
        clamp: embeddings stay in [-clamp, clamp].
        decay_embeddings: whether weight decay acts on embeddings.
        ranks: the processes that train together.
        accumulate: the number of micro-batches that a batch is split into.
        compile: the part of a step that is compiled, or None.
        graphs: the graphs compiled so far; they save work and change no result.
        memory: the free memory of donated steps; it saves work and changes no result.
    """

    network: Network
    wiring: Wiring
    tasks: int
    optimizer: PureOptimizer
    loss: Losses
    regularizer: Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    embedding_init: Init
    protection: Lock
    hyper: Mapping[str, float | tuple[float, ...]]
    compensated: bool
    max_norm: float | None
    clamp: float
    decay_embeddings: bool
    ranks: Ranks
    accumulate: int
    compile: Part | None
    graphs: Graphs = field(default_factory=Graphs, init=False, repr=False)
    memory: Memory = field(default_factory=Memory, init=False, repr=False)

    def __repr__(self) -> str:
        """One line: the module, tasks, classes, units, shared weights."""
        wiring = self.wiring
        shared = sum(math.prod(role.shape) for role in wiring.shared.values())
        count = f"{shared}" if shared < 1_000_000 else f"{shared / 1e6:.3g} M"
        classes = "no classes" if self.classes is None else f"classes {shortened(self.classes)}"
        name, module = type(self).__name__, type(self.network.plain).__name__
        return (
            f"{name}({module}, {self.tasks} tasks, {classes}, "
            f"{len(wiring.groups)} groups of {sum(wiring.groups.values())} units, "
            f"{count} shared weights)"
        )

    @property
    def classes(self) -> tuple[int, ...] | None:
        """The number of classes of each task; None: tasks use the module's own output as it is."""
        return self.network.classes

    def loss_of(self, task: int) -> Loss:
        """The loss of one task, (output, y) -> ()."""
        return of_task(self.loss, task)

    def labels(self, task: int) -> int | None:
        """The number of class labels that a task's targets can have; None: they are no class labels."""
        return self.classes[task] if self.classes and reads_labels(self.loss_of(task)) else None

    @property
    def has_real_targets(self) -> bool:
        """Whether a task of a learner with classes has a loss that reads no class labels."""
        return any(self.labels(task) is None for task in range(self.tasks))

    def gates(self, embeddings: dict[str, Tensor], scale: float | Tensor | None) -> dict[str, Tensor]:
        """Gates of embeddings, {group: (..., U)} in [0, 1]: soft at scale s >= 0; for None binary."""
        if scale is None:
            return over_groups(lambda e: hard_gate(e).to(e.dtype), embeddings)

        def soft(e: Tensor) -> Tensor:
            s = scale.to(e.dtype) if isinstance(scale, Tensor) else scale
            return flush(gate(e, s, self.gate))

        return over_groups(soft, embeddings)

    def gates_of(self, state: HATState, task: int, scale: float | Tensor | None) -> dict[str, Tensor]:
        """The gates of a task, {group: (U,)}: soft at scale s; for None the mask, bool."""
        if scale is None:
            return take(state.masks, task)
        return self.gates(take(state.embeddings, task), scale)

    def used(self, state: HATState) -> dict[str, Tensor]:
        """The cumulative mask: the units that protected tasks use, {group: (U,)}, bool or in [0, 1].

        Of stacked states it is {group: (S, U)}.
        """
        locked = state.locked[..., None]
        if self.protection.units == "binary":
            return over_groups(lambda on: (on & locked).any(-2), binary_gates(state))
        soft = self.gates(state.embeddings, state.hyper["s_max"][..., None, None])
        return over_groups(lambda a: (a * locked).amax(-2), soft)

    def protect(self, state: HATState, before: HATState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The protection of each shared weight for the tasks that ``state.locked`` names.

        Weights on which no output depends keep the protection of ``before``: none.

        Args:
            state: the state with the new ``locked``.
            before: the state with the old one.

        Returns:
            The protection {name: tensor}, and the cumulative mask as from :meth:`used`.
        """
        added = _added(state.locked, before.locked)
        used = self.used(state) if added is None else self._more_used(state, before.used, added)
        inputs = Locked(state, used, before.protection, before.locked, added)
        protection = self.protection.rule(self.network.wiring, inputs)
        unread = {name: before.protection[name] for name in self.network.wiring.unread}
        return protection | unread, used

    def flags(self, state: HATState, rows: Sequence[int]) -> Tensor:
        """(T,) bool, True for the tasks in ``rows``."""
        flags = torch.zeros(self.tasks, dtype=torch.bool)
        flags[[*rows]] = True
        return flags.to(state.learned.device)

    def _more_used(
        self, state: HATState, before: dict[str, Tensor], added: Sequence[int]
    ) -> dict[str, Tensor]:
        """The cumulative mask, from that without the tasks ``added``."""
        if not added:
            return before
        if self.protection.units == "binary":
            more = over_groups(lambda on: on.any(-2), binary_gates(state, added))
        else:
            rows = {group: e[[*added]] for group, e in state.embeddings.items()}
            more = over_groups(lambda a: a.amax(-2), self.gates(rows, state.hyper["s_max"]))
        return over_groups(torch.maximum, before, more)


def _added(locked: Tensor, before: Tensor) -> list[int] | None:
    """The tasks that are protected now and were not before; None if one that was is so no longer."""
    readable = is_concrete(locked) and is_concrete(before)
    if not readable or bool((before & ~locked).any()):
        return None
    added: list[int] = (locked & ~before).nonzero().flatten().tolist()
    return added
