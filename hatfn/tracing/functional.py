"""Graphs without writes: labels have no notion of a value that is overwritten."""

from __future__ import annotations

import torch
from torch.fx import Node

from hatfn.tracing import contraction, elementwise, norms
from hatfn.tracing.interpret import is_simple, operator_name


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with operators that have rules and change none of their operands.

    A write over a value that nothing else reads (``x += shortcut``) is put as the operator that does
    not write. If more is to be done, PyTorch decomposes the whole, which takes longer than the export.
    """
    for node in program.graph.nodes:
        plain = _plain(node)
        if plain is not None:
            node.target = plain
    return program if all(map(is_simple, program.graph.nodes)) else program.run_decompositions({})


def _plain(node: Node) -> torch._ops.OpOverload | None:
    """``aten.add`` for an ``aten.add_`` whose operand is its alone."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    written = node.args[0] if node.args else None
    alone = isinstance(written, Node) and len(written.users) == 1 and _is_new(written)
    packet = getattr(torch.ops.aten, operator_name(node).rstrip("_"), None)
    overload = getattr(packet, target._overloadname, None)
    return overload if alone and isinstance(overload, torch._ops.OpOverload) else None


def _is_new(node: Node) -> bool:
    """Whether a value has memory of its own, and is no view of another."""
    known = operator_name(node) in contraction.RULES.keys() | norms.RULES.keys()
    return is_simple(node) and (known or elementwise.is_pointwise(node)) and node.op == "call_function"
