"""Optimizers as optax-style pairs of pure functions, such as torchopt's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hatfn.engine.memory import Room
from hatfn.numerics.vmap import batched, is_unbatchable
from hatfn.state import HATState, trainable


class Optimizer(Protocol):
    """Any optax-style pair, such as torchopt's."""

    @property
    def init(self) -> Callable[..., Any]:
        """From parameters to the optimizer state."""

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]:
        """From gradients and optimizer state to updates and the next optimizer state."""


class Use(Protocol):
    """What to do with a piece of the updates, before the next piece is computed."""

    def __call__(self, index: int, start: int, step: Tensor, kept: list[Tensor]) -> None:
        """Use one piece.

        Args:
            index: which of the parameters the piece is of.
            start: the first of its numbers.
            step: (n,), its updates; the callee may overwrite them.
            kept: the pieces (n,) of the parameter's new optimizer state.
        """


class ByPiece(Protocol):
    """An update that hands over its results piece by piece, so that they never exist as a whole."""

    def __call__(
        self,
        gradients: Sequence[Tensor],
        state: Any,
        params: Sequence[Tensor],
        use: Use,
        lead: int,
        room: Room,
    ) -> Any:
        """Compute one update.

        Args:
            gradients: dense tensors on a CPU.
            state: the optimizer state of their parameters.
            params: the parameters.
            use: receives each piece.
            lead: the number of axes, 0 or 1, in front of every leaf that count states.
            room: from a shape and a type to memory for a part of the new optimizer state.

        Returns:
            The new optimizer state; None if these states cannot advance together.
        """


class PureOptimizer(NamedTuple):
    """An (init, update) pair that does not change its arguments.

    Attributes:
        init: from parameters to the optimizer state.
        update: from gradients and optimizer state to updates and the next optimizer state.
        stacked: ``update`` for the stacked trees of S replicas; None: ``update`` under ``vmap``.
        by_piece: ``update`` for flat pieces of large tensors, see
            :func:`hatfn.engine.torch_optim.from_torch`; None: the optimizer does not treat every number
            by itself.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    stacked: Callable[..., tuple[Any, Any]] | None = None
    by_piece: ByPiece | None = None


def fresh_opt_state(optimizer: Optimizer, state: HATState) -> Any:
    """The optimizer state before the first step of the open tasks; if none is open, for one task."""
    return next(possible_opt_states(optimizer, state))


def possible_opt_states(optimizer: Optimizer, state: HATState) -> Iterator[Any]:
    """Fresh optimizer states, one for each shape that the optimizer state of ``state`` can have.

    The first is for the open tasks. The others are for any number of tasks, because some of the tasks
    that were opened together may be closed by now.
    """
    opened = state.active.nonzero().flatten().tolist() or [0]
    for rows in (opened, *map(range, range(1, len(state.active) + 1))):
        yield optimizer.init(trainable(state, rows))


class _OutOfPlace(TorchFunctionMode):
    """Replace in-place operators, which vmap can only loop over, by operators that it can batch."""

    RULES: ClassVar = {Tensor.addcmul_: torch.addcmul, Tensor.addcdiv_: torch.addcdiv}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.RULES:
            return args[0].copy_(self.RULES[func](*args, **kwargs))
        return func(*args, **kwargs)


def stacked(optimizer: Optimizer) -> PureOptimizer:
    """The optimizer of S stacked trees: by its own ``stacked`` update, or else by ``vmap``."""
    update = getattr(optimizer, "stacked", None)
    if update is None:

        def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
            results: tuple[Any, Any] = batched(_vectorized(optimizer), (0, 0, 0))(
                gradients, state, params
            )
            return results

    return PureOptimizer(batched(optimizer.init, (0,)), update)


def _vectorized(optimizer: Optimizer) -> Callable[..., tuple[Any, Any]]:
    """An update that ``vmap`` batches faster, with results that are equal to the bit."""

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        try:
            with _OutOfPlace():
                return optimizer.update(gradients, state, params=params)
        except RuntimeError as error:
            if not is_unbatchable(error):
                raise
            raise ValueError(
                "replicas: vmap cannot batch an operator of the optimizer, as with torchopt's "
                "use_accelerated_op=True. Expected an optimizer without such an operator: "
                "torchopt.adam(1e-3)."
            ) from error

    return update


def advanced(optimizer: Optimizer, gradients: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """The updates and the new optimizer state of one step.

    Raises:
        ValueError: the optimizer state is of more or fewer tasks than the parameters. This is an error
            even if the shapes broadcast.
    """
    try:
        steps, new = optimizer.update(gradients, opt_state, params=params)
    except RuntimeError:
        check_opt_state(opt_state, optimizer.init(params))
        raise
    check_opt_state(steps, params)
    return steps, new


def check_optimizer(optimizer: Any) -> PureOptimizer:
    """The optimizer as a pair of functions, after a small example has shown that the pair is pure."""
    init, update = getattr(optimizer, "init", None), getattr(optimizer, "update", None)
    if not (callable(init) and callable(update)):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        from_torch = issubclass(kind, torch.optim.Optimizer)
        right = (
            f"hatfn.from_torch(torch.optim.{kind.__name__}, lr=1e-3)"
            if from_torch
            else "torchopt.adam(1e-3)"
        )
        raise TypeError(
            f"build: optimizer is {'the class' if kind is optimizer else 'a'} {kind.__name__}. "
            f"Expected a pair of pure functions (init, update), not an optimizer that changes "
            f"parameters in place: {right}."
        )
    if "inplace" in inspect.signature(update).parameters:
        update = partial(update, inplace=False)
    params, gradients = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([0.5, 0.25])}
    start = init(params)
    if not all(isinstance(leaf, Tensor) for leaf in optree.tree_leaves(start)):
        raise TypeError(
            "build: the optimizer state contains a plain number, which vmap cannot batch (torchopt's "
            "radam and adamax have one). Expected tensors only, as in torchopt's sgd, adam, adamw or "
            "rmsprop."
        )
    first, second = (update(gradients, start, params=params)[0] for _ in range(2))
    if not torch.equal(first["w"], second["w"]):
        raise ValueError(
            "build: the optimizer returned different updates for the same arguments, so it has hidden "
            "state (as torchopt's sgd with dampening). Expected a pure update: leave dampening at 0."
        )
    optional = (getattr(optimizer, name, None) for name in ("stacked", "by_piece"))
    return PureOptimizer(init, update, *optional)


def check_carried(where: str, carried: Any, fresh: Any, count: int) -> Any:
    """The optimizer state to carry on, after a check that it is of ``count`` tasks."""
    if not _same_shapes(carried, fresh):
        raise ValueError(
            f"{where}: carry=True, but the optimizer state is not that of {count} tasks trained "
            f"together, or it was not saved. Write carry=False to start with a new one."
        )
    return carried


def check_opt_state(given: Any, expected: Any) -> None:
    """Check the shapes that show whether the optimizer state is that of the open tasks alone."""
    if not _same_shapes(given, expected):
        raise ValueError(
            "update: the optimizer state is not that of the open tasks alone: other tasks were opened "
            "together with them and are closed now. Write state = hat.begin(state, task) for the tasks "
            "that are still open."
        )


def _same_shapes(*trees: Any) -> bool:
    one, other = ([leaf.shape for leaf in optree.tree_leaves(tree)] for tree in trees)
    return one == other
