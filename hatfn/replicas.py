"""Train S replicas at once: a learner's functions for states with a leading axis S."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hatfn.checks.batches import (
    axes_of,
    check_axis,
    check_batches,
    check_input,
    check_inputs,
    check_pair,
    inputs_alone,
)
from hatfn.checks.calls import (
    check_active,
    check_chosen,
    check_donatable,
    check_learned,
    check_locked,
    check_state,
    check_task,
    check_tasks,
    is_several,
)
from hatfn.checks.capacity import (
    check_alive,
    check_free,
    check_left,
    check_statistics,
    check_unfinished,
)
from hatfn.checks.replicas import (
    bounded_scales,
    check_alike_states,
    check_replica,
    check_replicated,
    check_seeds,
    check_stacked,
)
from hatfn.checks.settings import check_checkpointing
from hatfn.checks.values import check_count, check_learner, check_list
from hatfn.learner import HAT, X
from hatfn.lifecycle.begin import begin
from hatfn.lifecycle.consolidate import consolidate, recalibrate
from hatfn.network.network import Output
from hatfn.network.outputs import forward, only_learned, predict
from hatfn.numerics.arguments import Inputs, map_leaves
from hatfn.numerics.ownership import aliased
from hatfn.numerics.trees import tree_map
from hatfn.numerics.vmap import batchable, batched
from hatfn.state import HATState
from hatfn.training.objective import is_nested
from hatfn.training.step import step
from hatfn.training.types import Info, Scale, report


def replicate(hat: HAT, seeds: Iterable[int], **hyper: float | Sequence[float]) -> HATState:
    """The states of S learners before the first task, stacked: every leaf gets a leading axis S.

    Replica i is ``hat.init(seeds[i], fresh=True)``: it has its own weights, heads and embeddings.
    :class:`Replicas` trains them together.

    Args:
        hat: the learner.
        seeds: one for each replica.
        hyper: settings of ``state.hyper``: "lr" (a factor on the learning rate), "sparsity", "quota",
            "s_max" or "compensation". A value is one number for all replicas, or a list of one for
            each; it holds for all tasks. If build() got ``compensation="s_max"``, the compensation
            follows a new "s_max".

    Returns:
        The stacked states. ``replica(states, i)`` is one of them.

    Raises:
        TypeError, ValueError: there are no seeds; a setting is unknown or out of its range; there are
            more or fewer values than seeds.

    Example:
        >>> import hatfn, torchopt
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4), head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2, 2], optimizer=torchopt.adam(1e-3))
        >>> many, states = Replicas(hat), replicate(hat, seeds=range(3), sparsity=[0.1, 0.5, 1.0])
        >>> states = many.begin(states, task=0)
        >>> x, y = torch.randn(3, 16, 4), torch.randint(0, 2, (3, 16))  # a batch for each replica
        >>> states, info = many.update(states, (x, y), task=0, scale=100.0)
        >>> info.loss.shape
        torch.Size([3])
    """
    check_learner("replicate", hat)
    states = [hat.init(seed, fresh=True) for seed in check_seeds(seeds)]
    values = check_replicated(hyper, hat.hyper, len(states))
    if "s_max" in values and hat.hyper["compensation"] == hat.hyper["s_max"]:
        values.setdefault("compensation", values["s_max"])
    stacked = stack(states)

    def spread(value: list[float], old: Tensor) -> Tensor:
        one = torch.tensor(value, dtype=old.dtype, device=old.device)
        return one.reshape(-1, *(1,) * (old.dim() - 1)).expand_as(old).clone()

    changed = {name: spread(value, stacked.hyper[name]) for name, value in values.items()}
    return stacked._replace(hyper={**stacked.hyper, **changed})


def stack(states: Sequence[HATState]) -> HATState:
    """Stack states into replicas, in the given order.

    Args:
        states: at least one state; all are of one learner.

    Returns:
        The stacked states: every leaf has a leading axis S.

    Raises:
        TypeError, ValueError: ``states`` is not a list of states, or is empty; shapes differ.
    """
    check_alike_states(states)
    stacked: HATState = tree_map(lambda *leaves: torch.stack(leaves), *states)
    return stacked


def replica(states: HATState, index: int) -> HATState:
    """One of S stacked states, for functions that take a single state.

    Args:
        states: S stacked states.
        index: the number of the replica, from 0 to S - 1.

    Raises:
        TypeError, ValueError: the states are not stacked, or the index is out of range.
    """
    check_stacked("replica", states)
    check_replica(index, len(states.learned))
    one: HATState = tree_map(lambda leaf: leaf[index], states)
    return aliased(one)


class Replicas(NamedTuple):
    """A learner's functions for S states at once.

    Each method does what the method of :class:`hatfn.HAT` with the same name does. States and results
    have an axis S in front. A batch is one for all replicas, x (B, ...) and y (B,), or has one slice
    for each replica, x (S, B, ...) and y (S, B). The number of axes of x tells which of the two it is.
    ``shared=True`` demands the first form, ``shared=False`` the second. A scale is one number for all
    replicas, or (S,). Each replica draws its own dropout masks.

    Attributes:
        hat: the learner.
    """

    hat: HAT

    def begin(
        self,
        states: HATState,
        task: int | Sequence[int],
        locked: Sequence[int] | None = None,
        carry: bool = False,
        init_from: int | Literal["similar"] | None = None,
        batch: tuple[X, Tensor] | None = None,
    ) -> HATState:
        """:meth:`hatfn.HAT.begin` for every replica; the batch is x (S, B, ...) and y (S, B)."""
        first = self._checked("begin", states)
        if init_from is not None:  # replicas may choose different tasks, and vmap cannot choose
            pairs: Iterable[Any] = [[None]] * len(states.learned)
            if batch is not None:
                pairs = self._pairs("begin", states, [batch])
            return stack(
                [
                    self.hat.begin(replica(states, i), task, locked, carry, init_from, *pair)
                    for i, pair in enumerate(pairs)
                ]
            )
        rows = check_tasks("begin", task, self.hat.tasks)
        held = check_locked("begin", locked, rows, self.hat.tasks)
        if held is None:
            check_unfinished("begin", rows, first)
        begun: HATState = _each(lambda state: begin(self.hat, state, rows, held, carry), states)
        check_free("begin", rows, begun.used)
        return begun

    def update(
        self,
        states: HATState,
        batch: tuple[X, Tensor],
        task: int | Sequence[int],
        scale: float | Tensor | None,
        shared: bool | None = None,
        donate: bool = False,
    ) -> tuple[HATState, Info]:
        """:meth:`hatfn.HAT.update` for every replica, on its own batch (S, B, ...) or one (B, ...).

        ``info.ok`` is (S,): a replica whose step is refused keeps its values, and the others go on.
        """
        hat, first = self.hat, self._checked("update", states)
        rows = check_tasks("update", task, hat.tasks)
        if hat.ranks.size > 1:
            raise ValueError(
                f"update: ranks.size={hat.ranks.size}, and replicas train in one process. Expected a "
                f"learner built without ranks: each process trains its own seeds."
            )
        check_checkpointing("update", hat.network.recomputes)
        check_active("update", first, rows, together=True, waits=False)
        x, _ = check_pair("update", batch)
        shared = self._is_shared("update", states, x, shared, axes=int(is_several(task)))
        labels = [hat.labels(row) for row in rows]
        batches = check_batches(batch, task, rows, labels, hat.wiring, lead=0 if shared else 1)
        scale = bounded_scales("update", scale, states.hyper["s_max"])
        check_donatable("update", donate, states, donate and is_nested(states, batches, scale))
        with batchable(states.learned.device):
            new, applied = step(hat, states, batches, rows, scale, lead=1, shared=shared, donate=donate)
        return new, report(applied, is_several(task))

    def recalibrate(
        self,
        states: HATState,
        batches: Iterable[tuple[X, Any] | X],
        task: int,
        shared: bool | None = None,
    ) -> HATState:
        """:meth:`hatfn.HAT.recalibrate` for every replica, on batches (S, B, ...) or (B, ...)."""
        hat, first = self.hat, self._checked("recalibrate", states)
        row = check_task("recalibrate", task, hat.tasks)
        check_active("recalibrate", first, [row])
        check_list("recalibrate", "batches", batches, "a list of batches [(x, y)], or of inputs [x]")
        batches = list(batches)
        if batches:
            first_x = inputs_alone("recalibrate", batches[0])
            shared = self._is_shared("recalibrate", states, first_x, shared)
        lead = 0 if shared else 1
        inputs = list(check_inputs("recalibrate", batches, hat.wiring, lead, len(states.learned)))
        axes = None if shared else [_EACH for _ in inputs]
        new: HATState = _each(lambda state, xs: recalibrate(hat, state, xs, row), states, inputs, axes)
        return new

    def consolidate(
        self, states: HATState, task: int, batches: Sequence[tuple[X, Tensor]] | None = None
    ) -> HATState:
        """:meth:`hatfn.HAT.consolidate` for every replica; a batch is x (S, B, ...) and y (S, B)."""
        self._checked("consolidate", states)
        row = check_task("consolidate", task, self.hat.tasks)
        if batches is None:
            check_statistics("consolidate", row, states)
        else:
            check_list("consolidate", "batches", batches, "a list of pairs [(x, y)]")
        if batches:  # replicas may decide differently, and vmap cannot decide
            every = enumerate(self._pairs("consolidate", states, batches))
            return stack([self.hat.consolidate(replica(states, i), row, pairs) for i, pairs in every])
        closed: HATState = _each(lambda state: consolidate(self.hat, state, row), states)
        check_alive("consolidate", row, {group: m[:, row] for group, m in closed.masks.items()})
        check_left("consolidate", row, states, closed)
        return closed

    def forward(
        self,
        states: HATState,
        x: X,
        task: int,
        scale: float | Tensor | None = None,
        shared: bool | None = None,
    ) -> Output:
        """:meth:`hatfn.HAT.forward` for every replica, (S, B, classes)."""
        hat, first = self.hat, self._checked("forward", states)
        row = check_task("forward", task, hat.tasks)
        if scale is None:
            check_learned("forward", first, [row], waits=False)
        scale = bounded_scales("forward", scale, states.hyper["s_max"])
        shared = self._is_shared("forward", states, x, shared)
        inputs = check_input("forward", x, hat.wiring, lead=0 if shared else 1)

        def one(state: HATState, x: Inputs, scale: Scale) -> Output:
            output = forward(hat.network, state, x, row, hat.gates_of(state, row, scale))
            return only_learned(state.learned[row], output) if scale is None else output

        each = 0 if isinstance(scale, Tensor) and scale.dim() == 1 else None
        with batchable(states.learned.device):
            return batched(one, (0, None if shared else _EACH, each))(states, inputs, scale)

    def predict(
        self,
        states: HATState,
        x: X,
        tasks: Sequence[int] | None = None,
        chunk_size: int | None = None,
        shared: bool | None = None,
    ) -> Output:
        """:meth:`hatfn.HAT.predict` for every replica, (S, N, B, C)."""
        network = self.hat.network
        first = self._checked("predict", states)
        rows = check_chosen("predict", first, tasks, self.hat.tasks, waits=False)
        shared = self._is_shared("predict", states, x, shared)
        inputs = check_input("predict", x, self.hat.wiring, lead=0 if shared else 1)
        if chunk_size is not None:
            check_count("predict", "chunk_size", chunk_size)
        return _each(
            lambda state, x: predict(network, state, x, rows, chunk_size),
            states,
            inputs,
            None if shared else _EACH,
        )

    def _checked(self, where: str, states: HATState) -> HATState:
        """The states, after checks, with (T,) flags: a flag is True if it is for all replicas."""
        check_learner(where, self.hat)
        check_stacked(where, states)
        first = states._replace(learned=states.learned.all(0), active=states.active.all(0))
        check_state(where, first, self.hat.wiring, self.hat.tasks)
        return first

    def _is_shared(
        self, where: str, states: HATState, x: Any, shared: bool | None, axes: int = 0
    ) -> bool:
        """Whether all replicas get the same batch.

        Args:
            where: the method that was called.
            states: S stacked states.
            x: the inputs as the caller gave them.
            shared: the argument of the caller; None: the number of axes of x decides.
            axes: the number of axes of x between that of replicas and that of samples.
        """
        if shared is None:
            shared = axes_of(x, self.hat.wiring) == len(self.hat.wiring.input_shape) + 1 + axes
        if not shared:
            check_axis(where, x, self.hat.wiring, len(states.learned))
        return shared

    def _pairs(
        self, where: str, states: HATState, batches: Sequence[Any]
    ) -> Iterator[list[tuple[Any, Tensor]]]:
        """For each replica, its slices of all batches; batches lead with an axis over replicas."""
        wiring, pairs = self.hat.wiring, [check_pair(where, batch) for batch in batches]
        fixed = {leaf.path for leaf in wiring.signature.leaves if not leaf.batched}
        for x, _ in pairs:
            check_axis(where, x, wiring, len(states.learned), shared=None)

        def of(i: int, path: str, value: Tensor) -> Tensor:
            return value if path in fixed else value[i]

        for i in range(len(states.learned)):
            yield [(map_leaves(partial(of, i), x), y[i]) for x, y in pairs]


_EACH = Inputs(0, None)  # type: ignore[arg-type]
"""The axis over replicas in inputs; inputs that all samples share are shared by replicas too."""


def _each(function: Callable[..., Any], states: HATState, inputs: Any = (), axes: Any = None) -> Any:
    """Call ``function`` for every replica; ``axes`` are those over replicas in ``inputs``."""
    with batchable(states.learned.device):
        if isinstance(inputs, tuple) and not inputs:
            return batched(function, (0,))(states)
        return batched(function, (0, axes))(states, inputs)
