"""``hatfn bench``: what each way of doing the same work costs, as a row of one table."""

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
from hatfn.experiments.bench.cases import SCALE, Comparison, Target
from hatfn.experiments.bench.timing import Ratio, paired, peak_memory
from hatfn.experiments.config import BenchConfig
from hatfn.experiments.markdown import grid

MIB = 2**20
"""Bytes."""

COLUMNS = (
    "model", "what", "optimiser", "measured", "against", "ratio: median (quartiles)", "target", "",
    "ms", "peak MiB",
)  # fmt: skip
"""Of the table; the last two give both contenders."""

CHOICE = ("model", "what", "optimiser", "target", "ratio", "", "by")
"""Columns of the table of targets."""

BEST = "Targets, each by the best way to the work"
"""Title of the table that says what to choose."""

STATE = "What a state holds, in MiB"
"""Title of the table of memory."""

HOW = """\
Each of {rounds} rounds runs every way to do the same work, in turn. A ratio is that of the times of the
two in one round (of their throughputs, where the row says so): the median over the rounds, and the
quartiles. `ms` and `peak MiB` give both, the measured one first; a peak is what one step holds at most,
on top of what was held before it. The states have every task learned, each with the same share of units
on at random; a training step trains the last of them, the others protected, at scale {scale:.0f}.
Plain torch steps by the optimiser of torch.optim as everybody calls it, the learner by torchopt's or by
torch's own, fused. `update compiled` and `step compiled` are steps of `build(compile="update")` and
`"step"`, measured like the others against what is not compiled, as is plain torch with its `module
compiled`, by `torch.compile`. The first table has for each target the best way that there is."""
"""What the table says, for those who read it."""


class Row(NamedTuple):
    """One contender against the reference of its comparison.

    Attributes:
        comparison: what was done.
        measured: name of the contender.
        against: name of the reference.
        ratio: of their times, or of their throughputs.
        target: what was asked for, if anything.
        seconds: of a step, median: the contender's and the reference's.
        peaks: bytes that a step needs on top of what is there before it, of both.
    """

    comparison: Comparison
    measured: str
    against: str
    ratio: Ratio
    target: Target | None
    seconds: tuple[float, float]
    peaks: tuple[int, int]


class Bench(NamedTuple):
    """What has been measured so far.

    Attributes:
        rows: of the table of ratios.
        memory: {(model, optimiser): bytes of each part of the state}.
    """

    rows: list[Row]
    memory: dict[tuple[str, str], pd.Series[int]]


def add(
    bench: Bench, comparison: Comparison, rounds: Iterable[Mapping[str, float]], device: torch.device
) -> Bench:
    """The bench with a comparison's rows.

    Args:
        bench: so far.
        comparison: what is compared.
        rounds: {contender: seconds} of each round, as
            :func:`~hatfn.experiments.bench.timing.interleaved` yields them.
        device: where it computes.
    """
    names = [contender.name for contender in comparison.contenders]
    every = list(rounds)
    times = {name: [seconds[name] for seconds in every] for name in names}
    peaks = {contender.name: peak_memory(contender, device) for contender in comparison.contenders}
    against, *others = names

    def row(name: str) -> Row:
        pair = (name, against)
        first, second = reversed(pair) if comparison.throughput else pair
        return Row(
            comparison._replace(contenders=[], state=None),  # a row outlives the models
            name,
            against,
            paired(times[first], times[second]),
            comparison.targets.get(name),
            (median(times[name]), median(times[against])),
            (peaks[name], peaks[against]),
        )

    held = (
        {}
        if comparison.state is None
        else {(comparison.model, comparison.optimizer): memory(comparison.state)}
    )
    return Bench([*bench.rows, *map(row, others)], bench.memory | held)


def check(config: BenchConfig) -> None:
    """Refuse settings that cannot be run.

    Raises:
        ValueError: no rounds, no threads, or a device that is not there.
    """
    for name, value in (("rounds", config.rounds), ("threads", config.threads)):
        if value is not None and value < 1:
            raise ValueError(f"bench: {name}={value}. Expected at least 1.")
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"bench: device={config.device!r}, but torch finds no GPU. Expected a device that is "
            f"there: leave --device out for the CPU."
        )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads, and put the number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best(rows: Iterable[Row]) -> list[Row]:
    """For each target the one way, of those that it is asked of, that comes nearest or does best."""
    asked: dict[tuple[str, str, str, Target], list[Row]] = {}
    for row in rows:
        if row.target is not None:
            work = row.comparison.model, row.comparison.what, row.comparison.plain, row.target
            asked.setdefault(work, []).append(row)
    return [
        (max if target.least else min)(ways, key=lambda row: row.ratio.median)
        for (*_, target), ways in asked.items()
    ]


def met(row: Row) -> str:
    """Whether a row's target is met, in a word; empty without one."""
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
    milliseconds, peaks = (
        " / ".join(form.format(value / unit) for value in pair)
        for form, unit, pair in (("{:.2f}", 1e-3, row.seconds), ("{:.1f}", MIB, row.peaks))
    )
    return (
        comparison.model, comparison.what, comparison.optimizer, row.measured, row.against,
        str(row.ratio), "" if target is None else str(target), met(row), milliseconds, peaks,
    )  # fmt: skip


def sheets(bench: Bench) -> dict[str, list[tuple[str, ...]]]:
    """The tables of targets, ratios and memory as text, {title: head and rows}; none that is empty."""
    found = {}
    if chosen := best(bench.rows):
        found[BEST] = [CHOICE, *map(choice, chosen)]
    found["Ratios"] = [COLUMNS, *map(cells, bench.rows)]
    for key, parts in bench.memory.items():
        table = found.setdefault(STATE, [("model", "optimiser", *parts.index, "sum", "sum / params")])
        sizes = (f"{size / MIB:.2f}" for size in (*parts, parts.sum()))
        table.append((*key, *sizes, f"{parts.sum() / parts['params']:.2f}"))
    return found


def verdict(rows: Sequence[Row]) -> str:
    """How many targets are met, each by the best way."""
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
    """The same tables for a file, with how and on what they were made."""
    text = [
        f"# hatfn against plain torch\n\nMade by `{command(config)}` on {machine(config.device)}.",
        HOW.format(rounds=config.rounds, scale=SCALE),
        verdict(bench.rows),
        *(f"## {title}\n\n{grid(rows)}" for title, rows in sheets(bench).items()),
    ]
    return "\n\n".join(text) + "\n"


def command(config: BenchConfig) -> str:
    """The command that makes the same table: the settings that are not the defaults."""
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
    """Processor, threads and versions; nothing that names the machine."""
    place = torch.device(device)
    processor = torch.cuda.get_device_name(place) if place.type == "cuda" else _processor()
    version = torch.__version__.partition("+")[0]
    count = torch.get_num_threads()
    return f"{processor}, {count} thread{'s' * (count > 1)}, torch {version}"


def _processor() -> str:
    """The model of the CPU: Linux keeps it in a file, other systems tell Python."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
