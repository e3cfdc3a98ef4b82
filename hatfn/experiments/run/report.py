"""Show a result as tables on the console, or as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hatfn.experiments.run.result import Result, mean


def result_dict(result: Result) -> dict[str, Any]:
    """A result as JSON; null for a task that was not yet learned."""
    return {
        "accuracy_matrix": _nullable(result.accuracy_matrix),
        "class_incremental_matrix": _nullable(result.class_incremental),
        "task_inference": result.task_inference.tolist(),
        "acc": result.acc,
        "class_incremental": result.class_acc,
        "bwt": None if math.isnan(result.bwt) else result.bwt,
        "forgetting": result.forgetting,
        "drift": result.max_drift,
        "free_capacity": result.free_units[-1],
        "free_weights": result.free_weights[-1],
        "closings": [closing._asdict() for closing in result.closings],
        "memory": {str(part): int(size) for part, size in result.memory.items()},
        "seconds": result.seconds,
        "tasks": result.names,
    }


def _nullable(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(a) else a for a in row] for row in matrix.tolist()]


def show(results: Sequence[Result], console: Console) -> None:
    """Print the accuracy matrix, the summary numbers, mask use and free capacity.

    For several seeds, it prints means, and the standard deviation of each summary number.
    """
    result = mean(results)

    def number(pick: Callable[[Result], float], form: str) -> str:
        values = [pick(one) for one in results]
        if math.isnan(values[0]):  # tasks that are trained together have no backward transfer
            return "-"
        average = format(float(np.mean(values)), form)
        if len(values) == 1:
            return average
        return f"{average} \u00b1 {format(float(np.std(values, ddof=1)), form.lstrip('+'))}"

    matrix = Table(title="Accuracy (row: after task i, column: on task j)")
    matrix.add_column("after", min_width=max(len(name) + 3 for name in result.names))
    for index in range(len(result.names)):
        matrix.add_column(str(index), justify="right", min_width=6)
    for index, row in enumerate(result.accuracy_matrix):
        if np.isnan(row).all():  # tasks trained together have one row
            continue
        cells = ["" if np.isnan(a) else f"{a:.4f}" for a in row]
        matrix.add_row(f"{index} {result.names[index]}", *cells)
    matrix.add_section()
    inferred = {"task inferred": result.task_inference, "and class": result.class_incremental[-1]}
    for name, values in inferred.items():
        matrix.add_row(name, *(f"{a:.4f}" for a in values))
    console.print(matrix, soft_wrap=True)  # a narrow terminal breaks lines, never numbers

    masks = Table(title="Mask use (share of a group's units) and free capacity")
    masks.add_column(
        "group", min_width=max(len(str(group)) for group in ["group", *result.usage.index])
    )
    for column in result.usage.columns:
        masks.add_column(str(column), justify="right", min_width=5)
    for group, row in result.usage.iterrows():
        *shares, units = row
        masks.add_row(str(group), *(f"{share:.2f}" for share in shares), f"{units:.0f}")
    console.print(masks, soft_wrap=True)

    numbers = Table.grid(padding=(0, 2))
    rows = {
        "ACC": (lambda r: r.acc, ".4f", "mean accuracy on all tasks at the end"),
        "class-inc.": (lambda r: r.class_acc, ".4f", "the same with the task inferred"),
        "BWT": (lambda r: r.bwt, "+.4f", "backward transfer"),
        "forgetting": (lambda r: r.forgetting, ".4f", "mean loss of accuracy since each task's best"),
        "free": (lambda r: r.free_weights[-1], ".1%", "shared weights that no task uses"),
        "gap": (
            lambda r: max(c.gap for c in r.closings),
            "+.4f",
            "largest rise of a task's loss when its gates become binary",
        ),
        "undecided": (
            lambda r: sum(c.undecided for c in r.closings),
            ".0f",
            "gates that were not binary at the end of training",
        ),
    }
    for name, (pick, form, meaning) in rows.items():
        numbers.add_row(name, number(pick, form), meaning)
    numbers.add_row("drift", repr(result.max_drift), "largest change of an old task's logit")
    sizes = ", ".join(f"{part} {size / 2**20:.2f}" for part, size in result.memory.items())
    numbers.add_row("state", f"{result.memory.sum() / 2**20:.2f}", f"MiB: {sizes}")
    numbers.add_row("seconds", f"{result.seconds:.1f}", "wall time")
    if len(results) > 1:
        numbers.add_row("seeds", str(len(results)), "mean \u00b1 standard deviation over them")
    console.print(numbers)
