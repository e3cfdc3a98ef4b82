"""Make the wiring from a finished trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hatfn.tracing.labels import agree, compress, shrink
from hatfn.tracing.tracer import Param, Tracer, Value
from hatfn.wiring import OPEN, Head, Kind, ParamWiring, Units, Wiring


class _Role(NamedTuple):
    """The units of a parameter; a class of merged units has the number of its first unit."""

    out_units: Tensor
    in_units: Tensor
    gated: bool


def read_wiring(
    t: Tracer, outputs: list[Value], open_outputs: bool, heads: tuple[Head, ...], **known: Any
) -> Wiring:
    """The wiring that a trace found.

    Args:
        t: the finished trace.
        outputs: the values that the module returns.
        open_outputs: leave the units of outputs without gates, unless a parameter reads them too.
        heads: the classifiers; each task has its own.
        known: the fields of the wiring that do not come from the trace.
    """
    first = t.unions.units

    def resolve(label: Tensor) -> Tensor:
        label = t.unions.find(shrink(label))
        return (
            torch.where(label < 0, OPEN, first[label.clamp(min=0)]) if len(first) else label.clamp(OPEN)
        )

    head_names = {name for head in heads for name in head}
    roles = {name: _role(t, param, resolve) for name, param in t.params.items()}
    retired = _units(resolve(t.label(value)) for value in outputs if open_outputs)
    retired -= _units(role.in_units for name, role in roles.items() if name not in head_names)
    inputs = [] if t.input is None else [t.input]
    kept = _units([*inputs, *(role.out_units for role in roles.values() if role.gated)]) - retired

    groups: dict[str, Tensor] = {}
    number = torch.full((len(first) + 1,), OPEN)  # the last entry is read by OPEN
    count = 0
    for block, ids in t.blocks:
        units_kept = torch.tensor([i for i in ids.tolist() if i in kept], dtype=torch.long)
        if len(units_kept):
            name = block
            while name in groups:  # a module that is called twice produces two groups
                name += "'"
            groups[name] = torch.arange(count, count + len(units_kept))
            number[units_kept] = groups[name]
            count += len(units_kept)

    def units(label: Tensor) -> Units | None:
        index = shrink(compress(number[label]))
        if bool((index == OPEN).all()):
            return None
        flat = index.flatten()
        return Units(index, next((g for g, ids in groups.items() if torch.equal(ids, flat)), None))

    params = {}
    for name, role in roles.items():
        kind = _kind(name in head_names, t.params[name], number[role.out_units], number[role.in_units])
        param = t.params[name]
        into = None if param.own else units(role.in_units)
        shape, folded = tuple(param.shape), param.folded and kind == "shared" and into is not None
        params[name] = ParamWiring(shape, kind, units(role.out_units), into, role.gated, folded)
    return Wiring(
        groups={name: len(ids) for name, ids in groups.items()},
        params=params,
        heads=heads,
        input=None if t.input is None else units(t.input),
        **known,
        output_shape=tuple(outputs[0].shape[1:]) if outputs else (),
        fallbacks=tuple(t.fallbacks),
        output=units(_of_one_sample(resolve(outputs[0].label))) if outputs else None,
    )


def _of_one_sample(label: Tensor) -> Tensor:
    """The label of a value without its batch dimension."""
    return agree(label, (0,)).squeeze(0) if label.dim() else label


def _units(labels: Iterable[Tensor]) -> set[int]:
    """The set of all entries of some labels."""
    return {unit for label in labels for unit in label.unique().tolist()}


def _role(t: Tracer, param: Param, resolve: Callable[[Tensor], Tensor]) -> _Role:
    none = torch.full((1,) * len(param.shape), OPEN)
    if param.cells is not None:
        first = param.cells
        out = torch.arange(first, first + param.shape.numel()).reshape(param.shape)
    else:
        out = none if param.out_units is None else param.out_units
    deferred = bool(param.readers) and t.deferred.issuperset(param.readers)
    into = none if param.in_units is None else param.in_units
    return _Role(resolve(out), resolve(into), not (deferred or param.normalised))


def _kind(head: bool, param: Param, out: Tensor, into: Tensor) -> Kind:
    """The kind of a parameter: shared if every use gates it and every entry has a unit.

    An entry without a unit would be protected by the first task, so no other task could learn it.
    """
    if head:
        return "head"
    if not param.readers:
        return "unread"
    met = bool(param.bound.all()) if param.bound is not None else param.out_units is not None
    loose = bool(((out == OPEN) & (into == OPEN)).any())
    return "task" if param.own or loose or not met else "shared"
