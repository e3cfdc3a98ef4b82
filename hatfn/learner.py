"""The learner: init, begin, update, consolidate, forward, predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hatfn import checks, transforms
from hatfn.compact import Subnet, compact
from hatfn.forward import Network, Output, call, cut_heads, forward, forward_plain, predict
from hatfn.gates import Init, flush, gate, hard_gate
from hatfn.initial import initial_state
from hatfn.state import HATState, Trainable, binary_gates, put, take, trainable, tree_map
from hatfn.wiring import Wiring


class Optimizer(Protocol):
    """Any optax-style pair, such as torchopt's."""

    @property
    def init(self) -> Callable[..., Any]:
        """From parameters to the optimiser's state."""

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]:
        """From gradients and state to updates and state."""


class Info(NamedTuple):
    """What one update reports; every leaf a tensor.

    Attributes:
        loss: (), the criterion without the penalty.
        penalty: (), the sparsity before its weight.
        logits: (B, classes of the task), or the module's several outputs, before the step, in train
            mode.
        grad_norm: (), of everything trained, after protection and compensation, before the clip.
        ok: () bool; False: something was not finite, and the step was refused.
    """

    loss: Tensor
    penalty: Tensor
    logits: Output
    grad_norm: Tensor
    ok: Tensor


class HAT(NamedTuple):
    """A continual learner: pure functions over a :class:`~hatfn.state.HATState`.

    Made by :func:`build`; its fields are what build() was given. No method changes anything it is
    given: each returns a new state.
    """

    network: Network
    tasks: int
    optimizer: Optimizer
    loss: Callable[[Output, Tensor], Tensor]
    regularizer: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
    squash: Callable[[Tensor], Tensor]
    embedding_init: Init
    protection: transforms.Protection
    hyper: dict[str, float]
    compensated: bool
    max_norm: float | None
    clamp: float
    decay_embeddings: bool

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
            seed: what embeddings, heads and, if fresh, weights are drawn from; the global random
                state is left alone.
            fresh: draw the module's weights anew instead of taking them as they are.

        Returns:
            A state with nothing learned. A head as wide as the module's own starts as its copy,
            unless ``fresh``.
        """
        state = initial_state(
            self.network, self.tasks, self.embedding_init, self.protection, self.hyper, seed, fresh
        )
        return state._replace(opt_state=self.optimizer.init(trainable(state, 0)))

    def begin(
        self, state: HATState, task: int, locked: Sequence[int] | None = None, carry: bool = False
    ) -> HATState:
        """Open a task for training and protect what earlier ones use.

        A learned task that is opened again counts as not learned until it is consolidated.

        Args:
            state: any state.
            task: the task to train.
            locked: the tasks to keep unchanged; None: every learned task but this one. One that is
                not learned counts with its current binary gates. A learned task left out is no longer
                guaranteed: ``state.locked`` says so.
            carry: keep the optimiser's moments instead of starting anew.

        Raises:
            TypeError, ValueError: a task that does not exist, or that is both open and locked.

        Warns:
            HATWarning: a group without a free unit.
        """
        t = checks.check_task("begin", task, self.tasks)
        here = torch.arange(self.tasks, device=state.learned.device) == t
        learned = state.learned & ~here
        rows = checks.check_locked("begin", locked, t, self.tasks)
        holds = (
            learned
            if rows is None
            else torch.zeros_like(here).index_fill(0, rows.to(here.device), True)
        )
        state = state._replace(
            masks={group: mask & ~here[:, None] for group, mask in state.masks.items()},
            learned=learned,
            locked=holds,
            active=here,
        )
        used = self._used(state)
        checks.check_free("begin", t, used)
        protection = (
            transforms.exact_protection(self.wiring, binary_gates(state), holds)
            if self.protection == "exact"
            else transforms.paper_protection(self.wiring, used)
        )
        frozen = self.network.frozen & protection.keys()
        protection |= {name: torch.ones_like(protection[name]) for name in frozen}
        opt_state = state.opt_state if carry else self.optimizer.init(trainable(state, t))
        return state._replace(protection=protection, opt_state=opt_state)

    def update(
        self,
        state: HATState,
        batch: tuple[Tensor, Tensor],
        task: int,
        scale: float | Tensor | None,
    ) -> tuple[HATState, Info]:
        """One step of training.

        In this order: gradient, protection, compensation of the embeddings' gradients, clip, the
        optimiser, protection of the update, clamp of the embeddings. A step with a result that is not
        finite is refused: the state stays as it was and ``info.ok`` is False.

        There is no branch on a tensor's value, so that ``vmap(hat.update, in_dims=(0, 0, None, None),
        randomness="different")`` trains as many seeds as the states have a leading axis of.

        Args:
            state: with ``task`` opened by :meth:`begin`.
            batch: x (B, ...) and the loss's target; for class labels (B,) int64, counted within the
                task.
            task: which.
            scale: mask scale s in (0, s_max]; None trains the weights under binary gates and leaves
                the embeddings alone.

        Raises:
            TypeError, ValueError: a wrong task, batch or scale, or a task that is not open.
        """
        t = checks.check_task("update", task, self.tasks)
        checks.check_active("update", state, t)
        if scale is not None:
            checks.check_scale("update", scale, state.hyper["s_max"])
        x, y = checks.check_batch(batch, None if self.classes is None else self.classes[t])
        checks.check_input("update", x, self.wiring)
        own, before = trainable(state, t), take(state.task_buffers, t)
        used = self._used(state)

        def objective(
            own: Trainable,
        ) -> tuple[Tensor, tuple[Tensor, Tensor, Output, dict[str, Tensor]]]:
            gates = self._gates(own.embeddings, scale)
            params = {**own.params, **cut_heads(self.network, own.task_params, t)}
            logits, buffers = call(self.network, self.network.train, params, before, gates, x)
            loss, penalty = self.loss(logits, y), self.regularizer(gates, used)
            return loss + state.hyper["sparsity"] * penalty, (loss, penalty, logits, buffers)

        raw, (loss, penalty, logits, buffers) = torch.func.grad(objective, has_aux=True)(own)
        gradients, norm = transforms.clip_by_norm(
            self._corrected(raw, state, own, scale), self.max_norm
        )
        seen = own if self.decay_embeddings else own._replace(embeddings=_zeros(own.embeddings))
        steps, opt_state = self.optimizer.update(gradients, state.opt_state, params=seen)
        if scale is None:
            steps = steps._replace(embeddings=_zeros(own.embeddings))
        new = transforms.apply_updates(own, steps, state.hyper["lr"])
        new = new._replace(embeddings=transforms.clamp_embeddings(new.embeddings, self.clamp))

        frozen = self.network.frozen & own.task_params.keys()
        kept = {name: own.task_params[name] for name in frozen}
        new = new._replace(task_params=new.task_params | kept)

        ok = transforms.finite((loss, new, buffers, opt_state)) & state.active[t]
        new = transforms.settle(ok, new, own, state.protection)
        buffers, opt_state = transforms.choose(ok, (buffers, opt_state), (before, state.opt_state))
        state = state._replace(
            params=new.params,
            task_params=put(state.task_params, t, new.task_params),
            task_buffers=put(state.task_buffers, t, buffers),
            embeddings=put(state.embeddings, t, new.embeddings),
            opt_state=opt_state,
        )
        return state, Info(loss, penalty, logits, norm, ok)

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
            TypeError, ValueError: a wrong task or input; a task that is not open: a learned task's
                outputs must not move.
        """
        t = checks.check_task("recalibrate", task, self.tasks)
        checks.check_active("recalibrate", state, t)
        before, gates = take(state.task_buffers, t), take(binary_gates(state), t)
        params = {**state.params, **take(state.task_params, t)}
        seen = []
        for x in batches:
            checks.check_input("recalibrate", x, self.wiring)
            seen.append(call(self.network, self.network.calibrate, params, before, gates, x)[1])
        mean = {
            name: torch.stack([of_batch[name] for of_batch in seen]).mean(0)
            for name, old in before.items()
            if seen and old.is_floating_point()
        }
        buffers = transforms.choose(transforms.finite(mean), before | mean, before)
        return state._replace(task_buffers=put(state.task_buffers, t, buffers))

    def consolidate(self, state: HATState, task: int) -> HATState:
        """Close a task: its binary gates become its mask, and it counts as learned.

        Raises:
            TypeError, ValueError: a task that does not exist.

        Warns:
            HATWarning: a group in which the task uses no unit.
        """
        t = checks.check_task("consolidate", task, self.tasks)
        here = torch.arange(self.tasks, device=state.learned.device) == t
        gates = take(binary_gates(state), t)
        checks.check_alive("consolidate", t, gates)
        return state._replace(
            masks=put(state.masks, t, gates),
            learned=state.learned | here,
            active=state.active & ~here,
        )

    def forward(
        self, state: HATState, x: Tensor, task: int | None, scale: float | Tensor | None = None
    ) -> Output:
        """The output of one task in eval mode.

        Args:
            state: any state.
            x: (B, ...).
            task: which; None: the module itself, ungated, with the shared weights of the state and
                its own norms and classifier.
            scale: None: the binary gates of a learned task; a number s in (0, s_max]: soft gates.

        Returns:
            (B, classes of the task), or what the module gives if there are no classes; a tuple or
            dict of such where the module returns one.

        Raises:
            TypeError, ValueError: a wrong task, input or scale; binary gates of a task that was never
                learned.
        """
        checks.check_input("forward", x, self.wiring)
        if task is None:
            return forward_plain(self.network, state, x)
        t = checks.check_task("forward", task, self.tasks)
        if scale is None:
            checks.check_learned("forward", state, [t])
            return forward(self.network, state, x, t, take(state.masks, t))
        checks.check_scale("forward", scale, state.hyper["s_max"])
        return forward(self.network, state, x, t, self._gates(take(state.embeddings, t), scale))

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
        checks.check_input("predict", x, self.wiring)
        if tasks is None:
            tasks = state.learned.nonzero().flatten().tolist()
        rows = [checks.check_task("predict", task, self.tasks) for task in tasks]
        if not rows:
            raise ValueError(
                "predict: no tasks. Expected at least one learned task: call hat.consolidate first."
            )
        checks.check_learned("predict", state, rows)
        return predict(self.network, state, x, rows, chunk_size)

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
        t = checks.check_task("compact", task, self.tasks)
        checks.check_learned("compact", state, [t])
        if x is not None:
            checks.check_input("compact", x, self.wiring)
        return compact(self.network, state, t, x)

    def _gates(self, embeddings: dict[str, Tensor], scale: float | Tensor | None) -> dict[str, Tensor]:
        if scale is None:
            return {group: hard_gate(e).to(e.dtype) for group, e in embeddings.items()}
        return {group: flush(gate(e, scale, self.squash)) for group, e in embeddings.items()}

    def _used(self, state: HATState) -> dict[str, Tensor]:
        """The cumulative mask: which units the locked tasks use, {group: (U,)}."""
        lock = state.locked[:, None]
        if self.protection == "exact":
            return {group: (on & lock).any(0) for group, on in binary_gates(state).items()}
        soft = self._gates(state.embeddings, state.hyper["s_max"])
        return {group: (a * lock).amax(0) for group, a in soft.items()}

    def _corrected(
        self, raw: Trainable, state: HATState, own: Trainable, scale: float | Tensor | None
    ) -> Trainable:
        """Gradients with earlier tasks protected and embeddings compensated."""
        gradients = raw._replace(params=transforms.protect(raw.params, state.protection))
        if scale is None or not self.compensated:
            return gradients
        hyper = state.hyper
        return gradients._replace(
            embeddings=transforms.compensate(
                raw.embeddings, own.embeddings, scale, hyper["s_max"], hyper["compensation"]
            )
        )


def _zeros(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return tree_map(torch.zeros_like, tree)  # type: ignore[no-any-return]
