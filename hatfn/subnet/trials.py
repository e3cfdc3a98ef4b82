"""Find by trial which groups of units can be sliced out of a module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from hatfn.network.probe import lively
from hatfn.numerics.arguments import Inputs, Leaf
from hatfn.numerics.trees import output_leaves
from hatfn.subnet.slicing import (
    Layout,
    Values,
    cleared,
    cut,
    input_mask,
    outline,
    rows_of,
    run,
)

_TOLERANCE = 1e-9
"""How far sliced and masked outputs may differ in float64, relative to the largest of them."""

_SAMPLES, _SIDE = 2, 64
"""The number of samples and the largest side of images in a trial.

One sample would not show a reshape that mixes samples and channels. Larger images would show nothing
more, and are tried only if the module does not accept small ones.
"""

Case = tuple[Values, list[Tensor]]
"""Parameters and buffers of the module, 0 for units that are off, and the outputs to expect."""

Trial = Callable[[Sequence[str]], bool]
"""Whether the module still agrees if these groups are sliced."""


def sliceable(this: Layout, raw: Values, x: Inputs | None, groups: list[str]) -> list[str]:
    """The groups that can be sliced together, found by trial."""
    mask = input_mask(this)
    x, cases = _cases(this, raw, x)
    if not cases:
        return []

    def fits(sliced: Sequence[str]) -> bool:
        values, output = cases[0]
        shapes = outline(values, rows_of(this, sliced))
        meta_mask = None if mask is None else mask.to("meta")
        hollow = Inputs(*(tuple(value.to("meta") for value in part) for part in x))
        tried = run(this.network, shapes, hollow, mask=meta_mask)
        return [leaf.shape for leaf in output_leaves(tried)] == [leaf.shape for leaf in output]

    def agrees(cases: Sequence[Case], sliced: Sequence[str]) -> bool:
        rows = rows_of(this, sliced)
        return all(
            _close(output_leaves(run(this.network, cut(values, rows), x, mask=mask)), output)
            for values, output in cases
        )

    if _passes(fits, []):  # else the module does not run on the meta device
        groups = _largest(fits, groups)
    for subset in (cases[:1], cases):  # the first case alone refuses nearly every wrong slice
        groups = _largest(partial(agrees, subset), groups)
    if not groups and not agrees(cases, []):
        raise RuntimeError(
            "compact: the module gives other outputs with dead weights set to zero than under gates. "
            "Expected the same outputs: two calls of it must agree, hatfn.testing.verify_wiring must "
            "pass, and the head of a manual_wiring must read the group that it names. If all this is "
            "true, please report a bug."
        )
    return groups


def _cases(this: Layout, raw: Values, x: Inputs | None) -> tuple[Inputs, list[Case]]:
    """An input, and the cases of a trial: the outputs are those that the module gives under gates."""
    constants, generator = this.network.constants, torch.Generator().manual_seed(0)
    mine = {name: _double(value).nan_to_num(0, 0, 0) for name, value in raw.items()}
    drawn = lively({n: v for n, v in mine.items() if n not in constants}, generator)
    failure: Exception | None = None
    for sample in _inputs(this, generator) if x is None else [_few(x)]:
        try:
            cases: list[Case] = []
            for values in (mine | drawn, mine):
                output = output_leaves(run(this.network, values, sample, gates=this.masks))
                if any(bool(leaf.isfinite().any()) for leaf in output):  # else it shows nothing
                    cases.append((cleared(this, values), output))
            return sample, cases
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failure = error
    given = "random numbers" if x is None else "x"
    raise ValueError(
        f"compact: slices are tried in float64, and the module fails on {given}. Expected an input "
        f"that it accepts: hat.compact(state, task, x=batch). Its error: {failure}"
    ) from failure


def _few(x: Inputs) -> Inputs:
    """A few samples in float64; all if they share an input, which may count them, as edges do."""
    count = x.samples if x.fixed else _SAMPLES
    return Inputs(tuple(_double(v[:count]) for v in x.batched), tuple(map(_double, x.fixed)))


def _inputs(this: Layout, generator: torch.Generator) -> Iterator[Inputs]:
    """Random inputs, first of small images if those that were traced are large."""
    signature, device = this.network.wiring.signature, next(iter(this.masks.values())).device
    odd = [leaf.path for leaf in signature.leaves if not leaf.dtype.is_floating_point]
    if odd:
        raise ValueError(
            f"compact: slices are tried on random numbers, and {odd[0]} takes integers. Expected an "
            f"input that the module takes: hat.compact(state, task, x=batch)."
        )

    def small(leaf: Leaf) -> tuple[int, ...]:
        images = len(leaf.shape) > 2
        return (*leaf.shape[:1], *(min(n, _SIDE) for n in leaf.shape[1:])) if images else leaf.shape

    def drawn(leaf: Leaf, shape: tuple[int, ...]) -> Tensor:
        shape = (_SAMPLES, *shape) if leaf.batched else shape
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    sizes = [
        tuple(small(leaf) for leaf in signature.leaves),
        tuple(leaf.shape for leaf in signature.leaves),
    ]
    for shapes in dict.fromkeys(sizes):
        pairs = zip(signature.leaves, shapes, strict=True)
        yield signature.inputs({leaf.path: drawn(leaf, shape) for leaf, shape in pairs})


def _passes(trial: Trial, groups: Sequence[str]) -> bool:
    """Whether a trial passes; any error counts as no."""
    try:
        return trial(groups)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


def _largest(trial: Trial, groups: list[str]) -> list[str]:
    """As many of the groups as pass a trial together.

    It tries all groups first. If that fails, it adds groups whose names differ only in numbers: all of
    them if that passes, else half by half.
    """
    kinds: dict[str, list[str]] = {}
    for group in groups:
        kinds.setdefault(re.sub(r"\d+", "#", group), []).append(group)

    def grow(found: list[str], more: list[str]) -> list[str]:
        if _passes(trial, found + more):
            return found + more
        middle = len(more) // 2
        return grow(grow(found, more[:middle]), more[middle:]) if middle else found

    return groups if _passes(trial, groups) else reduce(grow, kinds.values(), [])


def _double(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value


def _close(tried: list[Tensor], output: list[Tensor]) -> bool:
    """Whether outputs are the same up to rounding, with the same shapes and non-finite numbers."""

    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        largest = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0
        return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True)

    return len(tried) == len(output) and all(map(same, tried, output))
