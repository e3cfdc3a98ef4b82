"""Find the layers that do nothing but multiply by a weight of their own and add a bias."""

from __future__ import annotations

import torch
from torch.fx import Node

from hatfn.tracing.nodes import at_zero, is_pointwise, operator_name, place_of, shape_of
from hatfn.wiring import Layer

PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d")


def find_layers(program: torch.export.ExportedProgram, names: dict[str, str]) -> dict[str, Layer]:
    """The layers whose output is the very product, and whose parameters nobody else reads.

    A model may well read a layer's weight without calling the layer; what such a layer returns is
    never seen.

    Args:
        program: the exported module.
        names: the first name of every parameter.
    """
    specs = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    layers, nodes = {}, {}
    for node in program.graph.nodes:
        if operator_name(node) not in PRODUCTS:
            continue
        path, inputs = place_of(node), [arg for arg in node.args[1:3] if isinstance(arg, Node)]
        targets = tuple(specs.get(arg.name) or "" for arg in inputs)
        own = (f"{path}.weight", f"{path}.bias")[: len(targets)]
        alone = all(len(arg.users) == 1 for arg in inputs)
        inside = any(f"{place_of(user)}.".startswith(f"{path}.") for user in node.users)
        if targets == own == tuple(names.get(name) for name in own) and alone and not inside:
            layers[path], nodes[node] = Layer(own, shape_of(node)[1:].numel()), path
    read = {path: _readers(node, nodes) for node, path in nodes.items()}
    return {path: layer._replace(readers=read[path]) for path, layer in layers.items()}


def _readers(node: Node, layers: dict[Node, str]) -> tuple[str, ...]:
    """The layers that alone read a value, behind elementwise functions of it alone that keep zero."""
    found, values = set[str](), [node]
    for value in values:
        for user in value.users:
            if user in layers and user.args[0] is value:
                found.add(layers[user])
            elif len(user.all_input_nodes) == 1 and _keeps_zero(user):
                values.append(user)
            else:
                return ()
    return tuple(sorted(found))


def _keeps_zero(node: Node) -> bool:
    """Whether a function of one value takes every number by itself, and zero to zero."""
    if operator_name(node) == "dropout":
        return node.args[2] is False
    return is_pointwise(node) and at_zero(node)
