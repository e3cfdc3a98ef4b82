"""Rows of a table of traces: a model is built, traced, verified and judged."""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from hatfn.experiments.markdown import grid
from hatfn.testing import verify_wiring
from hatfn.tracing import trace
from hatfn.wiring import OPEN, Measures, Wiring

if sys.platform != "win32":
    import resource


class Sample(NamedTuple):
    """A model, and inputs that it accepts.

    Attributes:
        module: the model.
        x: the inputs, as :func:`hatfn.trace` takes them.
        built: how they were made, in words.
        unbatched: paths of the inputs that do not lead with the batch.
        head: the classifier, where trace is not to look for it.
    """

    module: nn.Module
    x: Any
    built: str = ""
    unbatched: tuple[str, ...] = ()
    head: str | Literal[False] | None = None


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    Attributes:
        source: where the model comes from: a library, or a family of timm.
        model: its name there.
        built: how it was made.
        parameters: the number of parameters.
        measures: the measures of the wiring; None if there is no wiring.
        heads: the number of classifiers found.
        seconds: wall time of the trace.
        fell_back: operators without a rule.
        untested: parameters that no positive control reached; None if not verified.
        error: the error, or empty.
        reason: what keeps the wiring from a target, or empty.
    """

    source: str
    model: str
    built: str = ""
    parameters: int = 0
    measures: Measures | None = None
    heads: int = 0
    seconds: float = 0.0
    fell_back: tuple[str, ...] = ()
    untested: tuple[str, ...] | None = None
    error: str = ""
    reason: str = ""


class Page(NamedTuple):
    """What a page says besides its rows.

    Attributes:
        title: its heading.
        made: the command that makes it.
        source: the heading of the first column.
        versions: of the libraries.
        notes: {source or model: the reason why it misses a target}; others get ``Entry.reason``.
    """

    title: str
    made: str
    source: str
    versions: str
    notes: Mapping[str, str]


class Traced(NamedTuple):
    """A wiring, and the time and memory of its trace.

    Attributes:
        wiring: the wiring of the module.
        seconds: wall time of the trace.
        memory: by how much the peak memory of the process grew, as a multiple of the parameters' bytes.
    """

    wiring: Wiring
    seconds: float
    memory: float


def measured(sample: Sample) -> Traced:
    """Trace a module, and measure time and memory."""
    size = sum(p.numel() * p.element_size() for p in sample.module.parameters())
    before, start = _peak(), time.perf_counter()
    wiring = trace(sample.module, sample.x, sample.head, unbatched=sample.unbatched)
    return Traced(wiring, time.perf_counter() - start, (_peak() - before) / size)


def _peak() -> int:
    """The peak memory of this process so far, in bytes; 0 if it is not known."""
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def examine(source: str, name: str, make: Callable[[], Sample], verify: bool) -> Entry:
    """Build and trace a model; with ``verify``, also verify the wiring by perturbation."""
    torch.manual_seed(0)
    try:
        sample = make()
        wiring, seconds, _ = measured(sample)
    except Exception as error:  # an error of one model must not end the sweep
        return Entry(source, name, error=_in_a_line(error))
    untested, failed = None, ""
    try:
        if verify:
            untested = verify_wiring(sample.module, wiring, sample.x, draws=2).untested
    except Exception as error:
        failed = _in_a_line(error)
    count = sum(p.numel() for p in sample.module.parameters())
    return Entry(
        source, name, sample.built, count, wiring.measures, len(wiring.heads), seconds,
        wiring.fallbacks, untested, failed, reason(wiring),
    )  # fmt: skip


def _in_a_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def reason(wiring: Wiring, most: int = 3) -> str:
    """The parameters that keep a wiring from its targets, the largest first; empty if it meets them."""
    sizes = {name: torch.Size(p.shape).numel() for name, p in wiring.params.items()}
    own = {name: sizes[name] for name, p in wiring.params.items() if p.kind == "task"}
    shared = {name: p for name, p in wiring.shared.items() if len(p.shape) > 1}
    half = {
        name: sizes[name]
        for name, p in shared.items()
        if any(
            units is None or bool((units.index == OPEN).any()) for units in (p.out_units, p.in_units)
        )
    }
    whole = sum(n for name, n in sizes.items() if wiring.params[name].kind in ("task", "shared"))
    weights = sum(sizes[name] for name in shared)

    def listed(found: Mapping[str, int], total: int) -> str:
        largest = sorted(found, key=lambda name: found[name], reverse=True)[:most]
        more = len(found) - len(largest)
        text = ", ".join(f"{name} {found[name] / max(total, 1):.1%}" for name in largest)
        return text + (f" and {more} more" if more else "")

    m, parts = wiring.measures, []
    if m.shared < 0.95:
        parts.append(f"a copy for each task: {listed(own, whole)} of the parameters")
    if m.pair_gated < 0.9 or m.protected > 0.3:
        parts.append(f"a gate at one end only: {listed(half, weights)} of the shared weights")
    return "; ".join(parts)


def sweep(
    row: Callable[[str, str, bool], Entry],
    chosen: Sequence[tuple[str, str]],
    verify: bool,
    preload: Sequence[str],
) -> Iterator[Entry]:
    """Yield an entry for each chosen source and name, in order; a fresh process computes each.

    Args:
        row: makes an entry; a function of a module, which the processes import.
        chosen: sources and names.
        verify: also verify by perturbation.
        preload: modules that are imported once, for all processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([row.__module__, *preload])
    sources, names = zip(*chosen, strict=True)
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        yield from pool.map(_quietly, [row] * len(chosen), sources, names, [verify] * len(chosen))


