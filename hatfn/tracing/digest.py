"""A digest of the function that a module computes, apart from its parameters."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from hatfn.numerics.digests import digest
from hatfn.tracing.inputs import Call
from hatfn.tracing.nodes import operator_name
from hatfn.wiring import Computed

_SILENT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
"""Operators that do nothing in eval mode. They may differ between training and serving."""


def read_computed(program: torch.export.ExportedProgram, names: dict[str, str], call: Call) -> Computed:
    """Digest the operators in their order, the operands of each, and constants.

    Names of parameters are part of the digest. Their values and the device are not.

    Args:
        program: the exported module.
        names: {name: first name} of every parameter and buffer.
        call: the call that was exported.
    """
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    known: dict[Node, str] = {}
    lines: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return known.get(value, str(value.target))
        return "device" if isinstance(value, torch.device) else repr(value)

    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            target = names.get(spec.target, spec.target)
            if spec.kind.name == "CONSTANT_TENSOR":  # not a buffer, so no state holds its values
                target = digest(program.constants[spec.target])
            known[node] = target or "x"
        elif operator_name(node) in _SILENT:
            known[node] = known[node.args[0]]
        elif node.op == "output" or node.meta.get("val") is not None:  # the others are assertions
            known[node] = f"%{len(lines)}"
            name = str(node.target) if operator_name(node) else getattr(node.target, "__name__", "")
            lines.append(f"{name} {pytree.tree_map(plain, (node.args, node.kwargs))}")
    shapes = (f"{value.dtype} {tuple(value.shape)}" for part in call.inputs for value in part)
    under = f"torch {torch.__version__}, {', '.join(shapes)}"
    return Computed(hashlib.sha256("\n".join(lines).encode()).hexdigest(), under)
