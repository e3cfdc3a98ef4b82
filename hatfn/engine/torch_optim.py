"""Any optimizer of ``torch.optim`` as a pair of pure functions: its kernels run on copies."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from hatfn.engine.memory import Room
from hatfn.engine.optimizer import PureOptimizer, Use, check_opt_state
from hatfn.numerics.concrete import is_concrete
from hatfn.numerics.trees import Tree, tree_map

GROUP = 2**20
"""How many numbers one step of the optimizer's kernels takes at a time: few enough for the cache."""

Kept = tuple[dict[str, Tensor], ...]
"""For each parameter, in the order of the tree, {name: tensor}, such as Adam's "exp_avg"."""


class TorchState(NamedTuple):
    """The state of an optimizer of torch between steps.

    Attributes:
        begun: () bool; False before the first step, in which the optimizer creates its state.
        kept: the state of each parameter.
    """

    begun: Tensor
    kept: Kept


def from_torch(kind: type[torch.optim.Optimizer], **settings: Any) -> PureOptimizer:
    """An optimizer of ``torch.optim`` as an optax-style pair of pure functions.

    Each update makes a new optimizer, gives it a copy of the optimizer state, and lets it take one step
    with its own kernels; with ``fused=True`` it uses its fastest ones. The states of
    :class:`~hatfn.Replicas` step all at once if the optimizer treats every number by itself, as most
    optimizers do, and else one by one. ``vmap`` cannot batch it.

    Args:
        kind: its class, such as :class:`torch.optim.AdamW`. Its ``step`` must not need a closure.
        settings: the other arguments of the class, such as ``lr``. All parameters have the same ones.

    Returns:
        The pair, for :func:`hatfn.build`. A step adds its updates to the parameters.

    Raises:
        TypeError: ``kind`` is not a class of ``torch.optim``, or its ``step`` needs a closure.
        ValueError: the class refuses a setting.

    Example:
        >>> optimizer = from_torch(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> params, gradients = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, -1.0])}
        >>> updates, state = optimizer.update(gradients, optimizer.init(params), params=params)
        >>> updates
        {'w': tensor([-0.1000,  0.1000])}
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise TypeError(
            f"from_torch: kind={kind!r}. Expected a class of torch.optim, followed by its settings: "
            f"from_torch(torch.optim.Adam, lr=1e-3)."
        )
    if inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"from_torch: the step of kind={kind.__name__} needs a closure. Expected a class whose "
            f"step takes gradients: from_torch(torch.optim.Adam, lr=1e-3)."
        )
    position_free, elementwise = _is_position_free(kind, settings), _is_elementwise(kind, settings)
    from_zeros = _starts_from_zeros(kind, settings)

    def init(params: Tree) -> TorchState:
        leaves: list[Tensor] = optree.tree_leaves(params)
        zeros = [torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in leaves]
        _, kept = _step(kind, settings, zeros, [torch.zeros_like(zero) for zero in zeros], None)
        begun = torch.zeros((), dtype=torch.bool, device=leaves[0].device)
        return TorchState(begun, tree_map(torch.zeros_like, kept))

    def entries(state: TorchState) -> Kept | None:
        """The state of each parameter; None before a first step that differs from later ones."""
        if not is_concrete(state.begun):
            raise ValueError(
                f"update: vmap cannot batch torch.optim's {kind.__name__}. Expected hatfn.Replicas, "
                f"which steps it without vmap, or an optimizer that vmap can batch, such as "
                f"torchopt.adam(1e-3)."
            )
        return state.kept if from_zeros or bool(state.begun) else None

    def update(gradients: Tree, state: TorchState, params: Tree) -> tuple[Tree, TorchState]:
        kept_before = entries(state)
        slopes: list[Tensor]
        slopes, structure = optree.tree_flatten(gradients)
        old: list[Tensor] = optree.tree_leaves(params)
        start = [torch.zeros_like(leaf) if position_free else leaf.clone() for leaf in old]
        new, kept = _step(kind, settings, start, slopes, kept_before)
        steps = new if position_free else [a - b for a, b in zip(new, old, strict=True)]
        return optree.tree_unflatten(structure, steps), TorchState(torch.ones_like(state.begun), kept)

    def by_piece(
        gradients: Sequence[Tensor],
        state: TorchState,
        params: Sequence[Tensor],
        use: Use,
        lead: int,
        room: Room,
    ) -> TorchState | None:
        before = _common(state, params) if lead else state
        if before is None:
            return None
        start = None if position_free else params
        kept = _step_by_piece(kind, settings, gradients, entries(before), start, use, room)
        new = TorchState(torch.ones_like(before.begun), kept)
        return _spread(new, state) if lead else new

    def stacked(gradients: Tree, state: TorchState, params: Tree) -> tuple[Tree, TorchState]:
        count = len(state.begun)
        leaves: list[Tensor] = optree.tree_leaves(params)
        together = _common(state, leaves) if elementwise else None
        if together is not None:
            steps, new = update(gradients, together, params)
            return steps, _spread(new, state)
        trees = [tree_map(lambda leaf, i=i: leaf[i], (gradients, state, params)) for i in range(count)]
        results: tuple[Tree, TorchState] = tree_map(
            lambda *each: torch.stack(each), *(update(*tree) for tree in trees)
        )
        return results

    return PureOptimizer(init, update, stacked, by_piece if elementwise else None)


def _step(
    kind: type[torch.optim.Optimizer],
    settings: dict[str, Any],
    start: list[Tensor],
    slopes: list[Tensor],
    kept: Kept | None,
) -> tuple[list[Tensor], Kept]:
    """One step of a new optimizer that starts with the given state; it may write to ``start``.

    Returns:
        the parameters after the step, and the state of each.
    """
    # Fused kernels ignore strides, so tensors must be contiguous.
    params = [leaf.detach().contiguous() for leaf in start]
    for param, slope in zip(params, slopes, strict=True):
        param.grad = slope.detach().contiguous()
    optimizer = kind(params, **settings)
    for param, entries in zip(params, kept or (), strict=kept is not None):
        optimizer.state[param] = {
            name: value.clone(memory_format=torch.contiguous_format) for name, value in entries.items()
        }
    optimizer.step()
    states = (optimizer.state[param] for param in params)
    new = tuple({n: v for n, v in entries.items() if isinstance(v, Tensor)} for entries in states)
    return [param.detach() for param in params], new  # detach drops the attribute grad


def _step_by_piece(
    kind: type[torch.optim.Optimizer],
    settings: dict[str, Any],
    gradients: Sequence[Tensor],
    kept: Kept | None,
    params: Sequence[Tensor] | None,
    use: Use,
    room: Room,
) -> Kept:
    """One step of an elementwise optimizer, group of pieces by group of pieces.

    Args:
        kind: the class.
        settings: its arguments.
        gradients: dense tensors on a CPU.
        kept: the state of each parameter, or None before the first step.
        params: the parameters; None if the step does not depend on them.
        use: receives each piece of the updates.
        room: from a shape and a type to memory for the new state.

    Returns:
        The new state of each parameter.
    """
    new: Kept = tuple({} for _ in gradients)
    for after, entry, gradient in zip(new, kept or (), gradients, strict=kept is not None):
        for name, old in entry.items():
            if old.dim():
                check_opt_state(old, gradient)
            after[name] = room(old.shape, old.dtype)
    optimizer = kind([torch.zeros(1)], **settings)
    for group in _groups([slope.numel() for slope in gradients]):
        optimizer.state.clear()
        moving = []
        for i, start, stop in group:
            slope = gradients[i].view(-1)[start:stop] if gradients[i].dim() else gradients[i]
            start_at = None if params is None else params[i].reshape(-1)[start:stop].view_as(slope)
            piece = torch.zeros_like(slope) if start_at is None else start_at.clone()
            piece.grad = slope
            if kept is not None:
                optimizer.state[piece] = {
                    name: _piece(new[i][name], before, start, stop) for name, before in kept[i].items()
                }
            moving.append((i, start, stop, piece, start_at))
        optimizer.param_groups[0]["params"] = [piece for _, _, _, piece, _ in moving]
        optimizer.step()
        for i, start, stop, piece, start_at in moving:
            parts = []
            for name, value in optimizer.state[piece].items():
                if not isinstance(value, Tensor):
                    continue
                if value.dim() == 0:  # a count of steps, or the entry of a single number
                    new[i][name] = value
                    parts.append(value.view(-1))
                    continue
                if name not in new[i]:
                    new[i][name] = room(gradients[i].shape, value.dtype)
                part = new[i][name].view(-1)[start:stop]
                if part.data_ptr() != value.data_ptr():
                    part.copy_(value)
                parts.append(part)
            piece.grad = None
            step = piece if start_at is None else piece.sub_(start_at)
            use(i, start, step.view(-1), parts)
    # The optimizer is part of a cycle: until it is collected it would hold the last pieces.
    optimizer.state.clear()
    optimizer.param_groups.clear()
    return new


def _piece(room: Tensor, before: Tensor, start: int, stop: int) -> Tensor:
    """A piece of an entry, copied to its new memory, where the optimizer changes it."""
    if before.dim() == 0:
        return before.clone()
    return room.view(-1)[start:stop].copy_(before.reshape(-1)[start:stop])


def _groups(sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces (index, start, stop) of tensors, in groups of about ``GROUP`` numbers."""
    group: list[tuple[int, int, int]] = []
    room = GROUP
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            group.append((i, start, stop))
            room, start = room - (stop - start), stop
            if not room:
                yield group
                group, room = [], GROUP
    if group:
        yield group


