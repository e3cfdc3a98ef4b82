"""Find the layers that multiply by their weight, add their bias and do nothing else."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from hatfn.tracing.nodes import at_zero, is_pointwise, operator_name, place_of, shape_of
from hatfn.wiring import Layer

PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d")


def find_layers(
    program: torch.export.ExportedProgram, names: dict[str, str], several: Collection[str] = ()
) -> dict[str, Layer]:
    """The layers that only multiply and add, and whose parameters nothing else reads.

    Some models read the weight of a layer without calling the layer. Such a layer is left out, because
    no hook sees its output.

    Args:
        program: the exported module.
        names: {name: first name} of every parameter.
        several: the paths of modules that return more than their product, so that no hook can gate it.

    Returns:
        {path: layer}.
    """
    specs = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    layers, nodes = {}, {}
    for node in program.graph.nodes:
        if operator_name(node) not in PRODUCTS:
            continue
        path, inputs = place_of(node), [arg for arg in node.args[1:3] if isinstance(arg, Node)]
        targets = tuple(specs.get(arg.name) or "" for arg in inputs)
        params = (f"{path}.weight", f"{path}.bias")[: len(targets)]
        alone = all(len(arg.users) == 1 for arg in inputs)
        inside = any(f"{place_of(user)}.".startswith(f"{path}.") for user in node.users)
        if path in several:
            continue
        if targets == params == tuple(names.get(name) for name in params) and alone and not inside:
            layers[path], nodes[node] = Layer(params, shape_of(node)[1:].numel()), path
    read = {path: _readers(node, nodes) for node, path in nodes.items()}
    return {path: layer._replace(readers=read[path]) for path, layer in layers.items()}


def _readers(node: Node, layers: dict[Node, str]) -> tuple[str, ...]:
    """The paths of the layers that read a value; empty if anything else reads it.

    Elementwise functions of the value alone that map 0 to 0 may stand in between.
    """
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
    """Whether a function of one value is elementwise and maps 0 to 0."""
    if operator_name(node) == "dropout":
        return node.args[2] is False
    return is_pointwise(node) and at_zero(node)
