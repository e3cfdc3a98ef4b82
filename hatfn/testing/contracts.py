"""Checks of any function: it is pure, its state keeps its form, ``vmap`` of it equals a loop."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import optree
import pandas as pd
import torch
from torch import Tensor, nn

from hatfn.numerics.digests import digest
from hatfn.numerics.trees import Tree

T = TypeVar("T")

_SHOWN = 5
"""How many differences an error names; it counts the others."""


def verify_pure(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Check that a call changes nothing, and that a second call gives the same result to the bit.

    No argument may change: not the bytes, version and gradient of a tensor, not an array, not the
    parameters, buffers and training flags of a module, and not the keys of a dict. The object of a
    method, the arguments that ``functools.partial`` binds, and a module that is called count as
    arguments. Random states (of PyTorch, numpy and Python) and PyTorch's global settings must stay as
    they are. Results are compared if they are tensors, arrays, tables, modules or plain values; other
    objects are not compared.

    Args:
        function: any function; it is called twice.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The result of the first call.

    Raises:
        AssertionError: something changed; the message names it.

    Example:
        >>> verify_pure(torch.add, torch.ones(2), 1)
        tensor([2., 2.])
        >>> verify_pure(torch.Tensor.add_, torch.ones(2), 1)
        Traceback (most recent call last):
        AssertionError: verify_pure: add_ changed args[0].
    """
    name = getattr(function, "__name__", type(function).__name__)
    given = _given(function, args, kwargs)
    before, world = _fingerprints(given, versions=True), _world()
    first = function(*args, **kwargs)
    after = _fingerprints(given, versions=True)
    if changed := _differing(before, after):
        raise AssertionError(f"verify_pure: {name} changed {_listed(changed)}.")
    if changed := _differing(world, _world()):
        raise AssertionError(f"verify_pure: {name} changed {_listed(changed)}.")
    once = _fingerprints({"result": first})
    again = _fingerprints({"result": function(*args, **kwargs)})
    if changed := _differing(once, again):
        raise AssertionError(f"verify_pure: {name} gave another {_listed(changed)} when called again.")
    if changed := _differing(once, _fingerprints({"result": first})):
        raise AssertionError(
            f"verify_pure: {name}, when called again, wrote to the first {_listed(changed)}."
        )
    return first


def verify_state_stable(function: Callable[..., T], state: Tree, /, *args: Any, **kwargs: Any) -> T:
    """Check that a step returns a state of the same form as the state that it receives.

    The form is the tree structure, and the shapes, dtypes and devices of all leaves. Loops over steps,
    ``vmap``, compiled functions and saved files need the same form.

    Args:
        function: takes a state and further arguments, and returns a state, or a tuple that begins with
            a state, such as (state, info).
        state: any tree of tensors.
        args: further arguments.
        kwargs: keyword arguments.

    Returns:
        The result of the function.

    Raises:
        AssertionError: leaves differ in form; the message names the first ones.

    Example:
        >>> verify_state_stable(lambda state: {"w": state["w"].double()}, {"w": torch.ones(2)})
        Traceback (most recent call last):
        AssertionError: verify_state_stable: <lambda>: state['w'] was float32 (2,), became float64 (2,).
    """
    name = getattr(function, "__name__", type(function).__name__)
    result = function(state, *args, **kwargs)
    new: Tree = result[0] if isinstance(result, tuple) and type(result) is not type(state) else result
    old, now = ({path: _form(leaf) for path, leaf in _leaves(tree, "state")} for tree in (state, new))
    changes = [
        f"{path} was {old.get(path, 'not there')}, became {now.get(path, 'nothing')}"
        for path in _differing(old, now)
    ]
    if changes:
        raise AssertionError(f"verify_state_stable: {name}: {_listed(changes)}.")
    before, after = (optree.tree_structure(tree) for tree in (state, new))
    if before != after:
        raise AssertionError(f"verify_state_stable: {name}: {before} became {after}.")
    return result


