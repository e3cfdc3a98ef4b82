"""The learner: init, begin, update, consolidate, forward, predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hatfn.checks.calls import (
    check_chosen,
    check_init_from,
    check_input,
    check_learned,
    check_locked,
    check_sample_tasks,
    check_scale,
    check_state,
    check_task,
    check_tasks,
)
from hatfn.checks.capacity import check_alive, check_free, check_left
from hatfn.checks.values import check_count, check_kind, check_seed
from hatfn.engine.compiled import Compiler
from hatfn.engine.optimizer import Optimizer, check_carried
from hatfn.engine.ranks import Ranks
from hatfn.lifecycle.begin import warm_start
from hatfn.lifecycle.consolidate import recalibrate
from hatfn.lifecycle.forget import Forgotten, forget, prune
from hatfn.lifecycle.init import initial_state
from hatfn.method.gates import Init, flush, gate, hard_gate
from hatfn.method.masks import binary_gates
from hatfn.method.protection import Lock, Locked
from hatfn.network.network import Network, Output
from hatfn.network.outputs import forward, forward_each, forward_plain, predict
from hatfn.numerics.trees import over_groups, put, take
from hatfn.state import HATState, trainable
from hatfn.subnet.compact import Subnet, compact
from hatfn.training.step import step
from hatfn.training.types import Info
from hatfn.wiring import Wiring


class HAT(NamedTuple):
    """A continual learner: pure functions over a :class:`~hatfn.state.HATState`.

    Made by :func:`build`; its fields are what build() was given. No method changes anything it is
    given: each returns a new state.
    """

    network: Network
    tasks: int
    optimizer: Optimizer
    loss: Callable[[Output, Tensor], Tensor]
    regularizer: Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]
    squash: Callable[[Tensor], Tensor]
    embedding_init: Init
    lock: Lock
    hyper: dict[str, float | tuple[float, ...]]
    compensated: bool
    max_norm: float | None
    clamp: float
    decay_embeddings: bool
    ranks: Ranks
    accumulate: int
    compiler: Compiler | None

    @property
    def wiring(self) -> Wiring:
        """The wiring it was built with."""
        return self.network.wiring

    @property
    def classes(self) -> tuple[int, ...] | None:
        """Classes of each task."""
        return self.network.classes

    def init(self, seed: int, fresh: bool = False) -> HATState:
        """The state before the first task.

        Args:
            seed: >= 0, what embeddings, heads and, if fresh, weights are drawn from; the global
                random state is left alone.
            fresh: draw the module's weights anew instead of taking them as they are.

        Returns:
            A state with nothing learned. A head as wide as the module's own starts as its copy,
            unless ``fresh``.

        Raises:
            TypeError, ValueError: a seed that is no integer, or negative.
        """
        number = check_seed("init", seed)
        state = initial_state(
            self.network, self.tasks, self.embedding_init, self.lock, self.hyper, number, fresh
        )
        return state._replace(opt_state=self.optimizer.init(trainable(state, [0])))

    def begin(
        self,
        state: HATState,
        task: int | Sequence[int],
        locked: Sequence[int] | None = None,
        carry: bool = False,
        init_from: int | Literal["similar"] | None = None,
        batch: tuple[Tensor, Tensor] | None = None,
    ) -> HATState:
        """Open a task for training, or several to be trained together, and protect what others use.

        A learned task that is opened again counts as not learned until it is consolidated.

        Args:
            state: any state.
            task: the task to train; a list in ascending order: tasks to train in the same steps.
            locked: the tasks to keep unchanged; None: every learned task but the open ones. One that
                is not learned counts with its current binary gates. A learned task left out is no
                longer guaranteed: ``state.locked`` says so.
            carry: keep the optimiser's moments instead of starting anew; as many tasks as before.
            init_from: warm start: a learned task whose embeddings, norms and statistics (not the head)
                the task starts from; "similar": the one whose subnetwork does best on ``batch``, by
                :func:`hatfn.similarity`, if any is learned yet. None: initial values, or those the
                task has.
            batch: x (B, ...) and y of the task, for "similar"; more samples choose more surely.

        Raises:
            TypeError, ValueError: a task that does not exist, or that is both open and locked;
                ``carry`` with another number of tasks; ``init_from`` a task that is not learned, or
                for several tasks; "similar" without a batch.

        Warns:
            HATWarning: a group without a free unit.
        """
        check_state("begin", state, self.wiring, self.tasks)
        opened = check_tasks("begin", task, self.tasks)
        if init_from is not None:
            check_init_from("begin", state, opened, init_from, batch, self.tasks)
            state = warm_start(self, state, opened[0], init_from, batch)
        here = self.flags(state, opened)
        learned = state.learned & ~here
        rows = check_locked("begin", locked, opened, self.tasks)
        holds = learned if rows is None else self.flags(state, rows)
        before = state
        state = state._replace(
            masks={group: mask & ~here[:, None] for group, mask in state.masks.items()},
            learned=learned,
            locked=holds,
            active=here,
        )
        check_free("begin", opened, self.used(state))
        opt_state = self.optimizer.init(trainable(state, opened))
        if carry:
            opt_state = check_carried("begin", state.opt_state, opt_state, len(opened))
        return state._replace(protection=self.protect(state, before), opt_state=opt_state)

    def update(
        self,
        state: HATState,
        batch: tuple[Tensor, Tensor],
        task: int | Sequence[int],
        scale: float | Tensor | None,
    ) -> tuple[HATState, Info]:
        """One step of training.

        In this order: gradient, protection, compensation of the embeddings' gradients, clip, the
        optimiser, protection of the update, clamp of the embeddings. A step with a result that is not
        finite is refused: the state stays as it was and ``info.ok`` is False.

        Several tasks in one step go each through its own gates, with its own head; their gradients
        are summed on the shared weights.

        No value of a tensor decides what is computed, so that ``vmap(hat.update, in_dims=(0, 0, None,
        None), randomness="different")`` trains as many seeds as the states have a leading axis of.

        Args:
            state: with ``task`` opened by :meth:`begin`.
            batch: x (B, ...) and the loss's target; for class labels (B,) int64, counted within the
                task. For several tasks both lead with an axis over them: x (K, B, ...), y (K, B).
            task: which; the very tasks that were opened together.
            scale: mask scale s in (0, s_max]; None trains the weights under binary gates and leaves
                the embeddings alone.

        Raises:
            TypeError, ValueError: a wrong task, batch or scale, or a task that is not open.
        """
        return step(self, state, batch, task, scale)

    def recalibrate(self, state: HATState, batches: Iterable[Tensor], task: int) -> HATState:
        """Re-estimate the open task's batch-norm statistics under binary gates.

        While a task is trained its running statistics mix the activations of every scale of the
        schedule; it is served under one. This replaces them by the mean over the given batches, with
        dropout off. Call it between the last update and :meth:`consolidate`.

        Args:
            state: with ``task`` opened by :meth:`begin`.
            batches: inputs (B, ...), as many as represent the task; targets are not needed.
            task: which.

        Returns:
            The state with new statistics of this task, unchanged if the module has none or if they
            are not finite.

        Raises:
            TypeError, ValueError: a wrong task or input; no batch, or an empty one; a task that is not
                open: a learned task's outputs must not move.
        """
        return recalibrate(self, state, batches, task)

    def consolidate(self, state: HATState, task: int) -> HATState:
        """Close a task: its binary gates become its mask, and it counts as learned.

        Of processes that train together, the running statistics of the task are averaged.

        Raises:
            TypeError, ValueError: a task that does not exist.

        Warns:
            HATWarning: a group in which the task uses no unit, or in which it leaves fewer units free
                than there are tasks to come.
        """
        check_state("consolidate", state, self.wiring, self.tasks)
        t = check_task("consolidate", task, self.tasks)
        here = self.flags(state, [t])
        gates = take(binary_gates(state), t)
        check_alive("consolidate", t, gates)
        statistics = self.ranks.mean(take(state.task_buffers, t), weight=1)
        closed = state._replace(
            task_buffers=put(state.task_buffers, t, statistics),
            masks=put(state.masks, t, gates),
            learned=state.learned | here,
            active=state.active & ~here,
        )
        check_left("consolidate", t, state, closed)
        return closed

    def forward(
        self,
        state: HATState,
        x: Tensor,
        task: int | Tensor | None,
        scale: float | Tensor | None = None,
    ) -> Output:
        """The output of one task, or of each sample's own task, in eval mode.

        Args:
            state: any state.
            x: (B, ...).
            task: which; a tensor (B,) int64: one for each sample; None: the module itself, ungated,
                with the shared weights of the state and its own norms and classifier.
            scale: None: the binary gates of a learned task; a number s in (0, s_max]: soft gates.

        Returns:
            (B, classes of the task), or what the module gives if there are no classes; a tuple or
            dict of such where the module returns one. With a task for each sample (B, C), C the
            classes of the widest task, -inf where the sample's own has fewer; each sample's is, to
            the bit, what its task's samples alone would get.

        Raises:
            TypeError, ValueError: a wrong task, input or scale; binary gates of a task that was never
                learned.
        """
        check_state("forward", state, self.wiring, self.tasks)
        check_input("forward", x, self.wiring)
        if task is None:
            return forward_plain(self.network, state, x)
        t = check_sample_tasks("forward", task, x, self.tasks)
        if scale is None:
            check_learned("forward", state, [t] if isinstance(t, int) else t.unique().tolist())
        else:
            check_scale("forward", scale, state.hyper["s_max"])

        def gates(task: int) -> dict[str, Tensor]:
            own = take(state.masks if scale is None else state.embeddings, task)
            return own if scale is None else self.gates(own, scale)

        if isinstance(t, int):
            return forward(self.network, state, x, t, gates(t))
        return forward_each(self.network, state, x, t, gates)

    def predict(
        self,
        state: HATState,
        x: Tensor,
        tasks: Sequence[int] | None = None,
        chunk_size: int | None = None,
    ) -> Output:
        """The outputs of many learned tasks on the same inputs, in one ``vmap``.

        Args:
            state: any state.
            x: (B, ...).
            tasks: which, in this order; None: all learned ones, in order.
            chunk_size: how many tasks at a time; bounds memory.

        Returns:
            (T, B, C), C the classes of the widest task; -inf where a task has fewer. A tuple or dict of
            such where the module returns one.

        Raises:
            TypeError, ValueError: a wrong task or input; a task that was never learned.
        """
        check_state("predict", state, self.wiring, self.tasks)
        check_input("predict", x, self.wiring)
        rows = check_chosen("predict", state, tasks, self.tasks)
        if chunk_size is not None:
            check_count("predict", "chunk_size", chunk_size)
        return predict(self.network, state, x, rows, chunk_size)

    def forget(
        self,
        state: HATState,
        task: int | Sequence[int],
        locked: Sequence[int] | None = None,
        dry_run: bool = False,
    ) -> tuple[HATState, Forgotten]:
        """Forget tasks: what only they used goes back to its initial value, and is free again.

        That are the shared weights that they depend on and no other task does, their embeddings,
        norms, heads and statistics; the values are those that the state's seed gave, not what is left
        over. Their masks are cleared. The optimiser's moments start anew.

        Args:
            state: any state.
            task: which; a list: several.
            locked: the tasks to keep unchanged; None: every other one that is learned or open. A
                learned task left out is no longer guaranteed.
            dry_run: change nothing, report only.

        Returns:
            The new state, the same one if nothing is to be done, and the report.

        Raises:
            TypeError, ValueError: a task that does not exist, or that is both forgotten and locked.

        Warns:
            HATWarning: a task with nothing to forget, or no task at all.
        """
        return forget(self, state, task, locked, dry_run)

    def prune(
        self, state: HATState, keep: int | Sequence[int], dry_run: bool = False
    ) -> tuple[HATState, Forgotten]:
        """Forget every task but some, which stay as they are: see :meth:`forget`.

        Args:
            state: any state.
            keep: the task to keep; a list: several.
            dry_run: change nothing, report only.
        """
        return prune(self, state, keep, dry_run)

    def compact(self, state: HATState, task: int, x: Tensor | None = None) -> Subnet:
        """A learned task's subnetwork, its dead units sliced out of parameters and statistics.

        Args:
            state: with ``task`` learned.
            task: which.
            x: (B, ...), an input to try slices on, for a module that random numbers will not do for
                (one that reads integers).

        Returns:
            The numbers with which the same module gives the task's logits with less work, and a
            report of what was sliced.

        Raises:
            TypeError, ValueError: a wrong task or input; a task that was never learned; a module that
                fails on random numbers where no ``x`` is given.
        """
        check_state("compact", state, self.wiring, self.tasks)
        t = check_task("compact", task, self.tasks)
        check_learned("compact", state, [t])
        if x is not None:
            check_input("compact", x, self.wiring)
        return compact(self.network, state, t, x)

    def gates(self, embeddings: dict[str, Tensor], scale: float | Tensor | None) -> dict[str, Tensor]:
        """Gates of task embeddings, {group: (..., U)} in [0, 1], at a scale; None: binary ones."""
        check_kind("gates", "embeddings", embeddings, dict, "{group: tensor}: state.embeddings")
        if scale is None:
            return over_groups(lambda e: hard_gate(e).to(e.dtype), embeddings)

        def soft(e: Tensor) -> Tensor:
            own = scale.to(e.dtype) if isinstance(scale, Tensor) else scale
            return flush(gate(e, own, self.squash))

        return over_groups(soft, embeddings)

    def used(self, state: HATState) -> dict[str, Tensor]:
        """The cumulative mask: which units the locked tasks use, {group: (U,)}, bool or in [0, 1].

        Of stacked states {group: (S, U)}.
        """
        lock = state.locked[..., None]
        if self.lock.units == "binary":
            return over_groups(lambda on: (on & lock).any(-2), binary_gates(state))
        soft = self.gates(state.embeddings, state.hyper["s_max"][..., None, None])
        return over_groups(lambda a: (a * lock).amax(-2), soft)

    def protect(self, state: HATState, before: HATState) -> dict[str, Tensor]:
        """The cumulative mask per weight: what ``state.locked`` holds, and weights that never train.

        Args:
            state: with new tasks locked.
            before: the state until now.
        """
        now = (binary_gates(state), self.used(state), state.locked, state.params)
        seen = Locked(*now, before.protection, before.locked)
        protection = self.lock.rule(self.wiring, seen)
        frozen = self.network.frozen & protection.keys()
        return protection | {name: torch.ones_like(protection[name]) for name in frozen}

    def flags(self, state: HATState, rows: Sequence[int]) -> Tensor:
        """(T,) bool, True for some tasks."""
        return torch.tensor([t in rows for t in range(self.tasks)], device=state.learned.device)
