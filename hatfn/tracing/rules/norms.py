"""Rules for normalisation: the affine of a norm carries the gate of what it normalises.

A norm subtracts a mean and adds a bias, so its result is zero only if its own scale and bias are.
They are small and every task has its own. Where the input of a norm is ungated, its affine makes
new units.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import agree, all_but, filled
from hatfn.tracing.nodes import operator_name, place_of
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Result, Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)


def _affine(t: Tracer, node: Node, label: Tensor, weight: Value | None, bias: Value | None) -> Tensor:
    """The label of ``xhat * weight + bias``, where ``label`` (shaped like weight) is that of x.

    Each pair of scale and bias takes over the unit of its channel, or gets a unit of its own.
    """
    for parameter in (weight, bias):
        if parameter is not None:
            t.own(parameter)
    if weight is None or weight.dynamic or weight.data is not None:
        return filled(label.shape, OPEN)
    named = label >= 0
    if label.numel() == 1 and not bool(named):
        return filled(label.shape, OPEN)  # a group of one unit would switch a task off as a whole
    if not bool(named.all()):
        fresh = t.fresh(int((~named).sum()), place_of(node) or str(node.name))
        label = label.masked_scatter(~named, fresh)
    held = t.bind(weight, label, None)
    if bias is not None:
        held = t.same(held, t.bind(bias, label, None))
    return held


def _per_channel(t: Tracer, node: Node, x: Value, weight: Value | None, bias: Value | None) -> Tensor:
    """Scale and bias per channel (dimension 1); the label of the result."""
    t.own(x)
    label = t.roots(x)
    channels = agree(label, (0, *range(2, label.dim()))).expand(
        [size if d == 1 else 1 for d, size in enumerate(label.shape)]
    )
    unit = _affine(t, node, channels.reshape(-1), weight, bias)
    return unit.reshape(channels.shape).expand(label.shape)


def _per_feature(
    t: Tracer,
    node: Node,
    label: Tensor,
    normalized_shape: list[int],
    weight: Value | None,
    bias: Value | None,
) -> Tensor:
    """Scale and bias per entry of the last dimensions; the label of the result."""
    leading = tuple(range(label.dim() - len(normalized_shape)))
    features = agree(label, leading).expand(*[1] * len(leading), *normalized_shape)
    unit = _affine(t, node, features.reshape(normalized_shape), weight, bias)
    return unit.expand(label.shape)


def _defer(t: Tracer, node: Node, x: Value, result: Tensor) -> None:
    """Let the affine of a per-channel norm gate the convolution whose only user it is.

    A gate on the convolution itself would be normalised away, and leaving its weights alone keeps
    them one matrix under ``vmap`` over tasks. The affine must gate every channel with the very unit
    that would have gated the convolution.
    """
    producer = node.args[0]
    if isinstance(producer, Node) and len(producer.users) == 1:
        same = t.same(t.label(x), result)
        if bool((same >= 0).all()):
            t.deferred.add(producer)


@rule(
    "batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
    "native_batch_norm", "cudnn_batch_norm",
)  # fmt: skip
def batch_norm(
    t: Tracer,
    node: Node,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """Batch norm: channels do not mix, so an ungated channel cannot reach its neighbours."""
    if x.sources and 0 not in x.shape and len(x.shape) == 3:
        return _standardise(t, x, weight, bias)
    label = _per_channel(t, node, x, weight, bias)
    _defer(t, node, x, label)
    return label


def _standardise(t: Tracer, x: Value, gain: Value | None, bias: Value | None) -> Tensor:
    """Weight standardisation: each row of a parameter, less its mean, over its deviation.

    The entries keep their places, but each depends on its whole row: the columns that are off must be
    zero before, so the parameter is gated at both ends, and a row has one gate: of a row that is off in
    part, less its mean, nothing is zero. A gate on a row is normalised away while it is soft; the gain
    takes it as well.
    """
    label = t.label(x)
    t.fold(x)
    if bias is not None:
        t.own(x)
        t.own(bias)
    if gain is not None:
        t.own(gain)
    rows = t.together(label, all_but(label, 1))
    if bias is not None or rows is None:
        return filled(label.shape, OPEN)
    if gain is not None:
        t.merge(rows.flatten(), t.label(gain))
    return label


@rule("_weight_norm")
def weight_norm(t: Tracer, node: Node, direction: Value, length: Value, dim: int = 0) -> Result:
    """g v / |v| for each row: v is a direction, of which what is off must be zero before.

    So the gate of what a row reads multiplies v. The gate of the row itself would be normalised away:
    the length g has it. Where a norm is of several rows, as in a transposed convolution, they have no
    gate.
    """
    t.own(length)
    param = t.params.get(direction.param or "")
    alone = param is not None and all(operator_name(user) == "_weight_norm" for user in param.readers)
    rows = None
    if param is not None and alone and length.sources and dim >= 0:
        t.fold(direction)
        param.normalised = True
        rows = t.together(t.label(direction), all_but(direction.label, dim))
    if rows is None or t.merge(rows, t.label(length)) is None:
        t.own(direction)
        return filled(direction.shape, OPEN)
    return Value(t.label(direction), sources=direction.sources | length.sources)


@rule("instance_norm")
def instance_norm(
    t: Tracer,
    node: Node,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    variance: Value | None,
    use_input_stats: bool,
    *_: Any,
) -> Tensor:
    """Instance norm: as batch norm; without an affine a channel of zeros, less its mean, is zero."""
    if weight is None and bias is None and use_input_stats:
        label = t.roots(x)
        return agree(label, tuple(range(2, label.dim()))).expand(label.shape)
    label = _per_channel(t, node, x, weight, bias)
    _defer(t, node, x, label)
    return label


@rule("group_norm", "native_group_norm")
def group_norm(
    t: Tracer,
    node: Node,
    x: Value,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Group norm mixes the channels of a group: what it reads must be gated as well as its affine."""
    native = "native" in str(node.target)
    weight, bias = (args[0], args[1]) if native else (args[1], args[2])
    return _per_channel(t, node, x, weight, bias)


@rule("layer_norm", "native_layer_norm")
def layer_norm(
    t: Tracer,
    node: Node,
    x: Value,
    normalized_shape: list[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Tensor:
    """Layer norm mixes everything that it normalises: both its input and its affine are gated."""
    t.own(x)
    return _per_feature(t, node, t.roots(x), normalized_shape, weight, bias)


@rule("rms_norm", "_fused_rms_norm")
def rms_norm(
    t: Tracer,
    node: Node,
    x: Value,
    normalized_shape: list[int],
    weight: Value | None = None,
    *_: Any,
) -> Tensor:
    """RMS norm neither subtracts nor adds: zero stays zero; an ungated channel needs the scale."""
    t.own(x)
    label = t.roots(x)
    if bool((label >= 0).all()):
        if weight is not None:
            t.own(weight)
        return label
    return _per_feature(t, node, label, normalized_shape, weight, None)
