"""Check that a learner has not forgotten anything and, for a HAT, that it cannot forget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import optree
import torch
from torch import Tensor

from hatfn.checks.calls import check_chosen, check_state
from hatfn.checks.values import check_seed
from hatfn.learner import HAT
from hatfn.numerics.arguments import map_leaves
from hatfn.numerics.trees import Tree
from hatfn.state import HATState
from hatfn.tracing.perturbation import Seen, Verification, another, flat

_WHERE = "verify_no_forgetting"


class Learner(Protocol):
    """Any object that computes a task's outputs from a state, and from nothing else."""

    def forward(self, state: Any, x: Any, task: int) -> Any:
        """The outputs: a tensor or a tree of tensors."""
        ...


def verify_no_forgetting(
    hat: Learner,
    state: Tree,
    x: Any,
    later: Tree = None,
    tasks: Sequence[int] | None = None,
    seed: int = 0,
) -> Verification:
    """Check that learned tasks did not change and, for a HAT, that later training cannot change them.

    With ``later``, for any learner: the outputs of every task from both states must be equal to the
    bit. If they are not, each leaf that differs is changed alone, so that the error names the leaf that
    leaks.

    For a HAT, with or without ``later``: once ``tasks`` are protected, later training may change the
    shared entries whose protection is below 1, and the parameters, statistics and embeddings of other
    tasks. All these are replaced by noise; the outputs of each task must stay equal to the bit. As a
    control, noise in the protected entries of each parameter must change them, as in
    :func:`verify_wiring`. Soft protection rules fail, because they promise less.

    Args:
        hat: a :class:`hatfn.HAT`, or any object with a method ``forward(state, x, task)`` that is a
            pure function of the state.
        state: a tree of tensors, the state when the tasks had been learned. If a learner trains in
            place, pass a copy.
        x: (B, ...), an input.
        later: the state after more training.
        tasks: the tasks that must not change; None: all that a HAT has learned in both states. Leave
            out a task that was opened again or that was not in ``locked``: it may change.
        seed: the seed of the noise.

    Returns:
        The findings; their ``leaks`` are empty. "tested" are the leaves that differ between the states,
        and "untested" are all others, and a HAT's parameters that change no output in a control.

    Raises:
        AssertionError: something leaks; the message names the leaf, the size of the change and the
            task. Or nothing is proven: the states are the same, no output depends on the input, or
            ``forward`` is not pure.
        TypeError, ValueError: no learner; no learned task; neither a HAT nor ``later``; a leaf that is
            no tensor.

    Example:
        >>> class Net:  # one layer for all tasks: forgets
        ...     def forward(self, state, x, task):
        ...         return x @ state["shared"] + state["own"][task]
        >>> before = {"shared": torch.eye(2), "own": torch.zeros(3, 2)}
        >>> x, after = torch.ones(1, 2), before | {"own": torch.tensor([[0.0], [1], [1]]).expand(3, 2)}
        >>> verify_no_forgetting(Net(), before, x, after, tasks=[0]).tested
        ("state['own']",)
        >>> verify_no_forgetting(Net(), before, x, after | {"shared": torch.eye(2) + 1}, tasks=[0])
        Traceback (most recent call last):
        AssertionError: verify_no_forgetting: task 0 moved by 2 (state['shared'] alone by 2).
    """
    generator = torch.Generator().manual_seed(check_seed(_WHERE, seed))
    rows = _rows(hat, state, later, tasks)
    changed = {} if later is None else _changed(state, later)
    seen = Seen(list(hat.network.wiring.shared) if isinstance(hat, HAT) else [])
    other = map_leaves(lambda _, leaf: another(leaf, generator), x)
    for task in rows:
        seen.input_seen |= not torch.equal(*(_pure(hat, state, each, task) for each in (x, other)))
    if later is not None:
        if not changed:
            raise AssertionError(
                f"{_WHERE}: no leaf differs between state and later, so nothing is proven. Train in "
                f"between, and pass a copy of the state if training changes it in place."
            )
        if moves := [move for task in rows if (move := _move(hat, state, later, x, task))]:
            raise AssertionError(f"{_WHERE}: {'; '.join(moves)}.")
        seen.names += _leaves(state)
        seen.tested |= changed.keys()
    if isinstance(hat, HAT):
        _perturb(hat, state, x, rows, seen, generator)
    return seen.verdict(_WHERE)


