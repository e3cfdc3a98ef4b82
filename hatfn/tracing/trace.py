"""trace(): export the module, interpret its graph on labels, read off the wiring."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hatfn.network.copies import first_names
from hatfn.tracing.digest import read_computed
from hatfn.tracing.graph import TraceError, _export, how_to_cast
from hatfn.tracing.inspect import changed_buffers, find_heads, remembers
from hatfn.tracing.interpret import interpret
from hatfn.tracing.layers import find_layers
from hatfn.tracing.nodes import UnreadableError
from hatfn.tracing.readout import read_wiring
from hatfn.tracing.tracer import Tracer
from hatfn.wiring import Head, Wiring, digest


def trace(
    module: nn.Module,
    x: Tensor,
    head: str | tuple[str, ...] | None = None,
    input_gate: bool = False,
    output_gate: bool = False,
    strict: bool = False,
) -> Wiring:
    """Find which unit produces and which unit feeds every entry of every parameter.

    The module is exported in eval mode and its graph is run on labels in place of numbers: for each
    element of each value, the unit whose gate makes it zero. An operator without a rule leaves its
    result ungated and its parameters per task, which is always sound.

    Args:
        module: any module that ``torch.export`` can read; neither changed nor kept.
        x: an input, (B, ...); a batch of one will do.
        head: names of the classifier's layers (linear or convolution; several for a model with several
            heads). Every task gets its own. Default: what timm's ``get_classifier`` says, else none.
        input_gate: put a gate on every feature of the input as well, the group "input".
        output_gate: gate the units that are the module's own output too. Without it they are left
            alone; a unit that also feeds a later layer is always gated.
        strict: raise instead of falling back.

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
    if not isinstance(module, nn.Module) or not isinstance(x, Tensor):
        raise TypeError(
            f"trace: expected (module, input tensor), got ({type(module).__name__}, "
            f"{type(x).__name__}). Write trace(model, torch.zeros(1, 3, 32, 32))."
        )
    heads = find_heads(module, head)
    names = first_names(module)
    if len(x) == 1:  # two samples, or what mixes samples would look like what mixes features
        x = torch.cat([x, x])
    try:
        changed = changed_buffers(module, x, names)
    except Exception as error:
        raise _failed(module, x, "train", error) from error
    program = _export(module, x)
    try:
        keeps = remembers(module, x)
    except Exception as error:  # what export does not compute, such as types that do not fit
        raise _failed(module, x, "eval", error) from error
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
    wiring = read_wiring(
        tracer,
        heads=tuple(heads),
        buffers=changed,
        constants=tuple((name, digest(buffers[name])) for name in read),
        outputs=outputs,
        open_outputs=not (heads or output_gate),
        input_shape=x.shape[1:],
    )
    layers = find_layers(program, names)
    computed = read_computed(program, names, x)
    return replace(wiring, layers=layers, remembers=keeps, computed=computed)


def _failed(module: nn.Module, x: Tensor, mode: str, error: Exception) -> TraceError:
    return TraceError(
        f"trace: {type(module).__name__} fails in {mode} mode at an input of shape {tuple(x.shape)}: "
        f"{error} {how_to_cast(module, x)}".rstrip()
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
