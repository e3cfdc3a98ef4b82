"""manual_wiring(): write a wiring by hand, for a module that torch.export cannot read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hatfn.checks.values import check_kind
from hatfn.network.copies import copied, first_names
from hatfn.numerics.digests import digest
from hatfn.numerics.trees import output_leaves
from hatfn.tracing.heads import named_heads
from hatfn.tracing.inputs import checked_call
from hatfn.tracing.inspect import called, changed_buffers
from hatfn.tracing.verify import verify_wiring
from hatfn.wiring import ParamWiring, Units, Wiring

Ends = str | tuple[str | None, str | None]
"""The group that a layer produces, or a pair of it and the group that the layer reads."""

_MATRIX = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def manual_wiring(
    module: nn.Module,
    x: Any,
    layers: Mapping[str, Ends],
    head: str | Sequence[str] | Literal[False] | None = None,
    verify: bool = True,
    unbatched: Sequence[str] = (),
) -> Wiring:
    """Write down which group of units each layer produces, and which group it reads.

    Layers whose results are added, as in a residual stream, produce the same group. Parameters of
    layers that are not listed are per task, which is always correct. The head is per task as well; if
    you list it as ``(None, group)``, ``hat.compact`` can cut its columns.

    Args:
        module: any module.
        x: (B, ...), an input, as for :func:`hatfn.trace`.
        layers: {name of a layer: (group it produces, group it reads)} for linear layers and
            convolutions, with None if there is no group, as for the module's input. {name: group} for
            norms and other layers whose parameters are vectors. If a layer reads a flattened image,
            its group has one unit for each channel.
        head: the names of the classifier's layers, as for :func:`hatfn.trace`.
        verify: check the wiring with :func:`hatfn.testing.verify_wiring`.
        unbatched: the paths of the inputs that do not lead with the samples, as for
            :func:`hatfn.trace`.

    Returns:
        The wiring, as from :func:`hatfn.trace`.

    Raises:
        TypeError: ``module`` is no module, ``x`` no input or ``layers`` no dict.
        ValueError: a layer does not exist, sizes differ, or a layer reads a group that none produces.
        AssertionError: ``verify`` found that a weight reaches the output although its units are off,
            so a group is wrong.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        ...
        ...     def forward(self, x):
        ...         x = self.b(self.a(x).relu())
        ...         return self.head(x.relu() if x.sum() > 0 else x)  # no graph has this
        >>> layers = {"a": ("a", None), "b": ("b", "a")}
        >>> manual_wiring(Net(), torch.randn(2, 4), layers, head="head").groups
        mappingproxy({'a': 8, 'b': 6})
    """
    check_kind("manual_wiring", "module", module, nn.Module, "an nn.Module")
    check_kind("manual_wiring", "layers", layers, Mapping, '{"conv1": ("stem", None)}: a dict')
    call = checked_call("manual_wiring", x, unbatched)
    names, modules = first_names(module), dict(module.named_modules())
    heads = named_heads(module, head)
    for layer in layers:
        if layer not in modules:
            close = difflib.get_close_matches(layer, modules, 3, 0.0)
            raise ValueError(
                f"manual_wiring: {layer!r} is no layer of {type(module).__name__}. "
                f"Expected names such as {', '.join(map(repr, close))}."
            )
    groups = _groups(layers, modules)
    ids = dict(
        zip(groups, torch.arange(sum(groups.values())).split(list(groups.values())), strict=True)
    )
    params = {name: ParamWiring(tuple(p.shape), "task") for name, p in module.named_parameters()}
    for layer, ends in layers.items():
        for leaf, role in _roles(modules[layer], layer, *_ends(ends), ids):
            params[names[f"{layer}.{leaf}"]] = role
    for name in (name for found in heads for name in found if name is not None):
        params[name] = ParamWiring(params[name].shape, "head", in_units=params[name].in_units)
    try:
        buffers, changed = dict(module.named_buffers()), changed_buffers(module, call, names)
        with torch.no_grad():
            output = copied(module, training=False)(*call.args, **call.kwargs)
    except RuntimeError as error:
        raise ValueError(f"manual_wiring: {type(module).__name__} fails on {call}: {error}") from error
    wiring = Wiring(
        groups=groups,
        params=params,
        buffers=changed,
        heads=tuple(heads),
        signature=call.signature,
        output_shape=tuple(output_leaves(output)[0].shape[1:]),
        remembers=called(module, call).remembers,
        constants=tuple((name, digest(b)) for name, b in buffers.items() if name not in changed),
    )
    if verify:
        verify_wiring(module, wiring, x)
    return wiring


def _ends(ends: Ends) -> tuple[str | None, str | None]:
    return ends if isinstance(ends, tuple) else (ends, None)


def _groups(layers: Mapping[str, Ends], modules: dict[str, nn.Module]) -> dict[str, int]:
    """{group: number of units}, from the widths of the layers that produce each group."""
    groups: dict[str, int] = {}
    for layer, ends in layers.items():
        out, count = _ends(ends)[0], _channels(modules[layer])[0]
        if out is not None and groups.setdefault(out, count) != count:
            raise ValueError(
                f"manual_wiring: {layer} produces {count} units of the group {out!r}, which has "
                f"{groups[out]}. Expected as many, as in a residual stream, or another group."
            )
    for layer, ends in layers.items():
        into, count = _ends(ends)[1], _channels(modules[layer])[1]
        if into is not None and into not in groups:
            raise ValueError(
                f"manual_wiring: {layer} is fed by the group {into!r}, which no layer produces. "
                f"Expected one of {list(groups)}, or None for an input without a gate."
            )
        if into is not None and (count == 0 or count % groups[into]):
            raise ValueError(
                f"manual_wiring: {layer} takes {count} features from the group {into!r} of "
                f"{groups[into]} units. Expected a multiple: one unit per channel of a flattened image."
            )
    return groups


def _channels(layer: nn.Module) -> tuple[int, int]:
    """The number of output units and of input units of a layer; 0 if it has no matrix."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"manual_wiring: {type(layer).__name__} has no weight of its own. Name the layer inside."
        )
    groups = getattr(layer, "groups", 1)
    if weight.dim() < 2:
        return len(weight), 0
    if isinstance(layer, _TRANSPOSED):
        return weight.shape[1] * groups, len(weight)
    return (len(weight), weight.shape[1] * groups) if isinstance(layer, _MATRIX) else (0, 0)


