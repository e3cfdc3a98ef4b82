"""The wiring: which unit produces, and which unit feeds, every entry of every parameter.

A :class:`Wiring` is static data. :func:`hatfn.trace` makes one from a module; everything that
gates, protects or counts units reads it.
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

OPEN = -1
"""The entry of an index that no gate governs."""


@dataclass(frozen=True, eq=False)
class Units:
    """The unit behind each entry of a tensor.

    Attributes:
        index: integers that broadcast with the tensor (one number that is added to all channels is
            gated once per channel); units are numbered through all groups laid end
            to end, in the order of ``Wiring.groups``; ``OPEN`` (-1) where no gate governs an entry.
        group: the group whose units are ``index``, in order and all of them, if there is one; its
            values are then used by a view, without an index.
    """

    index: Tensor
    group: str | None = None

    def __repr__(self) -> str:
        """One line."""
        where = "several groups" if self.group is None else f"group {self.group!r}"
        return f"Units({tuple(self.index.shape)} of {where})"

    def to(self, device: torch.device | str) -> Units:
        """The same units with their index on ``device``."""
        return replace(self, index=self.index.to(device))


Kind = Literal["shared", "task", "head", "unread", "untrained"]
"""How tasks have a parameter."""


class ParamWiring(NamedTuple):
    """How one parameter of the module takes part.

    Attributes:
        shape: the parameter's shape in the module.
        kind: "shared" (one copy for all tasks, protected), "task" (a copy per task), "head" (a copy per
            task, as wide as the task has classes), "unread" (one copy: no output depends on it) or
            "untrained" (one copy that never changes; in a learner's network alone).
        out_units: the unit whose gate multiplies each entry.
        in_units: the unit whose activation each entry is multiplied with, and nothing else.
        gated: False where another parameter holds the gate of ``out_units`` instead, a later norm's
            affine or the length of a normalised weight, because a gate on this one would be normalised
            away.
        folded: True where the module computes with the parameter before it uses it (weight
            standardisation, weight norm): the gate of ``in_units`` then multiplies it as well.
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
    """A classifier that every task has for itself.

    Attributes:
        weight: name of its weight, (classes, features, ...).
        bias: name of its bias, or None.
    """

    weight: str
    bias: str | None


class Layer(NamedTuple):
    """A layer that only multiplies by a weight and adds a bias, which nobody else reads.

    Attributes:
        params: names of its weight and, if it has one, its bias.
        size: numbers that it returned for a sample of the traced input.
        readers: paths of the layers that alone read what it returns, unit by unit, behind functions of
            single numbers that keep zero; empty if anything else does.
    """

    params: tuple[str, ...]
    size: int
    readers: tuple[str, ...] = ()


class Computed(NamedTuple):
    """What a module computes, whatever its numbers: modules of equal wirings may differ in it.

    Attributes:
        digest: of its operators and their constants.
        under: what changes the digest of one and the same module: PyTorch's version, the traced input.
    """

    digest: str
    under: str


class Measures(NamedTuple):
    """What makes a trace a good one; every field but the last is a share in [0, 1].

    Attributes:
        shared: parameters that all tasks share, of all parameters outside the heads.
        pair_gated: shared weight entries (of parameters with two or more dimensions) that have both
            an out unit and an in unit.
        protected: shared entries that one task protects when each unit is on with probability 1/2
            (the expectation); 1/4 is ideal, 1 leaves no capacity after the first task.
        smallest_group: units of the smallest group; 0 without groups.
    """

    shared: float
    pair_gated: float
    protected: float
    smallest_group: int


@dataclass(frozen=True, eq=False)
class Wiring:
    """The static description of a module that trace() returns: immutable and hashable.

    Attributes:
        groups: number of units per group, named after the module that first produces them.
        params: every parameter by its first name in the module.
        buffers: names of the buffers that a training step changes; each task has its own.
        heads: the classifiers that each task has for itself.
        input: the gate on the input's features, if asked for.
        signature: what the module takes.
        output_shape: shape of the module's (first) output without its batch dimension.
        class_dims: for each tensor that the module returns in eval mode, the dimension that counts
            classes, the batch dimension included; None where there is none.
        output: the units of that output, for what is put behind the module.
        layers: the layers that only multiply and add, by their path.
        remembers: whether the module keeps in its attributes what it computed in eval mode.
        constants: buffers that never change and a digest of each; the trace relied on their numbers.
        computed: what the module computes with its parameters; None: not known.
        gated: the same with gates on the units that the module returns, for what puts a head behind
            them; None: this is what is meant.
        ungated: of such a wiring, the fingerprint of the one without these gates.
        fallbacks: operators that no rule covers and the place where each stands: their results are
            taken as ungated, and the parameters that feed them are per task.
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
        """SHA-256 over everything that gates and protects: equal wirings, equal fingerprints.

        What does not decide what a state means is not looked at: layers, what feeds parameters that
        are not shared, the output's units, and whether the module remembers. Nor is ``computed``, which
        depends on PyTorch's version.
        """

        def seen(units: Units | None) -> str:
            return "none" if units is None else digest(units.index)

        shared = self.shared
        params = [
            (
                n,
                p.shape,
                p.kind,
                p.gated,
                p.folded,
                seen(p.out_units),
                seen(p.in_units if n in shared else None),
            )
            for n, p in self.params.items()
        ]
        whole = (
            list(self.groups.items()),
            params,
            self.buffers,
            self.heads,
            seen(self.input),
            self.constants,
        )
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the (first) traced input without its batch dimension."""
        return self.signature.batched[0].shape if self.signature.leaves else ()

    @property
    def shared(self) -> dict[str, ParamWiring]:
        """The parameters that all tasks share, and that are protected."""
        return {name: param for name, param in self.params.items() if param.kind == "shared"}

    @property
    def unread(self) -> tuple[str, ...]:
        """The parameters that no output depends on."""
        return tuple(name for name, param in self.params.items() if param.kind == "unread")

    @cached_property
    def outputs(self) -> dict[str, Units]:
        """The layers whose output can be gated in the place of their rows: a (W x + b) = (a W) x + a b.

        Those whose weight and bias are gated by the same units, row by row; the units are shaped to
        broadcast with the output.
        """
        return {
            path: Units(rows.index.reshape(-1, *(1,) * (len(role.shape) - 2)), rows.group)
            for path, layer in self.layers.items()
            for role in [self.params[layer.params[0]]]
            if (rows := _rows([self.params[name] for name in layer.params])) is not None
        }

    @cached_property
    def measures(self) -> Measures:
        """Shares that tell a good trace from one that is merely sound."""
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
        """The groups, the per-task parameters, the measures and what fell back, as text."""
        measures = self.measures
        own = {name: param.shape for name, param in self.params.items() if param.kind == "task"}
        numbers = sum(torch.Size(shape).numel() for shape in own.values())
        tables = [n for n, shape in own.items() if sum(size > 1 for size in shape) > 1]
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
            f"per task    {len(own)} parameters of {numbers} numbers, {len(self.buffers)} buffers",
            *(f"  {name} {own[name]}" for name in tables),  # vectors, as of norms, go without saying
            f"fell back   {len(self.fallbacks)} operators",
        ]
        return "\n".join(lines + [f"  {place}" for place in self.fallbacks])

    def to(self, device: torch.device | str) -> Wiring:
        """The same wiring with its indices on ``device``."""

        def move(units: Units | None) -> Units | None:
            return None if units is None else units.to(device)

        params = {
            name: param._replace(out_units=move(param.out_units), in_units=move(param.in_units))
            for name, param in self.params.items()
        }
        gated = None if self.gated is None else self.gated.to(device)
        return replace(
            self, params=params, input=move(self.input), output=move(self.output), gated=gated
        )

    def lookup(self, values: Mapping[str, Tensor]) -> Callable[[Units], Tensor]:
        """A function from units to their values; ungated entries read 1 (True).

        Args:
            values: {group: (U,)}, gates, masks or anything else that there is one of per unit.

        Returns:
            A function that takes :class:`Units` to a tensor shaped like ``units.index``.
        """
        flat: list[Tensor] = []  # laid end to end only when some parameter needs it

        def look(units: Units) -> Tensor:
            if units.group is not None:
                return values[units.group].reshape(units.index.shape)
            if not flat:
                parts = [values[group] for group in self.groups]
                one = torch.ones_like(parts[0][:1]) if parts else torch.ones(1)
                flat.append(torch.cat([*parts, one]))
            return flat[0][units.index]  # OPEN is -1, the last element, which is one

        return look


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
    data = plain.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr((tensor.dtype, tuple(tensor.shape))).encode() + data).hexdigest()


def _index(units: Units | None, shape: tuple[int, ...]) -> Tensor:
    """The index of ``units``, small but with as many dimensions as ``shape``."""
    return units.index if units is not None else torch.full((1,) * len(shape), OPEN)


def _rows(roles: Sequence[ParamWiring]) -> Units | None:
    """The unit of each row, if the parameters of a layer agree on it."""
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
