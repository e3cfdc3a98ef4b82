"""Call the module with gated parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hatfn.network.checkpointing import keeping
from hatfn.network.copies import copied, untied
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
    """Call the module under gates.

    A gate a multiplies either the output of a layer, or the weight and the bias that produce it:

        a (W x + b) = (a W) x + a b

    The call chooses the one with fewer numbers. If a norm follows that would divide the gate out, the
    gate multiplies the scale and shift of the norm instead.

    Args:
        network: the static half of the learner.
        module: the network's ``train``, ``evaluate`` or ``calibrate``.
        params: {name: tensor}, the trained parameters, including heads.
        buffers: {name: tensor}, the running statistics.
        gates: {group: (U,)}, soft or bool; None: no gates.
        x: (B, ...).
        one_weight: gate outputs even if they are larger than the weight: under ``vmap`` over gates,
            all tasks then share one weight.
        skips: for ``evaluate`` under binary gates, the result of
            :func:`~hatfn.network.skipping.skipped` for these gates.

    Returns:
        The output (B, ...), and the new running statistics.

    Raises:
        ValueError: the module fails on the input.
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
    """Call the module with the given tensors as they are, without gates.

    Args:
        network: the static half of the learner.
        module: the network's ``train``, ``evaluate``, ``calibrate`` or ``plain``.
        params: {name: tensor}, all parameters.
        buffers: {name: tensor}, the running statistics.
        x: (B, ...).
        hooked: {name in the module: tensor}, the buffers that hooks on layers read.

    Returns:
        The output (B, ...), and the new running statistics.

    Raises:
        ValueError: the module fails on the input.
    """
    names = {} if module is network.plain else network.names
    # A module may write into its arguments, as an in-place ReLU does, and into its buffers.
    x = Inputs(*(tuple(value.clone() for value in part) for part in x))
    every = {**buffers, **network.constants}
    values = {**params, **{name: buffer.clone() for name, buffer in every.items()}}
    values = {**{names.get(name, name): value for name, value in values.items()}, **hooked}
    if network.tied:
        values = untied(module, values)
    if network.recomputes and module is network.train:
        module = keeping(module, values)
    elif network.wiring.remembers:
        module = copied(module, None)
    # No cache of casts: every call has other tensors as weights.
    lower = torch.autocast(x.device.type, network.precision, network.precision is not None, False)
    with _explained(x, network.wiring), lower:
        args, kwargs = network.wiring.signature.arguments(x)
        output = functional_call(module, values, args, kwargs, tie_weights=False)
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
    """The parameters, multiplied by their gates.

    Args:
        wiring: the wiring of the module.
        params: {name: tensor}.
        look: a function from units to their gates.
        elsewhere: the paths of the layers whose output is gated instead.
        skips: the smaller parameters of skipping; they need no gate.
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
    """{path: gate} of the layers whose output is gated.

    See :func:`call` for the arguments; ``look`` is a function from units to their gates.
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
    """The buffers that hooks on layers read; an empty buffer switches its hook off."""
    none = x.batched[0].new_empty(0)
    hooked = {f"{path}.{GATE}": outputs.get(path, none) for path in network.outputs}
    if module is network.evaluate:
        every = none.to(torch.int64)
        paths = network.skippable.layers
        hooked |= {f"{path}.{end}": every for path in paths for end in (COLUMNS, BACK)}
    return hooked


def _full(output: Any) -> Any:
    """An output of autocast as float32, because losses and drift are measured in full precision."""
    small = isinstance(output, Tensor) and output.is_floating_point() and output.itemsize < 4
    return output.float() if small else output


@contextmanager
def _explained(x: Inputs, wiring: Wiring) -> Iterator[None]:
    """If the module fails, raise an error that describes its inputs."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        alone = x.samples == 1 and isinstance(error, ValueError)  # batch norms raise it in training
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