def _roles(
    layer: nn.Module, name: str, out: str | None, into: str | None, ids: dict[str, Tensor]
) -> Iterator[tuple[str, ParamWiring]]:
    """The wiring of each parameter of a layer, from the groups that it produces and reads."""
    makes, takes = _channels(layer)
    for leaf, param in layer.named_parameters(recurse=False):
        shape = tuple(param.shape)
        produced = feeding = None
        if len(shape) == 1:
            produced = _along(out, ids, makes, 1, shape, dim=0)
        else:
            swap, groups = isinstance(layer, _TRANSPOSED), getattr(layer, "groups", 1)
            produced = _along(out, ids, makes, groups, shape, dim=int(swap))
            feeding = _along(into, ids, takes, groups, shape, dim=int(not swap))
        known = takes and (produced if len(shape) == 1 else produced or feeding)
        yield leaf, ParamWiring(shape, "shared" if known else "task", produced, feeding)


def _along(
    group: str | None, ids: dict[str, Tensor], count: int, blocks: int, shape: tuple[int, ...], dim: int
) -> Units | None:
    """The units of a group along the rows (dim 0) or the columns (dim 1) of a parameter.

    In a grouped convolution each block of rows reads other units in its columns.
    """
    if group is None:
        return None
    units = ids[group].repeat_interleave(count // len(ids[group]))
    ones = (1,) * (len(shape) - 2)
    if dim == 0:
        index = units.reshape(-1, *(1,) * (len(shape) - 1))
    elif blocks == 1:
        index = units.reshape(1, -1, *ones)
    else:
        index = units.reshape(blocks, -1).repeat_interleave(shape[0] // blocks, 0)
        index = index.reshape(*index.shape, *ones)
    whole = index.numel() == len(ids[group])
    return Units(index, group if whole else None)
