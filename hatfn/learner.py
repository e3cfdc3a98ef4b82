"""The learner: each method checks its arguments and calls the function that does the work."""

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
    bounded_scale,
    check_active,
    check_chosen,
    check_donatable,
    check_each_task,
    check_init_from,
    check_learned,
    check_locked,
    check_sample_tasks,
    check_state,
    check_task,
    check_tasks,
    is_several,
)
from hatfn.checks.capacity import (
    check_alive,
    check_forgotten,
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
from hatfn.network.outputs import forward, forward_each, forward_plain, only_learned, predict
from hatfn.numerics.arguments import Inputs
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
    """A continual learner: functions from a :class:`~hatfn.state.HATState` to a new one.

    :func:`hatfn.build` makes one. No method changes its arguments.
    """

    def init(self, seed: int, fresh: bool = False) -> HATState:
        """The state before the first task.

        Args:
            seed: an integer >= 0 from which embeddings, heads and, with ``fresh``, weights are drawn.
                PyTorch's global random state is not used.
            fresh: draw new weights instead of copying those of the module.

        Returns:
            A state in which no task is learned. Without ``fresh``, a head that has as many classes as
            the module's own head starts as a copy of it.

        Raises:
            TypeError, ValueError: the seed is not an integer, or is negative.
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
        """Open one or several tasks for training, and protect the weights that other tasks use.

        A learned task that is opened again is not learned until it is consolidated again.

        Args:
            state: any state.
            task: the task to train, or a list in ascending order of tasks to train in the same steps.
            locked: the tasks to keep unchanged. None: every learned task except those in ``task``. A
                task that is not learned is protected with its current binary gates. A learned task
                that is not in the list loses its protection, and ``state.locked`` is False for it.
            carry: keep the optimizer state instead of starting a new one. It needs as many tasks as
                the last ``begin`` had.
            init_from: the learned task whose embeddings, norms and running statistics, but not whose
                head, the task starts from. "similar": the learned task with the lowest
                :func:`hatfn.similarity` on ``batch``; without a learned task, as None. None: the task
                keeps the values that it has, which are the initial ones if it was never trained.
            batch: x (B, ...) and y of the task, for "similar"; a larger batch chooses more reliably.

        Raises:
            TypeError, ValueError: a task does not exist, or is both in ``task`` and in ``locked``;
                ``carry`` with another number of tasks; ``init_from`` is not a learned task, or is
                given for several tasks; "similar" without a batch.

        Warns:
            HATWarning: a group has no free unit; another open task was not consolidated.
        """
        check_state("begin", state, self.wiring, self.tasks)
        rows = check_tasks("begin", task, self.tasks)
        held = check_locked("begin", locked, rows, self.tasks)
        if held is None:
            check_unfinished("begin", rows, state)
        if init_from is not None:
            check_init_from("begin", state, rows, init_from, batch, self.tasks)
            given = "begin", batch, self.classes, self.wiring, self.has_real_targets
            pair = batch if batch is None else check_class_batch(*given)
            state = warm_start(self, state, rows[0], init_from, pair)
        opened = begin(self, state, rows, held, carry)
        check_free("begin", rows, opened.used)
        return opened

    def update(
        self,
        state: HATState,
        batch: tuple[X, Tensor],
        task: int | Sequence[int],
        scale: float | Tensor | None,
        donate: bool = False,
    ) -> tuple[HATState, Info]:
        """Train the open tasks for one step.

        The step computes the gradient, applies the protection to it, compensates the gradients of the
        embeddings, clips the norm, calls the optimizer, applies the protection to the update and clamps
        the embeddings. If a result is not finite, the step is refused: the values of the state stay the
        same, and ``info.ok`` is False. On the shared weights the gradients of several tasks are summed.

        Dropout draws its masks from PyTorch's global random state. No value of a tensor decides which
        operators run, so ``vmap(hat.update, in_dims=(0, 0, None, None), randomness="different")``
        trains stacked states together.

        Args:
            state: a state in which :meth:`begin` opened ``task``.
            batch: x (B, ...) and the target y of the loss. Class labels are (B,) int64, counted within
                the task. K tasks need an axis over tasks in front: x (K, B, ...), y (K, B).
            task: the task or the list of tasks that :meth:`begin` opened.
            scale: the mask scale s in (0, s_max]. None: binary gates; the embeddings do not change.
            donate: let the step use the memory of ``state`` again, as in JAX. The result is the same to
                the bit, and the given state is spent: its leaves are empty, and every function refuses
                it, as it does copies by ``state._replace``. A step that raises an error spends nothing.

        Returns:
            The new state, and :class:`~hatfn.training.types.Info` with losses and logits of the step.

        Raises:
            TypeError, ValueError: a wrong task, batch or scale; a state that cannot be donated; a task
                that is not open. A GPU is not read for that: ``info.ok`` is False instead.
        """
        check_state("update", state, self.wiring, self.tasks)
        rows = check_tasks("update", task, self.tasks)
        check_active("update", state, rows, together=True, waits=False)
        if scale is not None:
            scale = bounded_scale("update", scale, state.hyper["s_max"])
        batches = check_batches(batch, task, rows, [self.labels(row) for row in rows], self.wiring)
        if nested := is_nested(state, batches, scale):
            check_checkpointing("update", self.network.recomputes)
        check_donatable("update", donate, state, nested)
        new, applied = step(self, state, batches, rows, scale, nested=nested, donate=donate)
        return new, report(applied, is_several(task))

    def recalibrate(self, state: HATState, batches: Iterable[tuple[X, Any] | X], task: int) -> HATState:
        """Estimate the batch-norm statistics of an open task again, under its binary gates.

        In training, running statistics mix activations under all scales of the schedule. Serving uses
        binary gates only. This method replaces the statistics by their mean over the given batches,
        with dropout off. :meth:`consolidate` does the same if it gets batches and the loss decreases.

        Args:
            state: a state in which :meth:`begin` opened ``task``.
            batches: inputs x (B, ...), or pairs (x, y) whose targets are ignored; enough of them to
                represent the task.
            task: an open task. A learned one is refused, because its outputs would change.

        Returns:
            The state with new statistics of the task. It is unchanged if the module has none, or if
            the new ones are not finite. Counts of batches start from 0.

        Raises:
            TypeError, ValueError: a wrong task or input; no batch, or an empty one.
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
        """Close a task: its binary gates become its mask, and the task is learned.

        With batches, running statistics are estimated again under binary gates, and kept if that
        lowers the loss on these batches: see :meth:`recalibrate`. Processes that train together
        average their statistics.

        Args:
            state: any state.
            task: the task.
            batches: pairs of x (B, ...) and y from the training data of the task, enough of them to
                represent it. Only a module with running statistics needs them. An empty list keeps the
                statistics of training; None does too, with a warning.

        Raises:
            TypeError, ValueError: a task that does not exist; a wrong batch.

        Warns:
            HATWarning: the task uses no unit of a group, or leaves fewer free units in it than there
                are tasks to come; the module has running statistics and ``batches`` is None.
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
            task: the task, or a tensor (B,) int64 with the task of each sample. None: the module
                without gates, with the shared weights of the state and the module's own norms and
                classifier.
            scale: the mask scale s in (0, s_max] of soft gates. None: the binary gates of learned
                tasks.

        Returns:
            (B, classes of the task), or the module's own output if tasks have no classes; a tuple or
            dict of such outputs if the module returns one. With a task for each sample it is (B, C),
            where C is the number of classes of the widest task and classes that a sample's task lacks
            are -inf. It equals, to the bit, one call for each task with all of its samples.

        Raises:
            TypeError, ValueError: a wrong task, input or scale; binary gates of a task that is not
                learned. A GPU is read for a tensor of tasks alone; the output is nan instead.
        """
        check_state("forward", state, self.wiring, self.tasks)
        inputs = check_input("forward", x, self.wiring)
        if task is None:
            return forward_plain(self.network, state, inputs)
        t = check_sample_tasks("forward", task, inputs, self.tasks)
        if scale is None:
            asked = [t] if isinstance(t, int) else t.unique().tolist()
            check_learned("forward", state, asked, waits=False)
        else:
            scale = bounded_scale("forward", scale, state.hyper["s_max"])

        def one(x: Inputs, row: int) -> Output:
            output = forward(self.network, state, x, row, self.gates_of(state, row, scale))
            return only_learned(state.learned[row], output) if scale is None else output

        return one(inputs, t) if isinstance(t, int) else forward_each(self.network, inputs, t, one)

    def predict(
        self,
        state: HATState,
        x: X,
        tasks: Sequence[int] | None = None,
        chunk_size: int | None = None,
    ) -> Output:
        """The outputs of several learned tasks on the same inputs.

        Args:
            state: any state.
            x: (B, ...).
            tasks: the N tasks, in the order of the output. None: all learned tasks; a GPU is read.
            chunk_size: how many tasks to compute at a time. 1: a loop of :meth:`forward`, to the bit;
                more: a ``vmap``, to rounding. None: the fastest, by sizes, device and skipped units.

        Returns:
            (N, B, C), where C is the number of classes of the widest task and classes that a task
            lacks are -inf; a tuple or dict of such outputs if the module returns one.

        Raises:
            TypeError, ValueError: a wrong task or input; a task not learned (on a GPU: nan instead).
        """
        check_state("predict", state, self.wiring, self.tasks)
        inputs = check_input("predict", x, self.wiring)
        rows = check_chosen("predict", state, tasks, self.tasks, waits=False)
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
        """Forget tasks: the units that only they use become free again.

        This resets the shared weights that only these tasks use, and their embeddings, norms, heads
        and running statistics, to the values that the state's seed gives. It clears their masks and
        starts a new optimizer state.

        Args:
            state: any state.
            task: the task, or a list of tasks.
            locked: as for :meth:`begin`, but None also includes open tasks.
            dry_run: change nothing, only report.

        Returns:
            The new state, or the given one if there is nothing to do, and a report.

        Raises:
            TypeError, ValueError: a task does not exist, or is both in ``task`` and in ``locked``.

        Warns:
            HATWarning: a task has nothing to forget, or no task is given.
        """
        check_state("forget", state, self.wiring, self.tasks)
        rows = check_each_task("forget", task, self.tasks)
        kept = check_locked("forget", locked, rows, self.tasks)
        new, found = forget(self, state, rows, kept, dry_run)
        check_forgotten("forget", rows, found.tasks)
        return new, found

    def prune(
        self, state: HATState, keep: int | Sequence[int], dry_run: bool = False
    ) -> tuple[HATState, Forgotten]:
        """Forget all tasks except some; otherwise the same as :meth:`forget`.

        Args:
            state: any state.
            keep: the task to keep, or a list of tasks.
            dry_run: change nothing, only report.
        """
        check_state("prune", state, self.wiring, self.tasks)
        kept = check_each_task("prune", keep, self.tasks)
        rest = [task for task in range(self.tasks) if task not in kept]
        new, found = forget(self, state, rest, kept, dry_run)
        if not found.tasks:  # the caller named none of these tasks, so single ones give no warning
            warn_untouched("prune", "no other task was ever trained, or all were forgotten already")
        return new, found

    def compact(self, state: HATState, task: int, x: X | None = None) -> Subnet:
        """The subnetwork of a learned task: parameters and statistics without the task's dead units.

        Args:
            state: a state in which ``task`` is learned.
            task: the task.
            x: (B, ...), an input to test the smaller tensors on. None: random numbers. A module that
                reads integers needs a real input.

        Returns:
            Smaller tensors, with which the module computes the task's logits faster, and a report.

        Raises:
            TypeError, ValueError: a wrong task or input; a task that is not learned; ``x`` is None and
                the module fails on random numbers.
        """
        check_state("compact", state, self.wiring, self.tasks)
        t = check_task("compact", task, self.tasks)
        check_learned("compact", state, [t])
        inputs = None if x is None else check_input("compact", x, self.wiring)
        return compact(self.network, state, t, inputs)

    def gates(self, embeddings: dict[str, Tensor], scale: float | Tensor | None) -> dict[str, Tensor]:
        """Gates of embeddings, {group: (..., U)} in [0, 1]: soft at scale s >= 0; for None binary."""
        check_kind("gates", "embeddings", embeddings, dict, "{group: tensor}: state.embeddings")
        return super().gates(embeddings, scale)
