"""Many seeds and many settings at once: a learner's functions over a leading axis S of states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hatfn.checks.calls import (
    check_active,
    check_batch,
    check_batches,
    check_chosen,
    check_labels,
    check_learned,
    check_state,
    check_task,
    check_tasks,
    is_several,
)
from hatfn.checks.capacity import check_alive, check_free, check_left
from hatfn.checks.replicas import check_axis, check_replicated, check_scales, check_seeds
from hatfn.checks.values import check_kind, check_learner, check_list
from hatfn.engine.optimizer import Optimizer, PureOptimizer, vectorized
from hatfn.learner import HAT
from hatfn.network.network import Output
from hatfn.numerics.trees import tree_map
from hatfn.numerics.vmap import batchable, batched
from hatfn.state import HATState, Trainable
from hatfn.training.apply import advance, settled
from hatfn.training.objective import accumulated, refuse_checkpointing, split, total_loss
from hatfn.training.step import read, report, trained, write
from hatfn.training.types import Advanced, Before, Info, Scale, Seen


def replicate(hat: HAT, seeds: Iterable[int], **hyper: float | Sequence[float]) -> HATState:
    """The states of S learners before the first task, stacked: every leaf gets a leading axis S.

    Replica i is ``hat.init(seeds[i], fresh=True)``: it has its own weights, heads and embeddings.
    :class:`Replicas` trains them together.

    Args:
        hat: the learner.
        seeds: one per replica.
        hyper: settings of ``state.hyper`` ("lr", a factor on the learning rate, "sparsity", "quota",
            "s_max", "compensation"): a number for all replicas or one for each, in all of a replica's
            tasks. A compensation that was built as "s_max" follows it.

    Returns:
        The stacked states. ``replica(states, i)`` is one of them.

    Raises:
        TypeError, ValueError: no seeds, an unknown setting, another number of values than of seeds, or
            a value out of its range.

    Example:
        >>> import hatfn, torchopt
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4), head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2, 2], optimizer=torchopt.adam(1e-3))
        >>> many, states = Replicas(hat), replicate(hat, seeds=range(3), sparsity=[0.1, 0.5, 1.0])
        >>> states = many.begin(states, task=0)
        >>> x, y = torch.randn(3, 16, 4), torch.randint(0, 2, (3, 16))  # a batch for each
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

    own = {name: spread(value, stacked.hyper[name]) for name, value in values.items()}
    return stacked._replace(hyper={**stacked.hyper, **own})


def stack(states: Sequence[HATState]) -> HATState:
    """States of one structure as replicas, in order."""
    stacked: HATState = tree_map(lambda *leaves: torch.stack(leaves), *states)
    return stacked


def replica(states: HATState, index: int) -> HATState:
    """One state out of stacked ones, for every function that takes a state."""
    one: HATState = tree_map(lambda leaf: leaf[index], states)
    return one


