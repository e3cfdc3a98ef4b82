"""What a run leaves behind: tables on the console, numbers, a state and plots in its folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hatfn import checkpoint
from hatfn.experiments import plots
from hatfn.experiments.config import RunConfig
from hatfn.experiments.result import Learned, Result, mean
from hatfn.experiments.run import Run, Step


class RunFolder:
    """The files of one run, written as it goes.

    config.json: the settings. metrics.jsonl: a line per step, and one per finished task with its
    accuracies and drift. state.safetensors: the learner's state after the last finished task; of
    several seeds one file each.
    result.json: what was measured in the end. Plots as PNG.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = config.folder
        self.path.mkdir(parents=True, exist_ok=True)
        self.steps: list[Step] = []
        self.config = json.loads(json.dumps(asdict(config), default=str))
        self._write("config.json", json.dumps(self.config, indent=2))
        self._write("metrics.jsonl", "")

    def log(self, run: Run, event: Step | Learned) -> None:
        """Keep a step; at the end of a task write its steps, its measures and the state."""
        if isinstance(event, Step):
            self.steps.append(event)
            return
        lines = [step._asdict() for step in self.steps if step.task == event.task]
        with (self.path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in [*lines, event._asdict()])
        for seed, state in zip(run.seeds, run.states, strict=True):
            meta = {"config": {**self.config, "seed": seed, "seeds": 1}, "tasks": event.task + 1}
            name = "state.safetensors" if len(run.seeds) == 1 else f"state-{seed}.safetensors"
            checkpoint.save(self.path / name, state, run.hat, meta)

    def finish(self, run: Run) -> None:
        """Write the result and the plots; of several seeds the mean, and the result of each."""
        result, whole = run.result, result_dict(run.result)
        if len(run.seeds) > 1:
            each = zip(run.seeds, run.results, strict=True)
            whole["seeds"] = {str(seed): result_dict(one) for seed, one in each}
        self._write("result.json", json.dumps(whole, indent=2))
        plots.accuracy_matrix(result, self.path / "accuracy_matrix.png")
        plots.mask_use(result, self.path / "mask_use.png")
        plots.capacity(result, self.path / "capacity.png")
        plots.training(self.steps, self.path / "training.png")

    def _write(self, name: str, text: str) -> None:
        scratch = self.path / f".{name}"
        scratch.write_text(text)
        os.replace(scratch, self.path / name)


def result_dict(result: Result) -> dict[str, Any]:
    """A result as JSON holds it; null where a task was not yet learned."""
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

    Of several seeds the means, and the standard deviation of each summary number.
    """
    result = mean(results)

    def number(pick: Callable[[Result], float], form: str) -> str:
        values = [pick(one) for one in results]
        if math.isnan(values[0]):  # trained together, no task came after another
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
        "class-inc.": (lambda r: r.class_acc, ".4f", "the same with the task inferred too"),
        "BWT": (lambda r: r.bwt, "+.4f", "backward transfer"),
        "forgetting": (lambda r: r.forgetting, ".4f", "mean loss since each task's best"),
        "free": (lambda r: r.free_weights[-1], ".1%", "shared weights that no task needs"),
        "gap": (
            lambda r: max(c.gap for c in r.closings),
            "+.4f",
            "serving adds to a task's loss, at most",
        ),
        "undecided": (
            lambda r: sum(c.undecided for c in r.closings),
            ".0f",
            "gates that were not binary",
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
