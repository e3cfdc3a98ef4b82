"""The learner: signatures, their descriptions, every check, and one call each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor

from hatfn.checks.batches import (
    check_batch,
    check_batches,
    check_class_batch,
    check_input,
    check_inputs,
)
from hatfn.checks.calls import (
    check_active,
    check_chosen,
    check_each_task,
    check_init_from,
    check_learned,
    check_locked,
    check_sample_tasks,
    check_scale,
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
    warn_untouched,
)
from hatfn.checks.settings import check_checkpointing
from hatfn.checks.values import check_count, check_kind, check_list, check_seed
from hatfn.lifecycle.begin import begin, warm_start
from hatfn.lifecycle.consolidate import consolidate, recalibrate, settle
from hatfn.lifecycle.forget import Forgotten, forget
from hatfn.lifecycle.init import init
from hatfn.network.network import Output
from hatfn.network.outputs import forward, forward_each, forward_plain, predict
from hatfn.numerics.trees import take
from hatfn.spec import Spec
from hatfn.state import HATState
from hatfn.subnet.compact import Subnet, compact
from hatfn.training.objective import is_nested
from hatfn.training.step import step
from hatfn.training.types import Info, report

X = Any
"""Inputs of the module: a tensor, a tuple of positional arguments or a dict of keyword arguments."""


class HAT(Spec):
    """A continual learner: pure functions over a :class:`~hatfn.state.HATState`.

    Made by :func:`build`. No method changes anything it is given: each returns a new state.
    """

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
        return init(self, check_seed("init", seed), fresh)

    def begin(
        self,
        state: HATState,
        task: int | Sequence[int],
        locked: Sequence[int] | None = None,
        carry: bool = False,
        init_from: int | Literal["similar"] | None = None,
        batch: tuple[X, Tensor] | None = None,
    ) -> HATState:
        """Open a task for training, or several to be trained together, and protect what others use.

        A learned task that is opened again counts as not learned until it is consolidated.

        Args:
            state: any state.
            task: the task to train; a list in ascending order: tasks to train in the same steps.
            locked: the tasks to keep unchanged; None: every learned task but the open ones. One that
                is not learned counts with its current binary gates. A learned task left out is no
                longer guaranteed: ``state.locked`` says so.
            carry: keep the optimizer state instead of starting anew; as many tasks as before.
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
            HATWarning: a group without a free unit; an open task that was not consolidated.
        """
        check_state("begin", state, self.wiring, self.tasks)
        rows = check_tasks("begin", task, self.tasks)
        held = check_locked("begin", locked, rows, self.tasks)
        if held is None:
            check_unfinished("begin", rows, state)
        if init_from is not None:
            check_init_from("begin", state, rows, init_from, batch, self.tasks)
            pair = batch and check_class_batch("begin", batch, self.classes, self.wiring)
            state = warm_start(self, state, rows[0], init_from, pair)
        opened, used = begin(self, state, rows, held, carry)
        check_free("begin", rows, used)
        return opened

    def update(
        self,
        state: HATState,
        batch: tuple[X, Tensor],
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
        check_state("update", state, self.wiring, self.tasks)
        rows = check_tasks("update", task, self.tasks)
        check_active("update", state, rows, together=True)
        if scale is not None:
            check_scale("update", scale, state.hyper["s_max"])
        batches = check_batches(batch, task, rows, [self.labels(row) for row in rows], self.wiring)
        if nested := is_nested(state, batches, scale):
            check_checkpointing("update", self.network.recomputes)
        new, applied = step(self, state, batches, rows, scale, nested=nested)
        return new, report(applied, is_several(task))

    def recalibrate(self, state: HATState, batches: Iterable[tuple[X, Any] | X], task: int) -> HATState:
        """Re-estimate the open task's batch-norm statistics under binary gates.

        While a task is trained its running statistics mix the activations of every scale of the
        schedule; it is served under one. This replaces them by the mean over the given batches, with
        dropout off. :meth:`consolidate` does it where it is given batches and measures that it helps.

        Args:
            state: with ``task`` opened by :meth:`begin`.
            batches: inputs x (B, ...), or pairs (x, y), as many as represent the task; targets are not
                looked at.
            task: which.

        Returns:
            The state with new statistics of this task, unchanged if the module has none or if they
            are not finite. Counts of batches start anew.

        Raises:
            TypeError, ValueError: a wrong task or input; no batch, or an empty one; a task that is not
                open: a learned task's outputs must not move.
        """
        check_state("recalibrate", state, self.wiring, self.tasks)
        t = check_task("recalibrate", task, self.tasks)
        check_active("recalibrate", state, [t])
        return recalibrate(self, state, check_inputs("recalibrate", batches, self.wiring), t)

    def consolidate(
        self,
        state: HATState,
        task: int,
        batches: Iterable[tuple[X, Tensor]] | None = None,
    ) -> HATState:
        """Close a task: its binary gates become its mask, and it counts as learned.

        With batches, running statistics are re-estimated under binary gates if that lowers the loss on
        these batches: see :meth:`recalibrate`. Of processes that train together, the statistics are
        averaged.

        Args:
            state: any state.
            task: which.
            batches: x (B, ...) and y of the task's training data, as many as represent it; an empty
                list: keep the statistics as they are. Only a module with running statistics reads them.

        Raises:
            TypeError, ValueError: a task that does not exist, a wrong batch.

        Warns:
            HATWarning: a group in which the task uses no unit, or in which it leaves fewer units free
                than there are tasks to come; running statistics as training left them, where no
                batches are given.
        """
        check_state("consolidate", state, self.wiring, self.tasks)
        t = check_task("consolidate", task, self.tasks)
        if batches is None:
            check_statistics("consolidate", t, state)
        else:
            check_list("consolidate", "batches", batches, "a list of pairs [(x, y)], or a loader")
            pairs = [check_batch("consolidate", b, self.wiring, self.labels(t)) for b in batches]
            if pairs and state.task_buffers:
                state, _, _ = settle(self, state, pairs, t)
        closed = consolidate(self, state, t)
        check_alive("consolidate", t, take(closed.masks, t))
        check_left("consolidate", t, state, closed)
        return closed

    def forward(
        self,
        state: HATState,
        x: X,
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
        inputs = check_input("forward", x, self.wiring)
        if task is None:
            return forward_plain(self.network, state, inputs)
        t = check_sample_tasks("forward", task, inputs, self.tasks)
        if scale is None:
            check_learned("forward", state, [t] if isinstance(t, int) else t.unique().tolist())
        else:
            check_scale("forward", scale, state.hyper["s_max"])
        if isinstance(t, int):
            return forward(self.network, state, inputs, t, self.gates_of(state, t, scale))
        return forward_each(
            self.network, state, inputs, t, lambda row: self.gates_of(state, row, scale)
        )

    def predict(
        self,
        state: HATState,
        x: X,
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
        inputs = check_input("predict", x, self.wiring)
        rows = check_chosen("predict", state, tasks, self.tasks)
        if chunk_size is not None:
            check_count("predict", "chunk_size", chunk_size)
        return predict(self.network, state, inputs, rows, chunk_size)

    def forget(
        self,
        state: HATState,
        task: int | Sequence[int],
        locked: Sequence[int] | None = None,
        dry_run: bool = False,
    ) -> tuple[HATState, Forgotten]:
        """Forget tasks: what only they used goes back to its initial value, and is free again.

        This resets the shared weights that only these tasks use, and their embeddings, norms, heads
        and statistics, to the values that the state's seed gave. Their masks are cleared. The
        optimizer state starts anew.

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
        check_state("forget", state, self.wiring, self.tasks)
        rows = check_each_task("forget", task, self.tasks)
        kept = check_locked("forget", locked, rows, self.tasks)
        new, found = forget(self, state, rows, kept, dry_run)
        if untouched := [row for row in rows if row not in found.tasks]:
            which = ", ".join(map(str, untouched))
            warn_untouched("forget", f"task {which} was never trained, or was forgotten already")
        if not rows:
            warn_untouched("forget", "no task was given")
        return new, found

    def prune(
        self, state: HATState, keep: int | Sequence[int], dry_run: bool = False
    ) -> tuple[HATState, Forgotten]:
        """Forget every task but some, which stay as they are: see :meth:`forget`.

        Args:
            state: any state.
            keep: the task to keep; a list: several.
            dry_run: change nothing, report only.
        """
        check_state("prune", state, self.wiring, self.tasks)
        kept = check_each_task("prune", keep, self.tasks)
        rest = [task for task in range(self.tasks) if task not in kept]
        new, found = forget(self, state, rest, kept, dry_run)
        if not found.tasks:  # of "every other task" it is no surprise that some were never trained
            warn_untouched("prune", "no other task was ever trained, or all were forgotten already")
        return new, found

    def compact(self, state: HATState, task: int, x: X | None = None) -> Subnet:
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
        inputs = None if x is None else check_input("compact", x, self.wiring)
        return compact(self.network, state, t, inputs)

    def gates(self, embeddings: dict[str, Tensor], scale: float | Tensor | None) -> dict[str, Tensor]:
        """Gates of task embeddings, {group: (..., U)} in [0, 1], at a scale; None: binary ones."""
        check_kind("gates", "embeddings", embeddings, dict, "{group: tensor}: state.embeddings")
        return super().gates(embeddings, scale)
