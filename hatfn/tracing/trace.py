"""trace(): export the module, run its graph on labels, make the wiring from the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from hatfn.network.copies import first_names
from hatfn.numerics.digests import digest
from hatfn.tracing.digest import read_computed
from hatfn.tracing.graph import TraceError, _export, how_to_cast
from hatfn.tracing.heads import class_dims, last_heads, named_heads
from hatfn.tracing.inputs import Call, checked_call
from hatfn.tracing.inspect import Called, called, changed_buffers
from hatfn.tracing.interpret import interpret
from hatfn.tracing.layers import find_layers
from hatfn.tracing.nodes import UnreadableError
from hatfn.tracing.reach import watched_call
from hatfn.tracing.readout import read_wiring
from hatfn.tracing.tracer import Tracer
from hatfn.wiring import Head, Wiring


def trace(
    module: nn.Module,
    x: Any,
    head: str | Sequence[str] | Literal[False] | None = None,
    input_gate: bool = False,
    output_gate: bool | None = None,
    strict: bool = False,
    unbatched: Sequence[str] = (),
) -> Wiring:
    """Find the unit that each entry of each parameter helps to produce, and the unit that it reads.

    The module is exported in eval mode, and its graph is run on labels instead of numbers. The label of
    an element is the unit whose gate makes it zero. If an operator has no rule, its result is taken as
    ungated and its parameters are per task, which is always correct.

    Args:
        module: any module that ``torch.export`` can read. It is neither changed nor kept.
        x: an input (B, ...), a tuple of positional arguments or a dict of keyword arguments, which may
            be nested; B may be 1. Arguments that are None are left out.
        head: the name of the classifier's layer, linear or convolution, or a list of names. Each task
            gets its own. None: the layer that timm's ``get_classifier`` returns, else the last linear
            layer or 1x1 convolution, if the module returns its output. False: there is no classifier,
            and the module returns features.
        input_gate: give each feature of the input a gate as well, in the group "input".
        output_gate: whether the units of the module's output have gates. None: they have if
            :func:`hatfn.build` puts a head behind them. A unit that a later layer reads too always has
            one.
        strict: raise an error if an operator has no rule.
        unbatched: the paths of the inputs that do not lead with the samples, such as the edges of a
            graph: "edge_index", "1" for the second positional argument, "graph.edges" for a nested
            one.

    Returns:
        The wiring. ``wiring.summary()`` shows it as text, and ``wiring.measures`` gives the shares of
        parameters that are shared, gated and protected.

    Raises:
        TraceError: the module cannot be exported or fails; or ``strict`` is set and an operator has no
            rule.
        TypeError, ValueError: ``module`` is no module; a wrong input; ``head`` names no layer, or one
            whose weight is also used elsewhere.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> trace(net, torch.zeros(1, 4), head="2").groups
        mappingproxy({'0': 8})
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"trace: module is a {type(module).__name__}. Expected an nn.Module: trace(model, "
            f"torch.zeros(1, 3, 32, 32))."
        )
    if not (output_gate is None or isinstance(output_gate, bool)):
        raise TypeError(f"trace: output_gate={output_gate!r}. Expected True, False or None.")
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
        seen = called(module, call)
    except TraceError:
        raise
    except Exception as error:  # export does not run kernels, which may still fail
        raise _failed(module, call, "eval", error) from error
    parts = _Parts(module, call, program, names, changed, seen)
    found = last_heads(program, module) if not heads and head is None else []
    gates = input_gate, output_gate
    wiring = _wiring(parts, heads or found, *gates, strict)
    # A classifier that nobody has named may as well be the output of a regression.
    return replace(wiring, headless=_wiring(parts, [], *gates, strict)) if found else wiring


class _Parts(NamedTuple):
    """What is known of a module without labels.

    Attributes:
        module: the module.
        call: the arguments of its call.
        program: its graph.
        names: {name of a parameter or buffer: its first name}.
        changed: the names of the buffers that training changes.
        seen: what a call of the module shows.
    """

    module: nn.Module
    call: Call
    program: torch.export.ExportedProgram
    names: dict[str, str]
    changed: tuple[str, ...]
    seen: Called


def _wiring(
    parts: _Parts, heads: list[Head], input_gate: bool, output_gate: bool | None, strict: bool
) -> Wiring:
    """The wiring of a module with these heads; see :func:`trace`."""
    module, call, program, names, changed, seen = parts
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
        "layers": find_layers(program, names, seen.several),
        "signature": call.signature,
        "class_dims": class_dims(module, call, heads) if heads else (),
        "remembers": seen.remembers,
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
    """Check that nothing but the head reads the parameters of a head."""
    params = {name for head in heads for name in head if name is not None}
    tied = [name for name, first in names.items() if first in params and name not in params]
    used = [name for name in params if not t.params[name].untouched]
    if tied or used:
        raise ValueError(
            f"trace: the head's {(tied or used)[0]} is also used elsewhere or changed before use, so "
            f"that no task can have its own. Name another layer as head, or use a plain layer."
        )
