"""Export a module to a graph of operators that do not change their operands."""

from __future__ import annotations

import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from hatfn.network.copies import copied
from hatfn.network.hooks import hook_outputs
from hatfn.tracing.inputs import Call
from hatfn.tracing.interpret import is_simple
from hatfn.tracing.nodes import is_pointwise, operator_name
from hatfn.tracing.rules import contraction, norms


class TraceError(RuntimeError):
    """The module cannot be exported, or ``strict=True`` met an operator without a rule."""


def _export(module: nn.Module, call: Call) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            # Export warns about programs that cannot be saved; this one is only read.
            warnings.simplefilter("ignore")
            private = copied(module, training=False)
            for child in private.modules():
                if getattr(child, "inplace", False) is True:
                    vars(child)["inplace"] = False  # same result, but no operand is overwritten
            hook_outputs(private)
            program = functional(torch.export.export(private, call.args, call.kwargs, strict=False))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if cast := how_to_cast(module, call):
            raise TraceError(f"trace: {cast} PyTorch said: {reason}") from error
        raise TraceError(
            f"trace: torch.export cannot read {type(module).__name__} at {call}. "
            f"It stops at {_line_of(error)} {reason} Two ways out: change that line so that it reads "
            f"no numbers out of a tensor (torch.where for an if, a constant for an .item()), or "
            f"write the wiring by hand with hatfn.manual_wiring."
        ) from error
    written = [s.target for s in program.graph_signature.output_specs if "PARAMETER" in s.kind.name]
    if written:
        raise TraceError(
            f"trace: {type(module).__name__} changes its parameter {written[0]} in every forward pass. "
            f"Expected a module that only reads its parameters, such as an embedding without max_norm."
        )
    return program


def how_to_cast(module: nn.Module, call: Call) -> str:
    """How to mend a call whose input has another type than the weights; else an empty string."""
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    batched = zip(call.signature.batched, call.inputs.batched, strict=True)
    other = [
        (leaf.path, value.dtype)
        for leaf, value in batched
        if value.is_floating_point() and value.dtype not in kinds
    ]
    if len(kinds) != 1 or not other:
        return ""
    (kind,), (path, given) = kinds, other[0]
    cast = {torch.float32: "float()", torch.float64: "double()"}.get(kind, f"to({kind})")
    weights = f"the weights of {type(module).__name__} are {kind}"
    return f"{path} is {given}, and {weights}. Write {path}.{cast}."


def _line_of(error: BaseException) -> str:
    """The innermost line of an error's traceback that is not in PyTorch or the standard library."""
    found = "no line of the model"
    link: BaseException | None = error
    while link is not None and found.startswith("no "):
        for frame in traceback.extract_tb(link.__traceback__)[1:]:  # the first is in this file
            if frame.filename.startswith("<") or not frame.line:
                continue
            path = Path(frame.filename)
            python = (
                path.is_relative_to(sysconfig.get_path("stdlib")) and "site-packages" not in path.parts
            )
            if not python and not path.is_relative_to(Path(torch.__file__).parent):
                found = f"{frame.filename}:{frame.lineno}, {frame.line!r}."
        link = link.__cause__ or link.__context__
    return found


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program whose operators have rules and do not change their operands.

    An in-place operator on a value that nothing else reads (``x += shortcut``) is replaced by the one
    that returns a new tensor. If that is not enough, PyTorch decomposes the whole program, which takes
    longer than the export, and composite operators without a rule, as an FFT, into their parts.
    """
    for node in program.graph.nodes:
        plain = _plain(node)
        if plain is not None:
            node.target = plain
    unknown: set[Any] = set()
    while new := {node.target for node in program.graph.nodes if not is_simple(node)} - unknown:
        unknown |= new
        known = torch.export.default_decompositions()
        named = unknown - {torch.ops.aten.item.default}  # users know it by this name
        program = program.run_decompositions({name: known[name] for name in named if name in known})
    return program


def _plain(node: Node) -> torch._ops.OpOverload | None:
    """The out-of-place version of an in-place operator, if nothing else reads its operand."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    written = node.args[0] if node.args else None
    alone = isinstance(written, Node) and len(written.users) == 1 and _is_new(written)
    packet = getattr(torch.ops.aten, operator_name(node).rstrip("_"), None)
    overload = getattr(packet, target._overloadname, None)
    return overload if alone and isinstance(overload, torch._ops.OpOverload) else None


def _is_new(node: Node) -> bool:
    """Whether a value is a new tensor, not a view of another."""
    known = operator_name(node) in contraction.RULES.keys() | norms.RULES.keys()
    return is_simple(node) and (known or is_pointwise(node)) and node.op == "call_function"
