"""trace(): export the module, interpret its graph on labels, read off the wiring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from hatfn.network.copies import first_names
from hatfn.tracing.digest import read_computed
from hatfn.tracing.graph import TraceError, _export, how_to_cast
from hatfn.tracing.heads import class_dims, last_heads, named_heads
from hatfn.tracing.inputs import Call, checked_call
from hatfn.tracing.inspect import changed_buffers, remembers
from hatfn.tracing.interpret import interpret
from hatfn.tracing.layers import find_layers
from hatfn.tracing.nodes import UnreadableError
from hatfn.tracing.reach import watched_call
from hatfn.tracing.readout import read_wiring
from hatfn.tracing.tracer import Tracer
from hatfn.wiring import Head, Wiring, digest


def trace(
    module: nn.Module,
    x: Any,
    head: str | Sequence[str] | Literal[False] | None = None,
    input_gate: bool = False,
    output_gate: bool | None = None,
    strict: bool = False,
    unbatched: Sequence[str] = (),
) -> Wiring:
    """Find which unit produces and which unit feeds every entry of every parameter.

    The module is exported in eval mode and its graph is run on labels in place of numbers: for each
    element of each value, the unit whose gate makes it zero. An operator without a rule leaves its
    result ungated and its parameters per task, which is always sound.

    Args:
        module: any module that ``torch.export`` can read; neither changed nor kept.
        x: an input (B, ...), a tuple of positional arguments or a dict of keyword arguments, nested as
            the module wants them; a batch of one will do. Arguments that are None are left out.
        head: names of the classifier's layers (linear or convolution; several for a model with several
            heads). Every task gets its own. None: what timm's ``get_classifier`` says, else the last
            linear layer or 1x1 convolution, if the module returns what it returns. False: there is
            none, and the module returns features.
        input_gate: put a gate on every feature of the input as well, the group "input".
        output_gate: whether the units that the module returns have gates. None: if
            :func:`hatfn.build` puts a head behind them. A unit that also feeds a later layer always has
            one.
        strict: raise instead of falling back.
        unbatched: paths of the inputs that do not lead with the samples, such as the edges of a graph:
            "edge_index", "1" for the second positional argument, "graph.edges" for a nested one.

    Returns:
        The wiring. ``wiring.summary()`` shows it, ``wiring.measures`` tells how good it is.

    Raises:
        TraceError: the module cannot be exported, or ``strict`` and an operator has no rule.
        ValueError: ``head`` names no layer, or one whose weight is used elsewhere too.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> trace(net, torch.zeros(1, 4), head="2").groups
        mappingproxy({'0': 8})
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"trace: module is a {type(module).__name__}. Expected an nn.Module: trace(model, "
            f"torch.zeros(1, 3, 32, 32))."
        )
    call = checked_call("trace", x, unbatched)
    if input_gate and len(call.signature.leaves) > 1:
        raise ValueError("trace: input_gate=True and several inputs. Expected a module of one input.")
    heads = named_heads(module, head)
    names = first_names(module)
    try:
        changed = changed_buffers(module, call, names)
    except TraceError:
        raise
    except Exception as error:
        raise _failed(module, call, "train", error) from error
    program = _export(module, call)
    try:
        watched_call(module, call, training=False)
        keeps = remembers(module, call)
    except TraceError:
        raise
    except Exception as error:  # what export does not compute, such as types that do not fit
        raise _failed(module, call, "eval", error) from error
    if not heads and head is None:
        heads = last_heads(program, module)
    shapes = {name: param.shape for name, param in module.named_parameters()}
    tracer = Tracer(shapes, [head.weight for head in heads])
    try:
        outputs = interpret(tracer, program, names, changed, input_gate)
    except UnreadableError as error:
        raise TraceError(
            f"trace: {error}, which labels cannot follow. Expected a module whose shapes and constants "
            f"are the same for every input, and that does not ask for the sign of a zero."
        ) from error
    _check_heads(tracer, heads, names)
    if strict and tracer.fallbacks:
        raise TraceError(f"trace: no rule for {', '.join(tracer.fallbacks)} (strict=True).")
    buffers = dict(module.named_buffers())
    read = sorted(tracer.constants & set(buffers))
    known: dict[str, Any] = {
        "heads": tuple(heads),
        "buffers": changed,
        "constants": tuple((name, digest(buffers[name])) for name in read),
        "layers": find_layers(program, names),
        "signature": call.signature,
        "class_dims": class_dims(module, call, heads) if heads else (),
        "remembers": keeps,
        "computed": read_computed(program, names, call),
    }
    if heads or output_gate is not None:
        return read_wiring(tracer, outputs, not (heads or output_gate), **known)
    plain, gated = (read_wiring(tracer, outputs, closed, **known) for closed in (True, False))
    return replace(plain, gated=replace(gated, ungated=plain.fingerprint))


def _failed(module: nn.Module, call: Call, mode: str, error: Exception) -> TraceError:
    return TraceError(
        f"trace: {type(module).__name__} fails in {mode} mode at {call}: {error} "
        f"{how_to_cast(module, call)}".rstrip()
    )


def _check_heads(t: Tracer, heads: list[Head], names: dict[str, str]) -> None:
    """A head's parameters must be the head's alone."""
    mine = {name for head in heads for name in head if name is not None}
    tied = [name for name, first in names.items() if first in mine and name not in mine]
    used = [name for name in mine if not t.params[name].untouched]
    if tied or used:
        raise ValueError(
            f"trace: the head's {(tied or used)[0]} is also used elsewhere or changed before use, so "
            f"that no task can have its own. Name another head, or let it be a plain layer."
        )