def _rows(hat: Learner, state: Tree, later: Tree, tasks: Sequence[int] | None) -> list[int]:
    """The tasks to check."""
    if not callable(getattr(hat, "forward", None)):
        raise TypeError(
            f"{_WHERE}: hat is a {type(hat).__name__}. Expected a learner with a method forward(state, "
            f"x, task)."
        )
    if isinstance(hat, HAT):
        for each in (state, later) if later is not None else (state,):
            check_state(_WHERE, each, hat.wiring, hat.tasks)
        if tasks is None and later is not None:
            tasks = (state.learned & later.learned).nonzero().flatten().tolist()
        return check_chosen(_WHERE, state, tasks, hat.tasks)
    if later is None or not tasks:
        raise ValueError(
            f"{_WHERE}: later={later!r}, tasks={tasks!r}. Expected the state after more training and "
            f"the learned tasks, as for any learner but a HAT: {_WHERE}(learner, state, x, later, [0])."
        )
    return list(tasks)


def _leaves(tree: Tree, root: str = "state") -> dict[str, Tensor]:
    """{a Python expression that leads to a leaf: the leaf}."""
    names = (accessor.codify(root) for accessor in optree.tree_accessors(tree))
    leaves = dict(zip(names, optree.tree_leaves(tree), strict=True))
    for name, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{_WHERE}: {name} is a {type(leaf).__name__}. Expected tensors only: torch.as_tensor."
            )
    return leaves


def _changed(state: Tree, later: Tree) -> dict[str, Tensor]:
    """The leaves of ``later`` that differ from those of ``state``, or that ``state`` does not have."""
    before = _leaves(state)

    def same(old: Tensor | None, new: Tensor) -> bool:
        return old is not None and old.dtype == new.dtype and torch.equal(old, new)

    return {name: leaf for name, leaf in _leaves(later).items() if not same(before.get(name), leaf)}


def _run(hat: Learner, state: Tree, x: Any, task: int) -> Tensor:
    with torch.no_grad():
        return flat(hat.forward(state, x, task)).clone()


def _pure(hat: Learner, state: Tree, x: Any, task: int) -> Tensor:
    """The outputs, after a check that they are numbers and that a second call gives the same."""
    output = _run(hat, state, x, task)
    if output.isnan().any():
        raise AssertionError(f"{_WHERE}: outputs of task {task} contain nan, so nothing is proven.")
    if not torch.equal(output, _run(hat, state, x, task)):
        raise AssertionError(
            f"{_WHERE}: forward gave two different outputs of task {task} for the same state. Expected "
            f"a pure function: without dropout or batch statistics, and without writing to the state."
        )
    return output


def _move(hat: Learner, state: Tree, later: Tree, x: Any, task: int) -> str | None:
    """How much a task's outputs change from a state to a later one, and which leaves cause it.

    None if they do not change.
    """
    before = _run(hat, state, x, task)

    def move(new: Tree) -> float:
        after = _run(hat, new, x, task)
        if after.shape != before.shape:
            return torch.inf
        return torch.where(after == before, 0, (after - before).abs()).max().item()

    if not (total := move(later)):
        return None
    leaves, structure = _leaves(state), optree.tree_structure(state)
    alone = {
        name: move(optree.tree_unflatten(structure, {**leaves, name: leaf}.values()))
        for name, leaf in _changed(state, later).items()
        if name in leaves and leaf.shape == leaves[name].shape
    }
    listed = ", ".join(f"{name} alone by {by:.3g}" for name, by in alone.items() if by)
    return f"task {task} moved by {total:.3g} ({listed or 'several leaves together, none alone'})"


def _perturb(
    hat: HAT, state: HATState, x: Any, tasks: list[int], seen: Seen, generator: torch.Generator
) -> None:
    """Replace by noise all that later training may change once the tasks are protected."""
    locked = state._replace(locked=hat.flags(state, tasks))
    protected = {name: p == 1 for name, p in hat.protect(locked, state)[0].items()}
    for task in tasks:
        others = _noise_elsewhere(state, task, generator)
        if move := _move(hat, state, others, x, task):
            raise AssertionError(f"{_WHERE}: values of another task reach the output: {move}.")
        of_task = Seen([*protected])
        of_task.tested = seen.tested
        of_task.look(_from_shared(hat, others, x, task), state.params, protected, generator)
        seen.leaks |= {f"task {task}: {name}": change for name, change in of_task.leaks.items()}


def _from_shared(
    hat: HAT, state: HATState, x: Any, task: int
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The function from shared weights to a task's outputs."""
    return lambda shared: flat(hat.forward(state._replace(params={**state.params, **shared}), x, task))


def _noise_elsewhere(state: HATState, task: int, generator: torch.Generator) -> HATState:
    """The state with noise in the parameters, statistics and embeddings of all other tasks."""

    def noisy(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        replaced = {}
        for name, leaf in tree.items():
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            replaced[name] = noise.select_scatter(leaf[task], 0, task)
        return replaced

    return state._replace(
        task_params=noisy(state.task_params),
        task_buffers=noisy(state.task_buffers),
        embeddings=noisy(state.embeddings),
    )
