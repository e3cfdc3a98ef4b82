"""compact(): one task's subnetwork, with its dead units sliced out of the parameters.

What a module fixes in its attributes (``groups``, ``normalized_shape``) does not follow a slice, nor
does a size written into its forward, and nothing static tells where those are. So slices are tried: a
group is sliced if the module still gives what the masked one gives, else it stays whole.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import NamedTuple

import optree
import pandas as pd
import torch
from torch import Tensor

from hatfn.checks import check_input
from hatfn.forward import Network, Output
from hatfn.initial import lively
from hatfn.seeds import seeded
from hatfn.slicing import (
    Layout,
    Values,
    cleared,
    cut,
    fixed_groups,
    layout,
    numbers,
    outline,
    rows_of,
    run,
    seen_input,
)
from hatfn.state import HATState, take

_TOLERANCE = 1e-9
"""How far sliced and masked outputs may lie apart in float64, relative to the largest of them."""

_SAMPLES, _SIDE = 2, 64
"""A trial's input: one sample would not show a reshape that mixes samples and channels; large images
show nothing that small ones do not, and are tried only where the module takes no others."""

Case = tuple[Values, list[Tensor]]
"""Numbers for the module, zero where no unit is on, and the outputs to expect."""

Trial = Callable[[Sequence[str]], bool]
"""Whether the module still agrees if these groups are sliced."""


class Subnet(NamedTuple):
    """One task's subnetwork: the numbers with which the module gives the task's logits with less work.

    Where the head is the module's own and the input has no gate, the module itself takes them:
    ``torch.func.functional_call(module.eval(), {**small.params, **small.buffers}, (x,))``. Calling the
    subnetwork, ``small(x)``, always works.

    Attributes:
        params: {name: tensor}, sliced, gates folded in, the head cut to the task's classes.
        buffers: {name: tensor}, all of the module's, the task's running statistics among them, sliced.
        report: a row per group: its "units", how many are "used" by the task and "kept", and what
            "became" of it: "sliced", "whole" (the module would not follow), or "full" (all are used).
        sizes: how many numbers the parameters hold before and after, one task's head counted.
        network: the module's structure.
        seen: bool, the input features that the task reads, if the input has gates.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    report: pd.DataFrame
    sizes: tuple[int, int]
    network: Network
    seen: Tensor | None

    def __call__(self, x: Tensor) -> Output:
        """The task's output in eval mode.

        Args:
            x: (B, ...).

        Returns:
            What ``hat.forward`` gives for the task, but for rounding.

        Raises:
            TypeError, ValueError: an input of another shape.
        """
        check_input("Subnet", x, self.network.wiring)
        return run(self.network, {**self.params, **self.buffers}, x, seen=self.seen)


def compact(network: Network, state: HATState, task: int, x: Tensor | None = None) -> Subnet:
    """Slice the dead units of a learned task out of parameters and running statistics.

    Every group keeps at least one unit. Slices are tried in float64: for shapes alone first, which
    costs no arithmetic, then for values, with the task's weights and with random ones, behind which
    no dead layer hides a wrong slice.

    Args:
        network: the static half of the learner.
        state: with ``task`` learned.
        task: which.
        x: (B, ...), an input to try slices on (two of its samples); None: random numbers.

    Returns:
        The subnetwork.

    Raises:
        ValueError: the module fails on ``x``, or on random numbers where there is none.

    Example:
        >>> import hatfn, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4), head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2], optimizer=torchopt.sgd(0.1))
        >>> small = hat.compact(hat.consolidate(hat.init(seed=0), 0), task=0)
        >>> small.report
           units  used  kept  became
        0      8     5     5  sliced
        >>> small.sizes, small(torch.zeros(5, 4)).shape
        ((58, 37), torch.Size([5, 2]))
    """
    raw = numbers(network, state, task)
    this = layout(network, raw, take(state.masks, task))
    fixed = fixed_groups(network)
    groups = [g for g, alive in this.alive.items() if g not in fixed and not bool(alive.all())]
    if groups:
        with warnings.catch_warnings(), torch.no_grad(), seeded(state.learned.device, 0):
            warnings.simplefilter("ignore")  # what is tried and refused is nobody's concern
            groups = _sliceable(this, raw, x, groups)
    small = cut(cleared(this, raw), rows_of(this, groups))
    return Subnet(
        {name: small[name] for name in this.roles},
        {name: value for name, value in small.items() if name not in this.roles},
        _report(this, groups),
        (_count(raw[name] for name in this.roles), _count(small[name] for name in this.roles)),
        network._replace(initial={}, constants={name: small[name] for name in network.constants}),
        seen_input(this),
    )


