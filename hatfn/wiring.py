"""The wiring: the unit that each entry of each parameter helps to produce, and the unit it reads.

A :class:`Wiring` never changes. :func:`hatfn.trace` finds it from a module. All code that gates,
protects or counts units reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hatfn.numerics.arguments import Signature
from hatfn.numerics.digests import digest

OPEN = -1
"""The index of an entry that has no unit."""


@dataclass(frozen=True, eq=False)
class Units:
    """The unit of each entry of a tensor.

    Attributes:
        index: int64, broadcasts with the tensor: the number of the unit, or ``OPEN`` (-1) for an entry
            without one. Units are numbered through all groups, in the order of ``Wiring.groups``. The
            index is larger than the tensor if one number is added to all channels: it has one gate
            for each channel.
        group: the group whose units, all of them and in order, are ``index``; None if there is no such
            group. Values of a group are read by a view, without an index.
    """

    index: Tensor
    group: str | None = None

    def __repr__(self) -> str:
        """One line."""
        where = "several groups" if self.group is None else f"group {self.group!r}"
        return f"Units({tuple(self.index.shape)} of {where})"

    def to(self, device: torch.device | str) -> Units:
        """A copy with the index on ``device``."""
        return replace(self, index=self.index.to(device))


Kind = Literal["shared", "task", "head", "unread", "untrained"]
"""Whether tasks share a parameter: see :class:`ParamWiring`."""


class ParamWiring(NamedTuple):
    """The units of one parameter of the module, and whether tasks share it.

    Attributes:
        shape: the shape of the parameter in the module.
        kind: "shared": one copy for all tasks, which is gated and protected. "task": a copy for each
            task. "head": a copy for each task, with a row for each class of the task. "unread": one
            copy, on which no output depends. "untrained": one copy that never changes; only the
            network of a learner has this kind.
        out_units: the unit that each entry helps to produce; its gate multiplies the entry. None: no
            entry has one.
        in_units: the unit that each entry reads: the entry is multiplied by this unit's activation and
            by nothing else. None: no entry has one.
        gated: False if another parameter carries the gate of ``out_units``: the scale and shift of a
            later norm, or the length of a normalised weight. A gate on this one would be divided out.
        folded: True if the module computes with the parameter before it uses it, as weight
            standardisation and weight norm do. The gate of ``in_units`` then multiplies it as well.
    """

    shape: tuple[int, ...]
    kind: Kind
    out_units: Units | None = None
    in_units: Units | None = None
    gated: bool = True
    folded: bool = False

    @property
    def off(self) -> float:
        """What an entry of a folded parameter becomes where the gate of its in unit is 0.

        Zero, unless the entries are only a direction (weight norm): of a direction of zeros the length
        is 0 and the quotient nan. A number whose square is lost beside any weight's gives it one.
        """
        return 1e-15 if self.folded and not self.gated else 0.0


class Head(NamedTuple):
    """A classifier of which each task has its own copy.

    Attributes:
        weight: the name of the weight, (classes, features, ...).
        bias: the name of the bias, or None.
    """

    weight: str
    bias: str | None


class Layer(NamedTuple):
    """A layer that multiplies by its weight, adds its bias and does nothing else.

    Nothing else reads the weight or the bias.

    Attributes:
        params: the names of the weight and, if there is one, the bias.
        size: how many numbers the layer returned for one sample of the traced input.
        readers: the paths of the layers that read the output, if nothing else reads it. Between the
            two, only elementwise functions that map 0 to 0 may stand. Empty if anything else reads it.
    """

    params: tuple[str, ...]
    size: int
    readers: tuple[str, ...] = ()


class Computed(NamedTuple):
    """Which function a module computes, apart from its parameters.

    Modules with equal wirings may compute different functions.

    Attributes:
        digest: SHA-256 of the operators and their constants.
        under: the conditions of the trace, which change the digest of the same module: PyTorch's
            version, and types and shapes of the traced input.
    """

    digest: str
    under: str


class Measures(NamedTuple):
    """How much of a module a trace can gate and protect; all but the last are shares in [0, 1].

    Attributes:
        shared: the share of parameters, outside the heads, that all tasks share.
        pair_gated: the share of shared weights, in parameters with two or more dimensions, that have
            both an out unit and an in unit.
        protected: the expected share of shared entries that one task protects if each unit is on with
            probability 1/2. 1/4 is ideal; at 1 no capacity is left after the first task.
        smallest_group: the number of units in the smallest group; 0 without groups.
    """

    shared: float
    pair_gated: float
    protected: float
    smallest_group: int


@dataclass(frozen=True, eq=False)
class Wiring:
    """The units of a module's parameters, as :func:`hatfn.trace` finds them; immutable and hashable.

    Two wirings are equal if their fingerprints are.

    Attributes:
        groups: {group: number of units}; a group has the name of the module that first produces it.
        params: {name: wiring of the parameter}; a tied parameter has its first name in the module.
        buffers: the names of the buffers that a training step changes; each task has its own copy.
        heads: the classifiers; each task has its own copy.
        input: the units of the input's features, if they are gated; else None.
        signature: the inputs of the module.
        output_shape: the shape of the module's first output, without the batch dimension.
        class_dims: for each tensor that the module returns in eval mode, the dimension that counts
            classes, where dimension 0 is the batch; None for a tensor without classes.
        layers: {path: layer}, the layers that only multiply and add.
        remembers: whether a call in eval mode changes attributes of the module.
        constants: (name, digest) of each buffer that never changes; the trace relied on its values.
        fallbacks: operators without a rule, each with the module that it stands in. Their results are
            taken as ungated, and the parameters that feed them are per task.
        output: the units of the first output, for a head behind the module; None: it has none.
        computed: which function the module computes; None: not known.
        gated: the wiring with gates on the units that the module returns. :func:`hatfn.build` uses it
            if it puts a head behind the module. None: there is no second wiring.
        ungated: in a wiring that is another's ``gated``, the fingerprint of that other; else empty.
        headless: the wiring without heads, if the trace found the heads by itself. :func:`hatfn.build`
            uses it if there are no classes.
    """

    groups: Mapping[str, int]
    params: Mapping[str, ParamWiring]
    buffers: tuple[str, ...] = ()
    heads: tuple[Head, ...] = ()
    input: Units | None = None
    signature: Signature = field(default_factory=lambda: Signature(()))
    output_shape: tuple[int, ...] = ()
    class_dims: tuple[int | None, ...] = ()
    layers: Mapping[str, Layer] = field(default_factory=dict)
    remembers: bool = False
    constants: tuple[tuple[str, str], ...] = ()
    fallbacks: tuple[str, ...] = ()
    output: Units | None = None
    computed: Computed | None = None
    gated: Wiring | None = None
    ungated: str = ""
    headless: Wiring | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __reduce__(self) -> tuple[type[Wiring], tuple[object, ...]]:
        # A mapping proxy neither copies nor pickles; a dict does.
        values = (getattr(self, entry.name) for entry in fields(self))
        return Wiring, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)

    def __repr__(self) -> str:
        """One line: groups, units, the share of the parameters that tasks share, heads."""
        heads = ", ".join(head.weight for head in self.heads) or "none"
        return (
            f"Wiring({len(self.groups)} groups of {sum(self.groups.values())} units, "
            f"{self.measures.shared:.1%} of the parameters shared, heads: {heads})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wiring) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that gates and protects: equal wirings have equal fingerprints.

        It leaves out fields that do not change the meaning of a state: ``layers``, the in units of
        parameters that are not shared, ``output``, ``remembers``. It also leaves out ``computed``,
        which depends on PyTorch's version.
        """

        def of_units(units: Units | None) -> str:
            return "none" if units is None else digest(units.index)

        shared = self.shared
        params = [
            (
                n,
                p.shape,
                p.kind,
                p.gated,
                p.folded,
                of_units(p.out_units),
                of_units(p.in_units if n in shared else None),
            )
            for n, p in self.params.items()
        ]
        whole = (
            list(self.groups.items()),
            params,
            self.buffers,
            self.heads,
            of_units(self.input),
            self.constants,
        )
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of the first batched input of the trace, without its batch dimension."""
        return self.signature.batched[0].shape if self.signature.leaves else ()

    @property
    def shared(self) -> dict[str, ParamWiring]:
        """The parameters that all tasks share and that protection covers."""
        return {name: param for name, param in self.params.items() if param.kind == "shared"}

    @property
    def unread(self) -> tuple[str, ...]:
        """The parameters that no output depends on."""
        return tuple(name for name, param in self.params.items() if param.kind == "unread")

    @cached_property
    def outputs(self) -> dict[str, Units]:
        """{path: out units} of the layers for which one can gate the output instead of the parameters.

            a (W x + b) = (a W) x + a b

        This holds if the same unit gates a row of the weight and the entry of the bias. The index
        broadcasts with the output of the layer.
        """
        return {
            path: Units(rows.index.reshape(-1, *(1,) * (len(role.shape) - 2)), rows.group)
            for path, layer in self.layers.items()
            for role in [self.params[layer.params[0]]]
            if (rows := _rows([self.params[name] for name in layer.params])) is not None
        }

    @cached_property
    def measures(self) -> Measures:
        """How much of the module is shared, gated at both ends and protected."""
        total = shared = weights = 0
        pairs = protected = 0.0
        for param in self.params.values():
            count = torch.Size(param.shape).numel()
            total += count if param.kind not in ("head", "unread") else 0
            if param.kind == "shared":
                out, into = (_index(units, param.shape) for units in (param.out_units, param.in_units))
                both = (out != OPEN) & (into != OPEN) & (out != into)
                none = (out == OPEN) & (into == OPEN)
                scale = count / max(both.numel(), 1)
                pair = int(both.sum()) * scale
                never = int(none.sum()) * scale
                shared += count
                protected += 0.25 * pair + never + 0.5 * (count - pair - never)
                if len(param.shape) > 1:
                    weights += count
                    pairs += int(((out != OPEN) & (into != OPEN)).sum()) * scale
        return Measures(
            shared / max(total, 1),
            pairs / max(weights, 1),
            protected / max(shared, 1),
            min(self.groups.values(), default=0),
        )

    def summary(self) -> str:
        """A text with the groups, the measures, the per-task parameters and the fallbacks."""
        measures = self.measures
        per_task = {name: param.shape for name, param in self.params.items() if param.kind == "task"}
        numbers = sum(torch.Size(shape).numel() for shape in per_task.values())
        # Vectors are left out: most are the scales and shifts of norms.
        tables = [n for n, shape in per_task.items() if sum(size > 1 for size in shape) > 1]
        heads = ", ".join(head.weight for head in self.heads) or "none"
        width = max([len("group"), *map(len, self.groups)])
        lines = [f"{'group':<{width}}  units"]
        lines += [f"{name:<{width}}  {units:>5}" for name, units in self.groups.items()]
        lines += [
            "",
            f"shared      {measures.shared:7.1%} of the parameters outside the heads",
            f"pair-gated  {measures.pair_gated:7.1%} of the shared weight entries",
            f"protected   {measures.protected:7.1%} of the shared entries by one half-open task",
            f"smallest    {measures.smallest_group} units",
            f"heads       {heads}",
            f"per task    {len(per_task)} parameters of {numbers} numbers, {len(self.buffers)} buffers",
            *(f"  {name} {per_task[name]}" for name in tables),
            f"fell back   {len(self.fallbacks)} operators",
        ]
        return "\n".join(lines + [f"  {place}" for place in self.fallbacks])

    def to(self, device: torch.device | str) -> Wiring:
        """A copy with all indices on ``device``."""

        def move(units: Units | None) -> Units | None:
            return None if units is None else units.to(device)

        params = {
            name: param._replace(out_units=move(param.out_units), in_units=move(param.in_units))
            for name, param in self.params.items()
        }
        moved = replace(self, params=params, input=move(self.input), output=move(self.output))
        gated, headless = (w and w.to(device) for w in (self.gated, self.headless))
        return replace(moved, gated=gated, headless=headless)

    def lookup(self, values: Mapping[str, Tensor]) -> Callable[[Units], Tensor]:
        """A function that reads the values of units.

        Args:
            values: {group: (U,)}, one value for each unit, such as gates or masks.

        Returns:
            A function from :class:`Units` to a tensor shaped like ``units.index``. An entry without a
            unit gets 1 (True).
        """
        flat: list[Tensor] = []  # filled only if a parameter has no single group

        def look(units: Units) -> Tensor:
            if units.group is not None:
                return values[units.group].reshape(units.index.shape)
            if not flat:
                parts = [values[group] for group in self.groups]
                one = torch.ones_like(parts[0][:1]) if parts else torch.ones(1)
                flat.append(torch.cat([*parts, one]))
            return flat[0][units.index]  # OPEN is -1, the last element, which is one

        return look


def _index(units: Units | None, shape: tuple[int, ...]) -> Tensor:
    """The index of ``units``; for None, one ``OPEN`` entry with as many dimensions as ``shape``."""
    return units.index if units is not None else torch.full((1,) * len(shape), OPEN)


def _rows(roles: Sequence[ParamWiring]) -> Units | None:
    """The unit of each row, if it is the same in all parameters of a layer; else None."""
    found = [
        role.out_units
        for role in roles
        if role.gated and role.kind != "head" and role.out_units is not None
    ]
    if len(found) < len(roles) or any(units.index.numel() != len(units.index) for units in found):
        return None
    first = found[0].index.flatten()
    agree = all(torch.equal(units.index.flatten(), first) for units in found)
    return found[0] if agree and len(first) == roles[0].shape[0] else None
