"""A wiring in words: ``b < a0 . a2`` is gated by the group b and reads a's first and third unit."""

from __future__ import annotations

from typing import Any

import torch
from nets import Fn
from torch import Tensor, nn

import hatfn
from hatfn.wiring import ParamWiring, Units, Wiring


def units_told(wiring: Wiring, units: Units | None, usual: int) -> str:
    """The unit of every entry, ``.`` for an entry without a unit; for a whole group, its name alone.

    A label that varies along one dimension becomes a list, with ``@`` and the dimension if this is not
    the usual one.
    """
    if units is None:
        return "."
    names = [f"{group}{i}" for group, count in wiring.groups.items() for i in range(count)] + ["."]
    varied = [dim for dim, size in enumerate(units.index.shape) if size > 1]
    if len(varied) > 1:
        return _nested(units.index.squeeze(), names)
    listed = units.index.flatten().tolist()
    text = " ".join(names[unit] for unit in listed)
    for group, count in wiring.groups.items():
        if text == " ".join(f"{group}{i}" for i in range(count)):
            assert units.group == group, "a whole group is known as one"
            text = group
    return text + "".join(f"@{dim}" for dim in varied if dim != usual)


def _nested(index: Tensor, names: list[str]) -> str:
    if not index.dim():
        return names[index]
    parts = [_nested(part, names) for part in index]
    return f"[{' '.join(parts)}]"


def role_told(wiring: Wiring, role: ParamWiring) -> str:
    """The kind, unless it is shared; the out units; the in units; further actions."""
    parts = [role.kind] if role.kind != "shared" else []
    parts += [units_told(wiring, role.out_units, 0)] if role.out_units is not None else []
    parts += ["<", units_told(wiring, role.in_units, 1)] if role.in_units is not None else []
    parts += ["deferred"] if not role.gated else []
    return " ".join(parts + (["folded"] if role.folded else []))


def told(wiring: Wiring) -> dict[str, str]:
    """A wiring in words: every parameter, the output as ``y``, and the groups."""
    roles = {name: role_told(wiring, role) for name, role in wiring.params.items()}
    groups = " ".join(f"{name}:{count}" for name, count in wiring.groups.items())
    return {**roles, "y": units_told(wiring, wiring.output, 0), "groups": groups}


def traced(module: nn.Module, x: Tensor, **settings: Any) -> dict[str, str]:
    """A traced wiring in words; the units of the output are gated, so that they show."""
    return told(hatfn.trace(module, x, **({"output_gate": True, "head": False} | settings)))


ROWS, TOKENS, IMAGES, LINES, INDICES = (2, 3), (2, 5, 3), (2, 1, 4, 4), (2, 1, 4), ()
"""The shapes of inputs; () stands for indices."""


def said(
    shape: tuple[int, ...], function, parts: dict[str, nn.Module | Tensor], **settings
) -> dict[str, str]:
    """The wiring, in words, of a function of layers and tensors.

    Tensors are parameters, or buffers if their name is k.
    """
    own = {n: nn.Parameter(p) if isinstance(p, Tensor) else p for n, p in parts.items() if n != "k"}
    module = Fn(function, **own)
    if "k" in parts:
        module.register_buffer("k", parts["k"])
    x = torch.randn(shape) if shape else torch.tensor([[0, 1, 2], [3, 4, 0]])
    return traced(module, x, **settings)


def chain(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(m.a(x))
