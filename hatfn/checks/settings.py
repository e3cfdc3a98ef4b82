"""Checks of the arguments of build(), adopt() and grow()."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hatfn.checks.values import (
    check_count,
    check_integer,
    check_kind,
    check_list,
    check_real,
)
from hatfn.numerics.digests import digest
from hatfn.wiring import Wiring


def check_wiring(module: Any, wiring: Any, where: str = "build") -> None:
    """Check that the wiring belongs to the module."""
    check_kind(where, "module", module, nn.Module, "the nn.Module that was traced")
    check_kind(where, "wiring", wiring, Wiring, "what hatfn.trace(module, x) gives")
    have = {name: tuple(param.shape) for name, param in module.named_parameters()}
    want = {name: param.shape for name, param in wiring.params.items()}
    if differ := _difference(have, want, "wiring"):
        raise ValueError(
            f"{where}: the wiring is of another module; {differ}. Trace this module: "
            f"hatfn.trace(module, x)."
        )
    odd = [name for name, param in module.named_parameters() if not param.is_floating_point()]
    if odd:
        raise TypeError(
            f"{where}: parameter {odd[0]} is {module.get_parameter(odd[0]).dtype}. Expected parameters "
            f"of floating-point numbers: register this one as a buffer."
        )
    _check_constants(where, dict(module.named_buffers()), wiring)


def check_adopted(
    module: Any, wiring: Wiring, own: Mapping[str, Tensor], heads: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of a module of the same architecture, with the types and devices of the learner's.

    Args:
        module: a module of the same architecture.
        wiring: the wiring of the learner.
        own: {name: tensor}, the parameters and buffers of the learner.
        heads: the names of the heads' parameters; their first dimension, the classes, may differ.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"adopt: module is a {type(module).__name__}. Expected an nn.Module with the values to "
            f"start from: hatfn.adopt(hat, timm.create_model(name, pretrained=True))."
        )
    given = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for prefix in ("body.", "body.body."):  # modules that export puts around a module
        inner = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
        given = inner if inner.keys() == own.keys() else given

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return {n: ("classes", *shape[1:]) if n in heads else shape for n, shape in found.items()}

    if differ := _difference(shapes(given), shapes(own), "learner"):
        raise ValueError(
            f"adopt: the module is of another architecture; {differ}. Expected the architecture of the "
            f"module that was traced; only its numbers and the classes of its heads may differ."
        )
    values = {name: tensor.detach().to(own[name]) for name, tensor in given.items()}
    _check_constants("adopt", values, wiring)
    return values


def _difference(
    have: Mapping[str, tuple[object, ...]], want: Mapping[str, tuple[object, ...]], other: str
) -> str | None:
    """The first difference in shape between a module and something else, in words; None if none."""
    for name, _ in sorted(set(have.items()) ^ set(want.items()), key=lambda item: item[0]):
        return f"they differ in {name} (module {have.get(name)}, {other} {want.get(name)})"
    return None


def _check_constants(where: str, buffers: Mapping[str, Tensor], wiring: Wiring) -> None:
    """Check that constant buffers have the values that they had when the module was traced."""
    changed = [name for name, known in wiring.constants if digest(buffers[name]) != known]
    if changed:
        raise ValueError(
            f"{where}: buffer {changed[0]} has other values than when the wiring was traced, and the "
            f"wiring depends on them. Trace the module as it is now: hatfn.trace(module, x)."
        )


def check_classes(classes: Any, num_tasks: int | None, wiring: Wiring, where: str = "build") -> int:
    """The number of tasks, from one class count per task or from num_tasks."""
    if classes is None:
        if wiring.heads:
            raise ValueError(
                f"{where}: classes=None, but {wiring.heads[0].weight} was traced as a head, and every "
                f"task has a head of its own. Expected classes=[2, 2]; or keep the module's own "
                f"output: hatfn.trace(module, x, head=False)."
            )
        return 1 if num_tasks is None else check_count(where, "num_tasks", num_tasks)
    check_list(where, "classes", classes, "one count per task, such as [2, 2, 2]")
    counts = [check_integer(where, "classes", count) for count in classes]
    if not counts or min(counts) < 1 or num_tasks not in (None, len(counts)):
        raise ValueError(
            f"{where}: classes={classes!r}, num_tasks={num_tasks}. Expected one positive count per "
            f"task, such as [2, 2, 2], and no num_tasks."
        )
    if not wiring.heads and "head.weight" in wiring.params:
        raise ValueError(
            "build: classes are given and the module has a layer 'head', but no head was traced. Write "
            "hatfn.trace(module, x, head='head') to give every task a head of its own."
        )
    if not wiring.heads and len(wiring.output_shape) != 1:
        raise ValueError(
            f"build: the module returns (B, {', '.join(map(str, wiring.output_shape))}), and no head "
            f"was traced. Expected features (B, D), so that a head can follow: pool or flatten them, "
            f"or name the classifier: hatfn.trace(module, x, head='fc')."
        )
    return len(counts)


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "s_max": (lambda value: value > 1, "above 1"),
    "sparsity": (lambda value: value >= 0, "of at least 0"),
    "quota": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "clamp": (lambda value: value > 0, "above 0"),
    "max_norm": (lambda value: value > 0, "above 0, or None"),
    "lr": (lambda value: value >= 0, "of at least 0"),
    "compensation": (lambda value: value > 0, "above 0"),
}


def check_number(where: str, name: str, value: Any) -> float:
    """A setting as a float, after a check that it is in its range."""
    right, expected = _RANGES[name]
    check_real(
        where, name, value, lambda v: math.isfinite(v) and right(v), f"that is finite and {expected}"
    )
    return float(value)


def check_each(name: str, value: Any, tasks: int) -> tuple[float, ...]:
    """The values of a setting, one per task, from one number for all tasks or from a list."""
    numbers = [value] * tasks if isinstance(value, int | float) else value
    check_list("build", name, numbers, "a number, or a list of one for each task")
    values = tuple(check_number("build", name, number) for number in numbers)
    if len(values) != tasks:
        raise ValueError(
            f"build: {name} has {len(values)} numbers for {tasks} tasks. Expected one number for all, "
            f"or one for each."
        )
    return values


def check_choice(name: str, value: Any, choices: Sequence[str | None], where: str = "build") -> None:
    """Check that a setting is one of its possible names."""
    if value not in choices:
        raise ValueError(f"{where}: {name}={value!r}. Expected one of {', '.join(map(repr, choices))}.")


def check_more(classes: Any, num_tasks: int | None, known: Sequence[int] | None, wiring: Wiring) -> int:
    """The number of tasks to add; it is given as for build(), by classes or by num_tasks."""
    if (classes is None) != (known is None):
        right = "num_tasks=1" if known is None else "classes=[2]"
        had = "no classes" if known is None else f"classes={list(known)}"
        raise ValueError(
            f"grow: classes={classes!r}, but the learner was built with {had}. Write "
            f"hatfn.grow(hat, state, {right})."
        )
    return check_classes(classes, num_tasks, wiring, "grow")


def check_checkpointing(where: str, recomputes: bool) -> None:
    """Refuse a module that checkpoints activations: PyTorch cannot batch or derive its gradient."""
    if recomputes:
        raise ValueError(
            f"{where}: the module checkpoints activations, which works neither with replicas nor under "
            f"vmap nor if the step is differentiated. Turn it off: build without "
            f"grad_checkpointing=True, from a module after module.set_grad_checkpointing(False)."
        )