def _quietly(row: Callable[[str, str, bool], Entry], source: str, name: str, verify: bool) -> Entry:
    warnings.simplefilter("ignore")  # libraries warn of what they have moved
    torch.set_num_threads(1)  # the processes share the cores
    return row(source, name, verify)


def line(entry: Entry) -> str:
    """An entry as a line of text."""
    return "  ".join(cell for cell in _cells(entry) if cell)


def markdown(entries: Sequence[Entry], page: Page) -> str:
    """The table of all entries, its verdict, and a line on each exception."""
    head = (
        page.source, "model", "built with", "parameters", "shared", "pair-gated", "protected",
        "smallest group", "heads", "fell back", "seconds", "perturbation test",
    )  # fmt: skip
    table = grid([head, *map(_cells, entries)])
    torch_version = f"torch {torch.__version__.partition('+')[0]}"
    made = f"Made by `{page.made}` ({page.versions}, {torch_version})."
    notes = [f"- {_name(e, page)}: {_note(e, page)}" for e in entries if not good(e)]
    text = [f"# {page.title}\n\n{made}", verdict(entries)]
    return "\n\n".join([*text, table, "## Exceptions", "\n".join(notes) or "None."]) + "\n"


def good(entry: Entry) -> bool:
    """Whether a trace meets the targets: 95 % shared, 90 % pair-gated, at most 30 % protected."""
    m = entry.measures
    if m is None or entry.error:
        return False
    return m.shared >= 0.95 and m.pair_gated >= 0.9 and m.protected <= 0.3


def verdict(entries: Sequence[Entry]) -> str:
    """How many models meet each target."""
    found = [entry.measures for entry in entries if entry.measures is not None]
    shared = sum(m.shared >= 0.95 for m in found)
    gated = sum(m.pair_gated >= 0.9 and m.protected <= 0.3 for m in found)
    tested = [entry.untested for entry in entries if entry.untested is not None]
    whole = sum(entry.measures is not None and not entry.fell_back for entry in entries)
    return (
        f"Traced: {len(found)} of {len(entries)}. Passed the perturbation test: {len(tested)} "
        f"({sum(map(len, tested))} parameters that no control reached). At least 95 % of the "
        f"parameters shared: {shared}. At least 90 % of the shared weight entries pair-gated and at "
        f"most 30 % protected: {gated}. Without an unknown operator: {whole}."
    )


def _cells(entry: Entry) -> tuple[str, ...]:
    m = entry.measures
    if m is None:
        return (entry.source, entry.model, *[""] * 9, entry.error)
    tested = entry.error if entry.untested is None else "passed"
    if entry.untested:
        tested += f"; not tested: {', '.join(entry.untested)}"
    return (
        entry.source, entry.model, entry.built, f"{entry.parameters / 1e6:.1f} M",
        f"{m.shared:.1%}", f"{m.pair_gated:.1%}", f"{m.protected:.1%}", str(m.smallest_group),
        str(entry.heads), ", ".join(sorted(set(entry.fell_back))), f"{entry.seconds:.1f}", tested,
    )  # fmt: skip


def _name(entry: Entry, page: Page) -> str:
    return entry.source if entry.source in page.notes else f"{entry.source} {entry.model}"


def _note(entry: Entry, page: Page) -> str:
    known = page.notes.get(entry.model, page.notes.get(entry.source))
    return entry.error or known or entry.reason or "not explained yet"
