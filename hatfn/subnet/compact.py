"""compact(): one task's subnetwork, with its dead units sliced out of the parameters.

A size in a module's attributes (``groups``, ``normalized_shape``) or in its forward does not follow a
slice, and the code cannot see where such sizes are. So slices are tried: a group is sliced if the
module then has the same output as the masked module; else the group stays whole.
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
    input_mask,
    layout,
    numbers,
    rows_of,
    run,
)
from hatfn.subnet.trials import sliceable


class Subnet(NamedTuple):
    """One task's subnetwork: smaller tensors, with which the module computes the task's logits faster.

    If the head is the module's own and the input has no gate, the module itself accepts the tensors:
    ``torch.func.functional_call(module.eval(), {**small.params, **small.buffers}, (x,))``. Calling the
    subnetwork, ``small(x)``, always works.

    Attributes:
        params: {name: tensor}, sliced, with gates folded in; the head is cut to the task's classes.
        buffers: {name: tensor}, all buffers of the module, sliced; the running statistics are those of
            the task.
        report: a row per group: its number of "units", how many of them are "used" by the task and
            "kept", and what "became" of the group: "sliced", "whole" (the module does not work with a
            slice), or "full" (all units are used).
        sizes: how many numbers the parameters have before and after, with the head of one task only.
        network: the module's structure.
        seen: bool, the input features that the task reads; None if the input has no gates.
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
            The output of ``hat.forward`` for the task, up to rounding.

        Raises:
            TypeError, ValueError: an input of another shape.
        """
        inputs = check_input("Subnet", x, self.network.wiring)
        return run(self.network, {**self.params, **self.buffers}, inputs, mask=self.seen)


def compact(network: Network, state: HATState, task: int, x: Inputs | None = None) -> Subnet:
    """Slice the dead units of a learned task out of parameters and running statistics.

    Every group keeps at least one unit. Slices are tried in float64. First the trial compares shapes
    alone, which needs no arithmetic. Then it compares values, with the task's weights and with random
    weights; with the task's weights alone, a dead layer could hide a wrong slice.

    Args:
        network: the static half of the learner.
        state: a state in which ``task`` is learned.
        task: the task.
        x: (B, ...), an input for the trials, which use two of its samples; None: random numbers.

    Returns:
        The subnetwork.

    Raises:
        ValueError: the module fails on ``x``, or on random numbers if ``x`` is None.

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
            warnings.simplefilter("ignore")  # a trial may fail, so its warnings do not matter
            groups = sliceable(this, raw, x, groups)
    small, roles = cut(cleared(this, raw), rows_of(this, groups)), network.wiring.params
    return Subnet(
        {name: small[name] for name in roles},
        {name: value for name, value in small.items() if name not in roles},
        _report(this, groups),
        (_count(raw[name] for name in roles), _count(small[name] for name in roles)),
        network._replace(initial={}, constants={name: small[name] for name in network.constants}),
        input_mask(this),
    )


def _count(values: Iterable[Tensor]) -> int:
    return sum(value.numel() for value in values)


def _report(this: Layout, sliced: Sequence[str]) -> pd.DataFrame:
    rows = {}
    for group, alive in this.alive.items():
        units, used, needed = len(alive), int(this.masks[group].sum()), int(alive.sum())
        became = "full" if needed == units else "sliced" if group in sliced else "whole"
        kept = needed if became == "sliced" else units
        rows[group] = {"units": units, "used": used, "kept": kept, "became": became}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["units", "used", "kept", "became"])