def _sliceable(this: Layout, raw: Values, x: Tensor | None, groups: list[str]) -> list[str]:
    """Those of the groups that can be sliced together, found by trial."""
    seen = seen_input(this)
    x, cases = _cases(this, raw, x)
    if not cases:
        return []

    def fits(sliced: Sequence[str]) -> bool:
        values, output = cases[0]
        hollow, small = x.to("meta"), outline(values, rows_of(this, sliced))
        tried = run(this.network, small, hollow, seen=None if seen is None else seen.to("meta"))
        return [leaf.shape for leaf in _leaves(tried)] == [leaf.shape for leaf in output]

    def agrees(cases: Sequence[Case], sliced: Sequence[str]) -> bool:
        rows = rows_of(this, sliced)
        return all(
            _close(_leaves(run(this.network, cut(values, rows), x, seen=seen)), output)
            for values, output in cases
        )

    if _holds(fits, []):  # else the module cannot be run without numbers
        groups = _largest(fits, groups)
    for some in (cases[:1], cases):  # the first tells nearly everything
        groups = _largest(partial(agrees, some), groups)
    if not groups and not agrees(cases, []):
        raise RuntimeError(
            "compact: the module gives other outputs with dead weights set to zero than under gates. "
            "Expected the same: two calls of it must agree, hatfn.testing.verify_wiring must pass, and "
            "a head in a manual_wiring must be fed by the group it names. If all that holds, please "
            "report it."
        )
    return groups


def _cases(this: Layout, raw: Values, x: Tensor | None) -> tuple[Tensor, list[Case]]:
    """An input, and numbers for the module with what it gives for them under gates."""
    constants, generator = this.network.constants, torch.Generator().manual_seed(0)
    mine = {name: _double(value).nan_to_num(0, 0, 0) for name, value in raw.items()}
    drawn = lively({n: v for n, v in mine.items() if n not in constants}, generator)
    failure: Exception | None = None
    for sample in _inputs(this, generator) if x is None else [_double(x[:_SAMPLES])]:
        try:
            cases: list[Case] = []
            for values in (mine | drawn, mine):
                output = _leaves(run(this.network, values, sample, gates=this.masks))
                if any(bool(leaf.isfinite().any()) for leaf in output):  # else it can tell nothing
                    cases.append((cleared(this, values), output))
            return sample, cases
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failure = error
    given = "random numbers" if x is None else "x"
    raise ValueError(
        f"compact: slices are tried in float64, and the module fails on {given}. Expected an input "
        f"that it takes: hat.compact(state, task, x=batch). It said: {failure}"
    ) from failure


def _inputs(this: Layout, generator: torch.Generator) -> Iterator[Tensor]:
    """Random inputs, first of small images if those that were traced are large."""
    shape, device = this.network.wiring.input_shape, next(iter(this.masks.values())).device
    small = (*shape[:1], *(min(size, _SIDE) for size in shape[1:])) if len(shape) > 2 else shape
    for size in dict.fromkeys([small, shape]):
        x = torch.randn((_SAMPLES, *size), generator=generator, dtype=torch.float64)
        yield x.to(device)


def _holds(trial: Trial, groups: Sequence[str]) -> bool:
    """A trial that fails in whichever way says no."""
    try:
        return trial(groups)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


def _largest(trial: Trial, groups: list[str]) -> list[str]:
    """As many of the groups as pass together: all, else kind by kind of name, else half by half."""
    kinds: dict[str, list[str]] = {}
    for group in groups:
        kinds.setdefault(re.sub(r"\d+", "#", group), []).append(group)

    def grow(found: list[str], more: list[str]) -> list[str]:
        if _holds(trial, found + more):
            return found + more
        middle = len(more) // 2
        return grow(grow(found, more[:middle]), more[middle:]) if middle else found

    return groups if _holds(trial, groups) else reduce(grow, kinds.values(), [])


def _double(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value


def _leaves(output: Output) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _close(tried: list[Tensor], output: list[Tensor]) -> bool:
    """Whether outputs are the same but for rounding, shapes and non-finite numbers included."""

    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        largest = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0
        return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True)

    return len(tried) == len(output) and all(map(same, tried, output))


def _count(values: Iterable[Tensor]) -> int:
    return sum(value.numel() for value in values)


def _report(this: Layout, sliced: Sequence[str]) -> pd.DataFrame:
    rows = {}
    for group, alive in this.alive.items():
        units, used, left = len(alive), int(this.masks[group].sum()), int(alive.sum())
        became = "full" if left == units else "sliced" if group in sliced else "whole"
        kept = left if became == "sliced" else units
        rows[group] = {"units": units, "used": used, "kept": kept, "became": became}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["units", "used", "kept", "became"])