class Replicas(NamedTuple):
    """A learner's functions for S states at once, each one ``vmap`` of the method of that name.

    What they take and give is described there, with an axis S in front of states, of what is reported
    and, unless ``shared``, of batches: S batches of B samples, x (S, B, ...) and y (S, B). Each replica
    draws its own dropout masks. A scale may be (S,), one for each.

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
        batch: tuple[Tensor, Tensor] | None = None,
    ) -> HATState:
        """:meth:`hatfn.HAT.begin` of every replica; a batch for each, x (S, B, ...) and y (S, B)."""
        self._first("begin", states)
        if init_from is not None:  # a choice among tasks, which vmap cannot make
            pairs: Iterable[Any] = [None] * len(states.learned)
            if batch is not None:
                x, y = check_batch(batch, None, "begin")
                check_axis("begin", x, len(states.learned), shared=None)
                pairs = zip(x, y, strict=True)
            return stack(
                [
                    self.hat.begin(replica(states, i), task, locked, carry, init_from, pair)
                    for i, pair in enumerate(pairs)
                ]
            )
        opened = check_tasks("begin", task, self.hat.tasks)
        begun: HATState = _over(partial(self.hat.begin, task=task, locked=locked, carry=carry), states)
        check_free("begin", opened, self.hat.used(begun))
        return begun

    def update(
        self,
        states: HATState,
        batch: tuple[Tensor, Tensor],
        task: int | Sequence[int],
        scale: float | Tensor | None,
        shared: bool = False,
    ) -> tuple[HATState, Info]:
        """:meth:`hatfn.HAT.update` of every replica; ``shared``: on the same batch (B, ...).

        ``info.ok`` is (S,): a replica whose step is refused stays as it was, the others go on.
        """
        first = self._first("update", states)
        rows = check_tasks("update", task, self.hat.tasks)
        if self.hat.ranks.size > 1:
            raise ValueError(
                f"update: ranks.size={self.hat.ranks.size}, and replicas train in one process. "
                f"Expected a learner built without ranks: each process trains its own seeds."
            )
        refuse_checkpointing(self.hat)
        check_active("update", first, rows, together=True)
        x, y = check_batch(batch, None)
        if not shared:
            check_axis("update", x, len(states.learned))
        axis = 0 if shared else 1  # that counts tasks, where there are several
        several = is_several(task) and y.dim() > axis
        for k, row in enumerate(rows if self.hat.classes else ()):  # vmap cannot read labels
            labels = y.select(axis, k) if several and k < y.shape[axis] else y
            check_labels(labels, self.hat.classes[row], "update")  # type: ignore[index]
        check_scales("update", scale, states.hyper["s_max"])
        hat = self.hat._replace(optimizer=_stacked(self.hat.optimizer))
        before = read(hat, states, rows, axis=1)
        per_batch = None if shared else 0
        counted = axis + is_several(task)  # the axis of samples

        def forward(before: Before, batch: tuple[Tensor, Tensor], scale: Scale) -> tuple[Tensor, Seen]:
            batches = check_batches(batch, task, rows, hat.classes, hat.wiring)
            return total_loss(hat, before, batches, rows, scale)

        def slopes(
            before: Before, batch: tuple[Tensor, Tensor], scale: Scale
        ) -> tuple[Trainable, Seen]:
            per_scale = 0 if isinstance(scale, Tensor) and scale.dim() == 1 else None
            every = batched(forward, (0, per_batch, per_scale))

            def objective(own: Trainable, buffers: dict[str, Tensor], part: Any) -> tuple[Tensor, Seen]:
                # Replicas have nothing in common: the gradient of the sum is the gradient of each.
                reads = before._replace(own=own, buffers=buffers, protection={}, opt_state=())
                totals, seen = every(reads, part, scale)
                return totals.sum(), seen

            parts = split(batch, hat.accumulate, counted)
            return accumulated(objective, before, parts, nested=False, axis=1)

        def advanced(before: Before, raw: Trainable, seen: Seen, scale: Scale) -> Advanced:
            return advance(hat, before, raw, seen, scale, samples=1, axes=1)

        name = shared, *(hat.classes[row] for row in rows if hat.classes)
        with batchable(x.device):
            seen, after, norm, ok = trained(
                hat.compiler, name, self.hat, slopes, advanced, before, (x, y), scale, axes=1
            )
        new = write(states, rows, settled(ok, after, before), axis=1)
        return new, report(seen, norm, ok, task)

    def recalibrate(
        self, states: HATState, batches: Iterable[Tensor], task: int, shared: bool = False
    ) -> HATState:
        """:meth:`hatfn.HAT.recalibrate` of every replica; each batch (S, B, ...), or shared."""
        first = self._first("recalibrate", states)
        row = check_task("recalibrate", task, self.hat.tasks)
        check_active("recalibrate", first, [row])
        check_list("recalibrate", "batches", batches, "a list of inputs [x], or a loader of them")
        inputs = list(batches)
        for x in () if shared else inputs:
            check_axis("recalibrate", x, len(states.learned))
        new: HATState = _over(
            lambda state, xs: self.hat.recalibrate(state, xs, row), states, inputs, shared=shared
        )
        return new

    def consolidate(self, states: HATState, task: int) -> HATState:
        """:meth:`hatfn.HAT.consolidate` of every replica."""
        self._first("consolidate", states)
        closed: HATState = _over(partial(self.hat.consolidate, task=task), states)
        check_alive("consolidate", task, {g: m[:, task] for g, m in closed.masks.items()})
        check_left("consolidate", task, states, closed)
        return closed

    def forward(
        self,
        states: HATState,
        x: Tensor,
        task: int,
        scale: float | Tensor | None = None,
        shared: bool = True,
    ) -> Output:
        """:meth:`hatfn.HAT.forward` of every replica, (S, B, classes); ``shared``: of the same x."""
        first = self._first("forward", states)
        row = check_task("forward", task, self.hat.tasks)
        if scale is None:
            check_learned("forward", first, [row])
        check_scales("forward", scale, states.hyper["s_max"])
        if not shared:
            check_axis("forward", x, len(states.learned))

        def one(state: HATState, x: Tensor, scale: Scale) -> Output:
            return self.hat.forward(state, x, row, scale)

        each = 0 if isinstance(scale, Tensor) and scale.dim() == 1 else None
        with batchable(states.learned.device):
            return batched(one, (0, None if shared else 0, each))(states, x, scale)

    def predict(
        self,
        states: HATState,
        x: Tensor,
        tasks: Sequence[int] | None = None,
        chunk_size: int | None = None,
        shared: bool = True,
    ) -> Output:
        """:meth:`hatfn.HAT.predict` of every replica, (S, T, B, C); ``shared``: of the same x."""
        rows = check_chosen("predict", self._first("predict", states), tasks, self.hat.tasks)
        if not shared:
            check_axis("predict", x, len(states.learned))
        return _over(
            lambda state, x: self.hat.predict(state, x, rows, chunk_size), states, x, shared=shared
        )

    def _first(self, where: str, states: HATState) -> HATState:
        """The flags that all replicas have in common, which cannot be read inside ``vmap``."""
        check_learner(where, self.hat)
        check_kind(where, "states", states, HATState, "stacked ones: hatfn.replicate(hat, seeds)")
        if states.learned.dim() != 2:
            raise ValueError(
                f"{where}: states.learned has shape {tuple(states.learned.shape)}. Expected states "
                f"with an axis in front: hatfn.replicate(hat, seeds), or replicas.stack([state, ...])."
            )
        first = states._replace(learned=states.learned.all(0), active=states.active.all(0))
        check_state(where, first, self.hat.wiring, self.hat.tasks)
        return first


def _stacked(optimizer: Optimizer) -> PureOptimizer:
    """An optimiser of stacked trees: its own way to step them, or each replica's in one ``vmap``."""

    def each(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return pure.update(gradients, state, params=params)

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        every: tuple[Any, Any] = batched(each, (0, 0, 0))(gradients, state, params)
        return every

    pure, own = vectorized(optimizer), getattr(optimizer, "stacked", None)
    return PureOptimizer(batched(pure.init, (0,)), update if own is None else own)


def _over(function: Callable[..., Any], states: HATState, *rest: Any, shared: bool = False) -> Any:
    """``function`` of every replica, and of its own slice of what else is given unless shared."""
    with batchable(states.learned.device):
        return batched(function, (0, *(None if shared else 0 for _ in rest)))(states, *rest)