def _spread(common: TorchState, like: TorchState) -> TorchState:
    """The states of all replicas, from one state in which counts occur only once."""
    states: TorchState = tree_map(
        lambda leaf, old: leaf.expand_as(old).clone() if leaf.dim() < old.dim() else leaf, common, like
    )
    return states


def _common(state: TorchState, leaves: Sequence[Tensor]) -> TorchState | None:
    """The states of all replicas as one state of stacked parameters, in which counts occur only once.

    Returns:
        the state. None if the counts of replicas differ, as after a step that one of them refused, or
        if a parameter is a single number, because the code cannot tell it from a count.
    """
    every: list[Tensor] = optree.tree_leaves(state)  # type: ignore[arg-type]
    counts = [leaf for leaf in every if leaf.dim() < 2]
    if any(leaf.dim() < 2 for leaf in leaves) or any(len({*count.tolist()}) > 1 for count in counts):
        return None
    common: TorchState = tree_map(lambda leaf: leaf[0] if leaf.dim() < 2 else leaf, state)
    return common


_SLOPES = torch.tensor([[-1.0, 1e-6, 0.5], [3e9, -0.1, 2.0]], dtype=torch.float64)


def _is_position_free(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> bool:
    """Whether the step does not depend on the parameters, so that it may start from zero.

    With weight decay it does depend on them. The test notices decay by a billionth of a step.
    """
    here, there = (torch.full_like(_SLOPES, value) for value in (0.0, 1024.0))
    near, far = (_step(kind, settings, [at.clone()], [_SLOPES], None)[0][0] for at in (here, there))
    return torch.allclose(far - there, near, rtol=1e-9, atol=1e-12)


def _starts_from_zeros(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> bool:
    """Whether a first step equals a step from a state of zeros, as it does not with dampening."""
    (first,), kept = _step(kind, settings, [torch.zeros_like(_SLOPES)], [_SLOPES], None)
    zeros: Kept = tree_map(torch.zeros_like, kept)
    (again,), then = _step(kind, settings, [torch.zeros_like(_SLOPES)], [_SLOPES], zeros)
    same: list[tuple[Tensor, Tensor]] = [
        *zip(optree.tree_leaves([first, kept]), optree.tree_leaves([again, then]), strict=True)  # type: ignore[arg-type]
    ]
    return all(torch.equal(a, b) for a, b in same)


def _is_elementwise(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> bool:
    """Whether the optimizer treats every number by itself.

    The test takes steps with numbers of many sizes, once together and once row by row.
    """
    whole, kept = _SLOPES.clone(), None
    parts: list[Any] = [(row.clone()[None], None) for row in _SLOPES]
    for factor in (1.0, -3.0, 0.1):
        (whole,), kept = _step(kind, settings, [whole], [_SLOPES * factor], kept)
        stepped = [
            _step(kind, settings, [row], [slope[None] * factor], row_state)
            for (row, row_state), slope in zip(parts, _SLOPES, strict=True)
        ]
        parts = [(rows[0], row_state) for rows, row_state in stepped]
    return torch.allclose(whole, torch.cat([row for row, _ in parts]), rtol=1e-12, atol=0)
