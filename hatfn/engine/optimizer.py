"""What an optimiser must be: an optax-style pair of pure functions, such as torchopt's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hatfn.numerics.vmap import batched, is_unbatchable
from hatfn.state import HATState, trainable


class Optimizer(Protocol):
    """Any optax-style pair, such as torchopt's."""

    @property
    def init(self) -> Callable[..., Any]:
        """From parameters to the optimiser's state."""

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]:
        """From gradients and state to updates and state."""


class PureOptimizer(NamedTuple):
    """An (init, update) pair that changes nothing it is given.

    Attributes:
        init: from parameters to the optimiser's state.
        update: from gradients and state to updates and state.
        stacked: the same of trees that lead with replicas; None: ``vmap`` makes it from ``update``.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    stacked: Callable[..., tuple[Any, Any]] | None = None


def fresh_opt_state(optimizer: Optimizer, state: HATState) -> Any:
    """The optimiser's state before any step of the tasks that are open; of none, as of one task."""
    return next(possible_opt_states(optimizer, state))


def possible_opt_states(optimizer: Optimizer, state: HATState) -> Iterator[Any]:
    """Fresh moments of as many tasks as a state's can be of.

    First of those that are open; then of any number, for the tasks that were opened together last may
    be closed by now.
    """
    opened = state.active.nonzero().flatten().tolist() or [0]
    for rows in (opened, *map(range, range(1, len(state.active) + 1))):
        yield optimizer.init(trainable(state, rows))


class _OutOfPlace(TorchFunctionMode):
    """Operators that vmap has a rule for, in the place of their in-place kin that it loops over."""

    RULES: ClassVar = {Tensor.addcmul_: torch.addcmul, Tensor.addcdiv_: torch.addcdiv}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.RULES:
            return args[0].copy_(self.RULES[func](*args, **kwargs))
        return func(*args, **kwargs)


def stacked(optimizer: Optimizer) -> PureOptimizer:
    """The optimiser of S stacked trees: by its own way to step them, or by ``vmap``."""
    own = getattr(optimizer, "stacked", None)
    if own is None:

        def own(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
            every: tuple[Any, Any] = batched(_vectorized(optimizer), (0, 0, 0))(
                gradients, state, params
            )
            return every

    return PureOptimizer(batched(optimizer.init, (0,)), own)


def _vectorized(optimizer: Optimizer) -> Callable[..., tuple[Any, Any]]:
    """The update, to the bit, as ``vmap`` batches it best."""

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        try:
            with _OutOfPlace():
                return optimizer.update(gradients, state, params=params)
        except RuntimeError as error:
            if not is_unbatchable(error):
                raise
            raise ValueError(
                "replicas: the optimizer has an operator of its own that vmap cannot batch, as "
                "those of torchopt have with use_accelerated_op=True. Expected one without it: "
                "torchopt.adam(1e-3)."
            ) from error

    return update


def advanced(optimizer: Optimizer, gradients: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """The optimiser's updates and new state; moments of other tasks are refused, even if they fit.

    Raises:
        ValueError: the moments are of other tasks than the parameters.
    """
    try:
        steps, new = optimizer.update(gradients, opt_state, params=params)
    except RuntimeError:
        _check_opt_state(opt_state, optimizer.init(params))
        raise
    _check_opt_state(steps, params)
    return steps, new


def check_optimizer(optimizer: Any) -> PureOptimizer:
    """The pair, shown to be pure by a small example."""
    init, update = getattr(optimizer, "init", None), getattr(optimizer, "update", None)
    if not (callable(init) and callable(update)):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        torchs = issubclass(kind, torch.optim.Optimizer)
        written = (
            f"hatfn.from_torch(torch.optim.{kind.__name__}, lr=1e-3)"
            if torchs
            else "torchopt.adam(1e-3)"
        )
        raise TypeError(
            f"build: optimizer is {'the class' if kind is optimizer else 'a'} {kind.__name__}. "
            f"Expected a pair of pure functions (init, update), not one that changes parameters in "
            f"place: {written}."
        )
    if "inplace" in inspect.signature(update).parameters:
        update = partial(update, inplace=False)
    params, gradients = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([0.5, 0.25])}
    start = init(params)
    if not all(isinstance(leaf, Tensor) for leaf in optree.tree_leaves(start)):
        raise TypeError(
            "build: the optimizer keeps a plain number in its state, which vmap cannot carry (as "
            "torchopt's radam and adamax do). Expected tensors only, as in "
            "torchopt's sgd, adam, adamw or rmsprop."
        )
    first, second = (update(gradients, start, params=params)[0] for _ in range(2))
    if not torch.equal(first["w"], second["w"]):
        raise ValueError(
            "build: the optimizer gave two answers to the same question, so it keeps state of its own "
            "(torchopt's sgd does with dampening). Expected a pure update: leave dampening at 0."
        )
    return PureOptimizer(init, update, getattr(optimizer, "stacked", None))


def check_carried(where: str, carried: Any, fresh: Any, count: int) -> Any:
    """Moments of as many tasks as are open now."""
    if not _same_shapes(carried, fresh):
        raise ValueError(
            f"{where}: carry=True, but the optimiser's moments are not those of {count} tasks trained "
            f"together, or were not saved. Write carry=False to start with new ones."
        )
    return carried


def _check_opt_state(given: Any, expected: Any) -> None:
    """Shapes that follow from moments of the very tasks that are open."""
    if not _same_shapes(given, expected):
        raise ValueError(
            "update: the optimiser's moments are not those of the open tasks alone: others were "
            "opened with them, and closed since. Write state = hat.begin(state, task) for those that "
            "remain."
        )


def _same_shapes(*trees: Any) -> bool:
    one, other = ([leaf.shape for leaf in optree.tree_leaves(tree)] for tree in trees)
    return one == other
