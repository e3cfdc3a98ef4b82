"""Calling the module with gated parameters: the only ``functional_call`` of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hatfn.checks.calls import _shape
from hatfn.network.checkpointing import keeping
from hatfn.network.copies import copied
from hatfn.network.hooks import BACK, COLUMNS, GATE
from hatfn.network.network import Network, Output
from hatfn.network.skipping import NOTHING, Skips
from hatfn.wiring import Units, Wiring


@contextmanager
def explained(x: Tensor, wiring: Wiring) -> Iterator[None]:
    """Say what the module was given when it fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        alone = len(x) == 1 and isinstance(error, ValueError)  # which batch norms say
        raise ValueError(
            f"the module failed on x of shape {tuple(x.shape)} and {x.dtype}. Expected "
            f"{_shape(wiring)}, as it was traced{', and of more than one sample' * alone}. It said: "
            f"{error}"
        ) from error


def call(
    network: Network,
    module: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    gates: Mapping[str, Tensor] | None,
    x: Tensor,
    one_weight: bool = False,
    skips: Skips = NOTHING,
) -> tuple[Output, dict[str, Tensor]]:
    """The module's output under gates, and the running statistics that it leaves.

    A unit is gated by multiplying what a layer returns, or the weights and the bias that produce it,
    or the affine of the norm behind them: a (W x + b) = (a W) x + a b. Of the first two, whichever
    has fewer numbers.

    Args:
        network: the static half.
        module: its structure in the mode that is wanted: one of the network's three.
        params: {name: tensor}, all of the module's parameters and the heads' that were added.
        buffers: {name: tensor}, the running statistics.
        gates: {group: (U,)}, soft or bool; None: no gates.
        x: (B, ...).
        one_weight: gate what layers return however large: under ``vmap`` many gates share one weight.
        skips: for the network's ``evaluate`` under the same gates: what
            :func:`~hatfn.network.skipping.skipped` gives for this task.

    Returns:
        output (B, ...), and the new running statistics.
    """
    wiring, handed = network.wiring, skips.values
    values, outputs = dict(params), dict[str, Tensor]()
    if gates is not None:
        look = wiring.lookup(gates)
        outputs = _gated_outputs(network, params, look, x, one_weight, skips)
        ungated = {*outputs, *skips.bare}
        done = {*handed, *(name for path in ungated for name in wiring.layers[path].params)}
        for name, role in wiring.params.items():
            out = role.out if role.gated and name not in done else None
            for units in (out, role.into if role.folded else None):
                if units is not None:
                    values[name] = values[name] * look(units).to(values[name].dtype)
        if wiring.input is not None:
            x = x * look(wiring.input).to(x.dtype)
    head = (
        {name: values.pop(name) for name in network.heads} if network.added and network.classes else {}
    )
    # A module may write into the very tensors it is given: running statistics, an in-place ReLU.
    x, given = x.clone(), {**buffers, **network.constants}
    values |= {name: buffer.clone() for name, buffer in given.items()}
    none = x.new_empty(0)
    values |= {f"{path}.{GATE}": outputs.get(path, none) for path in network.outputs}
    if module is network.evaluate:
        every = x.new_empty(0, dtype=torch.int64)
        values |= {f"{path}.{end}": every for path in network.skippable for end in (COLUMNS, BACK)}
    values |= handed
    if network.recomputes and module is network.train:
        module = keeping(module, values)
    elif wiring.remembers:
        module = copied(module, None)
    # Casts are not kept from one call to the next: the weights are other tensors every time.
    lower = torch.autocast(x.device.type, network.precision, network.precision is not None, False)
    with explained(x, wiring), lower:
        output = functional_call(module, values, (x,), strict=True, tie_weights=network.tied)
    if head:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the module returns a {type(output).__name__}, behind which no classifier can be put. "
                f"Name those it has: trace(module, x, head=(...)), or build with classes=None."
            )
        with lower:
            output = nn.functional.linear(output, head["head.weight"], head["head.bias"])
    if network.precision is not None:
        output = optree.tree_map(_full, output)
    return output, {name: values[name] for name in buffers}


def _gated_outputs(
    network: Network,
    params: Mapping[str, Tensor],
    look: Callable[[Units], Tensor],
    x: Tensor,
    one_weight: bool,
    skips: Skips,
) -> dict[str, Tensor]:
    """{path: gate} of the layers that are gated by what they return.

    Arguments as in :func:`call`; ``look`` goes from units to their gates.
    """
    chosen = {}
    for path, rows in network.outputs.items():
        layer = network.wiring.layers[path]
        fewer = len(x) * layer.size <= sum(params[name].numel() for name in layer.params)
        narrow = path in skips.bare or f"{path}.{BACK}" in skips.values
        if not narrow and (fewer or one_weight or layer.params[0] in skips.values):
            chosen[path] = look(rows)
    return chosen


def _full(output: Any) -> Any:
    """What autocast made small as a float32: losses and drift are measured in full."""
    small = isinstance(output, Tensor) and output.is_floating_point() and output.itemsize < 4
    return output.float() if small else output
