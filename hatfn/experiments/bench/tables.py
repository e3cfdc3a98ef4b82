"""The tables of ``hatfn bench``: a row for each way to do the same work."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pandas as pd
import torch
from rich.table import Table

from hatfn.evaluation.usage import memory
from hatfn.experiments.bench.comparison import SCALE, Comparison, Target
from hatfn.experiments.bench.timing import Ratio, page_faults, paired, peak_memory
from hatfn.experiments.config import BenchConfig
from hatfn.experiments.markdown import grid

MIB = 2**20
"""The bytes of one MiB."""

COLUMNS = (
    "model", "what", "optimizer", "measured", "against", "ratio: median (quartiles)", "target", "",
    "ms", "peak MiB", "page faults",
)  # fmt: skip
"""The columns of the table; the last three have the numbers of both contenders."""

CHOICE = ("model", "what", "optimizer", "target", "ratio", "", "by")
"""The columns of the table of targets."""

BEST = "Targets, each with the best way to do the work"
"""The title of the table that says what to choose."""

STATE = "Memory of a state, in MiB"
"""The title of the table of memory."""

HOW = """\
Each of {rounds} rounds runs every way to do the same work, in turn. A ratio compares the times of
two ways in one round (their throughputs, if the row says so); the table has its median over the
rounds and its quartiles. `ms` and `peak MiB` give the numbers of both ways, the measured one first.
A peak is the most memory of one step, on top of the memory before it; a page fault is a page of
memory that the system hands out in a loop of steps. A `donated` step may use the memory of the
state that it is given. In the states every task is
learned, and each task has the same share of units on, chosen at random. A training step trains the
last task, with the others protected, at scale {scale:.0f}. Plain torch uses the optimizer of
torch.optim in the usual way; the learner uses that of torchopt, or torch's own, fused. `update
compiled` and `step compiled` are steps of `build(compile="update")` and `build(compile="step")`;
`module compiled` is plain torch with `torch.compile`. All of these are compared with the same
reference, which is not compiled. The first table has the best way for each target."""
"""The description of the tables in the Markdown file."""


class Row(NamedTuple):
    """One contender against the reference of its comparison.

    Attributes:
        comparison: the work that was compared.
        measured: the name of the contender.
        against: the name of the reference.
        ratio: the ratio of their times, or of their throughputs.
        target: the target of the ratio, or None.
        seconds: the median seconds of a step, of the contender and of the reference.
        peaks: the peak bytes of a step on top of the memory before it, of both.
        faults: the pages that the system hands out per step, of both.
    """

    comparison: Comparison
    measured: str
    against: str
    ratio: Ratio
    target: Target | None
    seconds: tuple[float, float]
    peaks: tuple[int, int]
    faults: tuple[float, float]


class Bench(NamedTuple):
    """All measurements so far.

    Attributes:
        rows: the rows of the table of ratios.
        memory: {(model, optimizer): bytes of each part of the state}.
    """

    rows: list[Row]
    memory: dict[tuple[str, str], pd.Series[int]]


def add(
    bench: Bench, comparison: Comparison, rounds: Iterable[Mapping[str, float]], device: torch.device
) -> Bench:
    """The measurements, with the rows of another comparison.

    Args:
        bench: the measurements so far.
        comparison: the comparison.
        rounds: {contender: seconds} of each round, as
            :func:`~hatfn.experiments.bench.timing.interleaved` yields them.
        device: where it computes.
    """
    names = [contender.name for contender in comparison.contenders]
    measured = list(rounds)
    times = {name: [seconds[name] for seconds in measured] for name in names}
    peaks = {contender.name: peak_memory(contender, device) for contender in comparison.contenders}
    faults = {contender.name: page_faults(contender) for contender in comparison.contenders}
    against, *others = names

    def row(name: str) -> Row:
        pair = (name, against)
        first, second = reversed(pair) if comparison.throughput else pair
        return Row(
            comparison._replace(contenders=[], state=None),  # a row must not keep models in memory
            name,
            against,
            paired(times[first], times[second]),
            comparison.targets.get(name),
            (median(times[name]), median(times[against])),
            (peaks[name], peaks[against]),
            (faults[name], faults[against]),
        )

    sizes = (
        {}
        if comparison.state is None
        else {(comparison.model, comparison.optimizer): memory(comparison.state)}
    )
    return Bench([*bench.rows, *map(row, others)], bench.memory | sizes)


def check(config: BenchConfig) -> None:
    """Refuse settings that cannot be run.

    Raises:
        ValueError: no rounds, no threads, or a device that does not exist.
    """
    for name, value in (("rounds", config.rounds), ("threads", config.threads)):
        if value is not None and value < 1:
            raise ValueError(f"bench: {name}={value}. Expected at least 1.")
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"bench: device={config.device!r}, but torch finds no GPU. Expected a device that "
            f"exists: leave --device out for the CPU."
        )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best(rows: Iterable[Row]) -> list[Row]:
    """For each target, the row with the best ratio among all rows that have the target."""
    by_target: dict[tuple[str, str, str, Target], list[Row]] = {}
    for row in rows:
        if row.target is not None:
            work = row.comparison.model, row.comparison.what, row.comparison.plain, row.target
            by_target.setdefault(work, []).append(row)
    return [
        (max if target.least else min)(ways, key=lambda row: row.ratio.median)
        for (*_, target), ways in by_target.items()
    ]


def met(row: Row) -> str:
    """Whether a row's target is met, in a word; empty without a target."""
    return "" if row.target is None else "met" if row.target.met(row.ratio.median) else "missed"


def choice(row: Row) -> tuple[str, ...]:
    """A target and the best way, as text."""
    comparison, way = row.comparison, row.measured
    way += f", {comparison.optimizer}" if comparison.optimizer else ""
    ratio = f"{row.ratio.median:.2f}"
    return comparison.model, comparison.what, comparison.plain, str(row.target), ratio, met(row), way


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    comparison, target = row.comparison, row.target
    milliseconds, peaks, faults = (
        " / ".join(form.format(value / unit) for value in pair)
        for form, unit, pair in (
            ("{:.2f}", 1e-3, row.seconds), ("{:.1f}", MIB, row.peaks), ("{:.0f}", 1, row.faults),
        )
    )  # fmt: skip
    return (
        comparison.model, comparison.what, comparison.optimizer, row.measured, row.against,
        str(row.ratio), "" if target is None else str(target), met(row), milliseconds, peaks, faults,
    )  # fmt: skip


def sheets(bench: Bench) -> dict[str, list[tuple[str, ...]]]:
    """The tables of targets, ratios and memory as text, {title: head and rows}.

    The tables of targets and memory are left out if they are empty.
    """
    found = {}
    if chosen := best(bench.rows):
        found[BEST] = [CHOICE, *map(choice, chosen)]
    found["Ratios"] = [COLUMNS, *map(cells, bench.rows)]
    for key, parts in bench.memory.items():
        table = found.setdefault(STATE, [("model", "optimizer", *parts.index, "sum", "sum / params")])
        sizes = (f"{size / MIB:.2f}" for size in (*parts, parts.sum()))
        table.append((*key, *sizes, f"{parts.sum() / parts['params']:.2f}"))
    return found


def verdict(rows: Sequence[Row]) -> str:
    """How many targets are met, each with the best way."""
    judged = [met(row) for row in best(rows)]
    return f"Targets met: {judged.count('met')} of {len(judged)}."


def tables(bench: Bench) -> list[Table]:
    """The tables for the console."""
    made = []
    for title, (head, *rows) in sheets(bench).items():
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(head):
            width = max(len(cell) for cell in (name, *(row[index] for row in rows)))
            table.add_column(name, min_width=width)  # a narrow terminal breaks lines, never numbers
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def markdown(bench: Bench, config: BenchConfig) -> str:
    """The tables in Markdown, with the command, the machine and a description."""
    text = [
        f"# hatfn against plain torch\n\nMade by `{command(config)}` on {machine(config.device)}.",
        HOW.format(rounds=config.rounds, scale=SCALE),
        verdict(bench.rows),
        *(f"## {title}\n\n{grid(rows)}" for title, rows in sheets(bench).items()),
    ]
    return "\n\n".join(text) + "\n"


def command(config: BenchConfig) -> str:
    """The command that makes the same table, with all settings that differ from the defaults."""
    parts = ["hatfn bench"]
    for setting in fields(config):
        value = getattr(config, setting.name)
        if value is False:
            parts.append(f"--no-{setting.name}")
        elif value != setting.default:
            values = value if isinstance(value, tuple) else (value,)
            shown = (v.name if isinstance(v, Path) else str(v) for v in values)
            parts.append(f"--{setting.name} {' '.join(shown)}")
    return " ".join(parts)


def machine(device: str) -> str:
    """Processor, threads and versions, but not the name of the machine."""
    place = torch.device(device)
    processor = torch.cuda.get_device_name(place) if place.type == "cuda" else _processor()
    version = torch.__version__.partition("+")[0]
    count = torch.get_num_threads()
    return f"{processor}, {count} thread{'s' * (count > 1)}, torch {version}"


def _processor() -> str:
    """The model of the CPU: on Linux from a file, on other systems from Python."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
