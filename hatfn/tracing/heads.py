"""Find the classifier of a module: by name, from timm's method, or as the last layer of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.fx import Node
from torch.utils import _pytree as pytree

from hatfn.checks.values import check_list
from hatfn.method.loss import logits_of
from hatfn.network.copies import copied, first_names
from hatfn.network.hooks import hook_outputs
from hatfn.numerics.trees import output_leaves
from hatfn.tracing.inputs import Call
from hatfn.tracing.layers import PRODUCTS
from hatfn.tracing.nodes import operator_name, place_of
from hatfn.wiring import Head

_PASSES = {
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "to",
    "_to_copy", "detach", "type_as", "permute", "transpose", "select", "slice", "index", "index_select",
    "gather", "narrow", "expand", "dropout",
}  # fmt: skip
"""Operators after a classifier that only move, select or convert its logits."""

_POOLS = ("adaptive_avg_pool", "_adaptive_avg_pool", "avg_pool", "mean", "upsample")
"""The first parts of the names of operators that average logits over positions, or resize them."""

_CLOSES = {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "log_sigmoid"}
"""Operators that turn logits into probabilities."""


def named_heads(module: nn.Module, head: str | Sequence[str] | bool | None) -> list[Head]:
    """The weight and bias of each layer of the classifier, by the layers' names.

    Args:
        module: any module.
        head: the name or names of the layers; False: there are none; None: those that timm's
            ``get_classifier`` returns, if the module has this method.

    Raises:
        TypeError: ``head`` is neither a name nor a list of names.
        ValueError: the module has no layer of this name, or the layer is not linear or a convolution.
    """
    modules = dict(module.named_modules())
    if not (head is None or head is False or isinstance(head, str)):
        check_list("trace", "head", head, 'names of layers: "fc", or ("head", "head_dist")')
    if head is None:
        layers = _classifiers(module)
    else:
        layers = [head] if isinstance(head, str) else list(head or ())  # type: ignore[arg-type]
    for name in layers:
        if not _is_head(modules.get(name)):
            known = [other for other, child in modules.items() if _is_head(child)]
            raise ValueError(
                f"trace: head={name!r} names no linear or (ungrouped) convolution layer of "
                f"{type(module).__name__}. Expected one of its own, such as {known[-1:]}."
            )
    first = first_names(module)
    return [_head(first, name) for name in layers]


def _head(first: Mapping[str, str], layer: str) -> Head:
    return Head(first[f"{layer}.weight".lstrip(".")], first.get(f"{layer}.bias".lstrip(".")))


def _classifiers(module: nn.Module) -> list[str]:
    """The names of the layers that timm's ``get_classifier`` returns, also inside containers.

    Layers with a name that ends in "head" and with as many classes are added, because
    ``get_classifier`` of VOLO does not return the second classifier.
    """
    if not hasattr(module, "get_classifier"):
        return []
    found = module.get_classifier()  # type: ignore[operator]
    several = isinstance(found, tuple | list | nn.ModuleList)
    wanted = [child for child in (found if several else [found]) if isinstance(child, nn.Module)]
    classes = getattr(module, "num_classes", None)
    inside = {id(layer) for child in wanted for layer in child.modules()}
    return [
        name
        for name, layer in module.named_modules()
        if _is_head(layer)
        and (
            any(layer is child for child in wanted)
            or (len(layer.weight) == classes and (id(layer) in inside or name.endswith("head")))
        )
    ]


def _is_head(module: nn.Module | None) -> bool:
    """Whether a module is a layer that can be a head: the rows of its weight can be classes."""
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return "weight" in module._parameters and getattr(module, "groups", 1) == 1


def last_heads(program: torch.export.ExportedProgram, module: nn.Module) -> list[Head]:
    """The last linear layers or 1x1 convolutions of a module, if it returns their outputs.

    There are none if one of them shares its weight with another layer, or if the module has no other
    parameters.

    Args:
        program: the exported module.
        module: the module.

    Raises:
        ValueError: after the last layer, the module turns logits into probabilities.
    """
    modules, first = dict(module.named_modules()), first_names(module)
    found = []
    for node in _outputs(program):
        path, closed = _behind(node)
        layer = modules.get(path or "")
        if path is None or not _is_head(layer) or max(layer.weight.shape[2:], default=1) > 1:  # type: ignore[union-attr]
            return []
        if closed is not None:
            raise ValueError(
                f"trace: the module ends in the layer {path!r} and {closed}. Expected logits for the "
                f"default loss: leave {closed} out. Or write head={path!r} if the layer is the "
                f"classifier, head=False if its outputs are features."
            )
        found.append(_head(first, path))
    heads = [*dict.fromkeys(found)]
    params = {name for head in heads for name in head if name is not None}
    tied = any(target in params and name not in params for name, target in first.items())
    return [] if tied or params == {*first.values()} else heads


def _outputs(program: torch.export.ExportedProgram) -> list[Node]:
    """The nodes whose values the module returns; if the output has ``logits``, those of the logits."""
    specs = program.graph_signature.output_specs
    names = [getattr(spec.arg, "name", None) for spec in specs if spec.kind.name == "USER_OUTPUT"]
    output = pytree.tree_unflatten(names, program.call_spec.out_spec)
    wanted = {name for name in pytree.tree_leaves(logits_of(output)) if name is not None}
    return [node for node in program.graph.nodes if node.name in wanted]


def _behind(node: Node) -> tuple[str | None, str | None]:
    """The path of the layer whose logits a value holds, and the operator that made probabilities."""
    pooled, closed = False, None
    while True:
        name = operator_name(node)
        if name in PRODUCTS:
            return place_of(node), closed
        pools = name.startswith(_POOLS)
        pooled |= pools
        closed = name if name in _CLOSES else closed
        known = pools or name in _PASSES or name in _CLOSES or (name == "relu" and pooled)
        if not known or not isinstance(node.args[0], Node):
            return None, None
        node = node.args[0]


def class_dims(module: nn.Module, call: Call, heads: Sequence[Head]) -> tuple[int | None, ...]:
    """For each tensor that a module returns in eval mode, the dimension that counts classes.

    The module is called once more with a wider head, and this dimension grows. None for a tensor in
    which no dimension grows; an empty tuple if the module fails with a wider head.
    """
    wider = copied(module, training=False)
    hook_outputs(wider)
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {name for head in heads for name in head if name is not None}
    grown = {name: torch.cat([values[name], values[name][:1]]) for name in weights}
    shapes = []
    for more in ({}, grown):
        tensors = {name: value.clone() for name, value in {**values, **more}.items()}
        try:
            with torch.no_grad():
                output = functional_call(wider, tensors, call.args, call.kwargs)
        except Exception:  # a module may fail in any way on a head of another width
            return ()
        shapes.append([leaf.shape for leaf in output_leaves(output)])
    return tuple(
        next((dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        for one, other in zip(*shapes, strict=True)
    )