def verify_vmap_equals_loop(
    function: Callable[..., Any],
    /,
    *args: Any,
    in_dims: Any = 0,
    rtol: float | None = None,
    atol: float | None = None,
    randomness: str = "error",
) -> Any:
    """Check that ``vmap`` of a function gives the same as a loop over the mapped axis.

    Args:
        function: from tensors, or trees of tensors, to the same.
        args: arguments with a mapped axis.
        in_dims: the mapped axes, as in ``torch.vmap``: an int, None, or a tree of them over ``args``.
        rtol: the tolerance relative to the loop's numbers. If rtol and atol are None, they depend on
            the dtype, as in ``torch.testing.assert_close``. If both are 0, results must be equal to the
            bit.
        atol: the absolute tolerance.
        randomness: as in ``torch.vmap``; random numbers of a function cannot be compared.

    Returns:
        The result of ``vmap``.

    Raises:
        AssertionError: results differ; the message names the leaf that differs most, and by how much.

    Example:
        >>> verify_vmap_equals_loop(torch.dot, torch.eye(2), torch.ones(2), in_dims=(0, None))
        tensor([1., 1.])
        >>> scales = iter([1.0, 1.0, 5.0])
        >>> verify_vmap_equals_loop(lambda x: x * next(scales), torch.eye(2))
        Traceback (most recent call last):
        AssertionError: verify_vmap_equals_loop: <lambda>: result differs by 4 (1 of 1 leaves differ).
    """
    name = getattr(function, "__name__", type(function).__name__)
    batched = torch.vmap(function, in_dims, randomness=randomness)(*args)
    given: Tree = args
    leaves: list[Any]
    leaves, structure = optree.tree_flatten(given, none_is_leaf=True)
    dims: list[int | None] = optree.broadcast_prefix(in_dims, given, none_is_leaf=True)
    mapped = [(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    size = mapped[0][0].shape[mapped[0][1]]

    def part(index: int) -> list[Any]:
        pairs = zip(leaves, dims, strict=True)
        return [leaf if dim is None else leaf.select(dim, index) for leaf, dim in pairs]

    looped = [function(*optree.tree_unflatten(structure, part(i))) for i in range(size)]
    expected = optree.tree_map(lambda *parts: torch.stack(parts), *looped)
    if rtol is not None or atol is not None:
        rtol, atol = rtol or 0.0, atol or 0.0
    gaps = {}
    for (path, ours), theirs in zip(
        _leaves(batched, "result"), optree.tree_leaves(expected), strict=True
    ):
        try:
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError:
            gaps[path] = _gap(ours, theirs)
    if gaps:
        path = max(gaps, key=gaps.__getitem__)
        raise AssertionError(
            f"verify_vmap_equals_loop: {name}: {path} differs by {gaps[path]:.3g} ({len(gaps)} of "
            f"{len(optree.tree_leaves(expected))} leaves differ)."
        )
    return batched


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; infinite if shapes differ or only one side is finite."""
    if ours.shape != theirs.shape:
        return float("inf")
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    gap = (ours.to(torch.float64) - theirs.to(torch.float64)).abs().masked_fill(same, 0)
    return float(gap.nan_to_num(float("inf"), float("inf")).max())


def _given(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, by the names of the function's parameters if it has a signature."""
    given: dict[str, Any] = {}
    while isinstance(function, partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    try:
        given |= inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a builtin has no signature; a wrong call fails by itself
        given |= {"args": args, **kwargs}
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return given if owner is None else {"self": owner, **given}


def _fingerprints(things: dict[str, Any], versions: bool = False) -> dict[str, Hashable]:
    """{path: a value that changes if the thing there changes}, for all things that can be compared."""
    return {
        path: mark
        for name, thing in things.items()
        for path, leaf in _contents(thing, name)
        if (mark := _mark(leaf, versions)) is not None
    }


def _leaves(tree: Tree, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree, each under the Python expression that leads to it."""
    accessors = optree.tree_accessors(tree)
    for accessor, leaf in zip(accessors, optree.tree_leaves(tree), strict=True):
        yield accessor.codify(name), leaf


def _contents(tree: Tree, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree, and the attributes, parameters and buffers of the modules among them."""
    for path, leaf in _leaves(tree, name):
        yield path, leaf
        if isinstance(leaf, nn.Module):
            for child, module in leaf.named_modules():
                for key, value in vars(module).items():
                    yield f"{path}.{child}.{key}".replace("..", "."), value
            for entry in (leaf.named_parameters, leaf.named_buffers):
                yield from ((f"{path}.{part}", value) for part, value in entry(remove_duplicate=False))


def _mark(leaf: Any, versions: bool) -> Hashable:
    """A value that changes if the leaf changes; None if the leaf cannot be compared."""
    if isinstance(leaf, Tensor):
        version = leaf._version if versions and not leaf.is_inference() else None
        slope = leaf.grad if leaf.is_leaf else None
        readable = [t for t in (leaf, slope) if t is not None and not t.is_meta]
        bits = [digest(t) for t in readable if t.layout == torch.strided]
        return version, leaf.dtype, leaf.shape, leaf.requires_grad, slope is None, *bits
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.str, leaf.shape, leaf.tobytes()
    if isinstance(leaf, pd.DataFrame | pd.Series):
        return pd.util.hash_pandas_object(leaf).to_numpy().tobytes()
    if isinstance(leaf, bool | int | float | complex | str | bytes):
        return repr(leaf)  # nan is not equal to itself
    return None


def _world() -> dict[str, Hashable]:
    """Global random states and settings."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    kind, keys, *rest = np.random.get_state()
    return {
        "PyTorch's random state": (digest(torch.get_rng_state()), *map(digest, cuda)),
        "numpy's random state": (str(kind), np.asarray(keys).tobytes(), *map(str, rest)),
        "Python's random state": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": str(torch.get_default_device()),
        "the grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "the number of threads": torch.get_num_threads(),
        "the precision of matrix products": torch.get_float32_matmul_precision(),
        "the use of deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "the fast path of attention": torch.backends.mha.get_fastpath_enabled(),
    }


def _form(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        place = "" if leaf.device.type == "cpu" else f" on {leaf.device}"
        return f"{leaf.dtype} {tuple(leaf.shape)}{place}".removeprefix("torch.")
    return type(leaf).__name__


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names whose values differ, or that only one side has, in order."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
