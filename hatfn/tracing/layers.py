"""Find the layers whose output may be gated in the place of the weights that make it."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from hatfn.tracing.interpret import operator_name
from hatfn.tracing.tracer import place_of, shape_of
from hatfn.wiring import Layer, ParamWiring, Units, Wiring

PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d")


def find_layers(
    program: torch.export.ExportedProgram, names: dict[str, str], wiring: Wiring
) -> dict[str, Layer]:
    """The layers that do nothing but multiply by a weight and add a bias, both gated row by row.

    Only where nobody else reads these parameters, and where what the layer returns is the very product:
    a model may well read a layer's weight without calling the layer.

    Args:
        program: the exported module.
        names: the first name of every parameter.
        wiring: what the trace found.
    """
    specs = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    layers = {}
    for node in program.graph.nodes:
        if operator_name(node) not in PRODUCTS:
            continue
        path, inputs = place_of(node), [arg for arg in node.args[1:3] if isinstance(arg, Node)]
        targets = [specs.get(arg.name) or "" for arg in inputs]
        own = [f"{path}.weight", f"{path}.bias"][: len(targets)]
        alone = targets == own and all(len(arg.users) == 1 for arg in inputs)
        params = tuple(names.get(target, target) for target in targets)
        units = (
            _rows([wiring.params[name] for name in params]) if alone and params == tuple(own) else None
        )
        inside = any(f"{place_of(user)}.".startswith(f"{path}.") for user in node.users)
        if units is not None and not inside:
            weight, shape = wiring.params[params[0]], shape_of(node)
            gate = units.index.reshape(-1, *(1,) * (len(weight.shape) - 2))
            layers[path] = Layer(Units(gate, units.group), params, math.prod(shape[1:]))
    return layers


def _rows(roles: list[ParamWiring]) -> Units | None:
    """The unit of each row, if the parameters of a layer agree on it."""
    rows = [role.out for role in roles if role.gated and role.kind != "head"]
    if len(rows) < len(roles) or any(units is None or len(units.index) == 1 for units in rows):
        return None
    known = [units for units in rows if units is not None]
    first = known[0].index.flatten()
    whole = all(units.index.numel() == len(units.index) for units in known)
    return known[0] if whole and all(torch.equal(u.index.flatten(), first) for u in known) else None
