"""compact(): one task's subnetwork, with its dead units sliced out of the parameters.

What a module fixes in its attributes (``groups``, ``normalized_shape``) does not follow a slice, nor
does a size written into its forward, and nothing static tells where those are. So slices are tried: a
group is sliced if the module still gives what the masked one gives, else it stays whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from hatfn.checks.batches import check_input
from hatfn.network.network import Network, Output
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.seeds import seeded
from hatfn.numerics.trees import take
from hatfn.state import HATState
from hatfn.subnet.slicing import (
    Layout,
    cleared,
    cut,
    fixed_groups,
    layout,
    numbers,
    rows_of,
    run,
    seen_input,
)
from hatfn.subnet.trials import _sliceable


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

    def __repr__(self) -> str:
        """One line: the numbers before and after, and what became of the groups."""
        became = ", ".join(f"{n} {how}" for how, n in self.report["became"].value_counts().items())
        return f"Subnet({self.sizes[1]} of {self.sizes[0]} numbers; groups: {became or 'none'})"

    def __call__(self, x: Any) -> Output:
        """The task's output in eval mode.

        Args:
            x: (B, ...).

        Returns:
            What ``hat.forward`` gives for the task, but for rounding.

        Raises:
            TypeError, ValueError: an input of another shape.
        """
        inputs = check_input("Subnet", x, self.network.wiring)
        return run(self.network, {**self.params, **self.buffers}, inputs, seen=self.seen)


def compact(network: Network, state: HATState, task: int, x: Inputs | None = None) -> Subnet:
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
    small, roles = cut(cleared(this, raw), rows_of(this, groups)), network.wiring.params
    return Subnet(
        {name: small[name] for name in roles},
        {name: value for name, value in small.items() if name not in roles},
        _report(this, groups),
        (_count(raw[name] for name in roles), _count(small[name] for name in roles)),
        network._replace(initial={}, constants={name: small[name] for name in network.constants}),
        seen_input(this),
    )


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
