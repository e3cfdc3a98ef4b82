"""Calling the module with gated parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hatfn.network.checkpointing import keeping
from hatfn.network.copies import copied
from hatfn.network.hooks import BACK, COLUMNS, GATE
from hatfn.network.network import Network, Output
from hatfn.network.skipping import NOTHING, Skips
from hatfn.numerics.arguments import ALONE, Inputs
from hatfn.numerics.trees import map_output
from hatfn.wiring import Units, Wiring


def call(
    network: Network,
    module: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    gates: Mapping[str, Tensor] | None,
    x: Inputs,
    one_weight: bool = False,
    skips: Skips = NOTHING,
) -> tuple[Output, dict[str, Tensor]]:
    """The module's output under gates, and the running statistics that it leaves.

    A unit is gated by multiplying what a layer returns, or the weights and the bias that produce it,
    or the affine of the norm behind them: a (W x + b) = (a W) x + a b. Of the first two, the one with
    fewer numbers.

    Args:
        network: the static half.
        module: its structure in the mode that is wanted: ``train``, ``evaluate`` or ``calibrate``.
        params: {name: tensor}, the trained parameters, those of the heads included.
        buffers: {name: tensor}, the running statistics.
        gates: {group: (U,)}, soft or bool; None: no gates.
        x: (B, ...).
        one_weight: gate what layers return however large: under ``vmap`` many gates share one weight.
        skips: for the network's ``evaluate`` under the same gates: what
            :func:`~hatfn.network.skipping.skipped` gives for this task.

    Returns:
        output (B, ...), and the new running statistics.
    """
    outputs: dict[str, Tensor] = {}
    params = {**network.untrained, **params}
    if gates is not None:
        look = network.wiring.lookup(gates)
        outputs = _gated_outputs(network, params, look, x, one_weight, skips)
        params = _gated_params(network.wiring, params, look, {*outputs, *skips.bare}, skips)
        if network.wiring.input is not None:
            gate = look(network.wiring.input)
            x = x.map(lambda value: value * gate.to(value.dtype))
    hooked = _hooked(network, module, outputs, x) | skips.hooks
    return run(network, module, {**params, **skips.params}, buffers, x, hooked)


def run(
    network: Network,
    module: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Inputs,
    hooked: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Output, dict[str, Tensor]]:
    """The module's output with these very numbers, and the running statistics that it leaves.

    Args:
        network: the static half.
        module: one of its four.
        params: {name: tensor}, all parameters.
        buffers: {name: tensor}, the running statistics.
        x: (B, ...).
        hooked: {name in the module: tensor}, the buffers of hooks on layers.
    """
    names = {} if module is network.plain else network.names
    # A module may write into the very tensors it is given: running statistics, an in-place ReLU.
    x = Inputs(*(tuple(value.clone() for value in part) for part in x))
    given = {**buffers, **network.constants}
    values = {**params, **{name: buffer.clone() for name, buffer in given.items()}}
    values = {**{names.get(name, name): value for name, value in values.items()}, **hooked}
    if network.recomputes and module is network.train:
        module = keeping(module, values)
    elif network.wiring.remembers:
        module = copied(module, None)
    # Casts are not kept from one call to the next: the weights are other tensors every time.
    lower = torch.autocast(x.device.type, network.precision, network.precision is not None, False)
    with _explained(x, network.wiring), lower:
        args, kwargs = network.wiring.signature.arguments(x)
        output = functional_call(module, values, args, kwargs, strict=True, tie_weights=network.tied)
    if network.precision is not None:
        output = map_output(_full, output)
    return output, {name: values[names.get(name, name)] for name in buffers}


def _gated_params(
    wiring: Wiring,
    params: Mapping[str, Tensor],
    look: Callable[[Units], Tensor],
    elsewhere: set[str],
    skips: Skips,
) -> dict[str, Tensor]:
    """The parameters times their gates.

    Args:
        wiring: of the module.
        params: {name: tensor}.
        look: from units to their gates.
        elsewhere: paths of the layers whose output is gated instead.
        skips: whose parameters need no gate.
    """
    done = {*skips.params, *(name for path in elsewhere for name in wiring.layers[path].params)}
    values = dict(params)
    for name, role in wiring.params.items():
        out = role.out_units if role.gated and name not in done else None
        for units in (out, role.in_units if role.folded else None):
            if units is not None:
                values[name] = values[name] * look(units).to(values[name].dtype)
        if role.off and role.in_units is not None:
            values[name] = torch.where(look(role.in_units) == 0, role.off, values[name])
    return values


def _gated_outputs(
    network: Network,
    params: Mapping[str, Tensor],
    look: Callable[[Units], Tensor],
    x: Inputs,
    one_weight: bool,
    skips: Skips,
) -> dict[str, Tensor]:
    """{path: gate} of the layers that are gated by what they return.

    Arguments as in :func:`call`; ``look`` goes from units to their gates.
    """
    chosen = {}
    for path, rows in network.outputs.items():
        layer = network.wiring.layers[path]
        fewer = x.samples * layer.size <= sum(params[name].numel() for name in layer.params)
        narrow = path in skips.bare or f"{path}.{BACK}" in skips.hooks
        if not narrow and (fewer or one_weight or layer.params[0] in skips.params):
            chosen[path] = look(rows)
    return chosen


def _hooked(
    network: Network, module: nn.Module, outputs: Mapping[str, Tensor], x: Inputs
) -> dict[str, Tensor]:
    """The buffers of the hooks on layers; an empty one switches its hook off."""
    none = x.batched[0].new_empty(0)
    hooked = {f"{path}.{GATE}": outputs.get(path, none) for path in network.outputs}
    if module is network.evaluate:
        every = none.to(torch.int64)
        paths = network.skippable.layers
        hooked |= {f"{path}.{end}": every for path in paths for end in (COLUMNS, BACK)}
    return hooked


def _full(output: Any) -> Any:
    """What autocast made small as a float32: losses and drift are measured in full."""
    small = isinstance(output, Tensor) and output.is_floating_point() and output.itemsize < 4
    return output.float() if small else output


@contextmanager
def _explained(x: Inputs, wiring: Wiring) -> Iterator[None]:
    """Say what the module was given when it fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        alone = x.samples == 1 and isinstance(error, ValueError)  # which batch norms say
        wide = any(value.dtype == torch.float64 for value in x.batched) and "dtype" in str(error)
        leaves = wiring.signature.leaves
        batched, fixed = iter(x.batched), iter(x.fixed)
        given = ", ".join(
            f"{leaf.path} of shape {tuple(value.shape)} and {value.dtype}"
            for leaf in leaves
            for value in [next(batched if leaf.batched else fixed)]
        )
        traced = ", ".join(
            f"{leaf.path} " * (leaf.path != ALONE)
            + f"({', '.join(map(str, ('B', *leaf.shape) if leaf.batched else leaf.shape))})"
            for leaf in leaves
        )
        raise ValueError(
            f"the module failed on {given}. Expected {traced}, as it was traced"
            f"{', and of more than one sample' * alone}.{' Write x.float().' * wide} It said: {error}"
        ) from error
