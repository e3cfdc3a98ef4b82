"""The commands: each computes, shows its results, and writes them to files."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)

from hatfn.checks.capacity import HATWarning
from hatfn.engine.ranks import ALONE, RankLostError, Ranks, RanksDifferError
from hatfn.experiments import atlas, reproduce, rows
from hatfn.experiments.bench import tables as bench
from hatfn.experiments.bench.cases import CASES
from hatfn.experiments.bench.timing import interleaved
from hatfn.experiments.config import BenchConfig, ReproduceConfig, TraceConfig
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.folder import RunFolder, resumed
from hatfn.experiments.run.loop import NonFiniteStepError, learn, start
from hatfn.experiments.run.processes import processes, shares
from hatfn.experiments.run.progress import Run, Step
from hatfn.experiments.run.report import show
from hatfn.experiments.run.result import Result
from hatfn.experiments.zoo import libraries as zoo
from hatfn.tracing import TraceError
from hatfn.tracing.verify import verify_wiring

MISHAPS = (OSError, torch.OutOfMemoryError, RankLostError)
"""Errors that come from the machine, so the run may succeed if it is resumed."""


def execute(config: RunConfig | TraceConfig | BenchConfig | ReproduceConfig) -> None:
    """Run a command; an error becomes one red line and an exit code."""
    console = Console()
    try:
        _show_log(console)
        if isinstance(config, RunConfig):
            run_and_report(config, console)
        elif isinstance(config, BenchConfig):
            bench_and_report(config, console)
        elif isinstance(config, ReproduceConfig):
            reproduce_and_report(config, console)
        elif config.all or (config.zoo and config.model is None):
            sweep_and_report(config, console)
        else:
            trace_and_report(config, console)
    except KeyboardInterrupt:
        console.print("\nstopped" + _to_go_on(config), markup=False)
        sys.exit(130)
    except MISHAPS as error:
        console.print(str(error) + _to_go_on(config), style="red", markup=False)
        sys.exit(1)
    except (
        ValueError,
        ImportError,
        AssertionError,
        TraceError,
        NonFiniteStepError,
        RanksDifferError,
    ) as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(1)


def _show_log(console: Console) -> None:
    """Show what the library logs, such as that it compiles a step."""
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(handlers=[handler], format="%(message)s", force=True)
    logging.getLogger("hatfn").setLevel(logging.INFO)


def _to_go_on(config: object) -> str:
    if not isinstance(config, RunConfig):
        return ""
    return f"; to go on: hatfn run --resume {config.resume or config.folder}"


def trace_and_report(config: TraceConfig, console: Console) -> None:
    """Trace one model and show its wiring."""
    if config.model is None:
        raise ValueError(
            "trace: no model. Write hatfn trace resnet18, hatfn trace --all, or hatfn trace --zoo all."
        )
    sample = zoo.make(config.zoo, config.model) if config.zoo else atlas.make(config.model, config.side)
    traced = rows.measured(sample)
    console.print(f"{config.model}, {sample.built}\n")
    console.print(traced.wiring.summary(), highlight=False, markup=False)
    console.print(f"seconds     {traced.seconds:.1f}", highlight=False)
    console.print(f"memory      {traced.memory:.1f} times the parameters", highlight=False)
    if config.verify:
        found = verify_wiring(sample.module, traced.wiring, sample.x)
        untested = ", ".join(found.untested) or "none"
        console.print(f"verified    {len(found.tested)} shared parameters; not tested: {untested}")


def sweep_and_report(config: TraceConfig, console: Console) -> None:
    """Trace many models, print a row for each, and write the table."""
    if config.zoo:
        page, count = zoo.page(config.zoo), zoo.count(config.zoo)
        entries = zoo.entries(config.zoo, config.verify)
    else:
        families = atlas.families()
        page, count, entries = atlas.PAGE, len(families), atlas.entries(families, config.verify)
    done: list[rows.Entry] = []
    for entry in track(entries, "tracing", count, console=console):
        done.append(entry)
        console.print(rows.line(entry), highlight=False, markup=False, soft_wrap=True)
        if config.out is not None:
            config.out.write_text(rows.markdown(done, page))
    console.print(rows.verdict(done), highlight=False, markup=False)


def bench_and_report(config: BenchConfig, console: Console) -> bench.Bench:
    """Time one comparison after another, and write the table."""
    bench.check(config)
    device, done = torch.device(config.device), bench.Bench([], {})
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    with bench.threads(config.threads):
        for name in config.only or CASES:
            console.print(f"{name}: preparing")
            for comparison in CASES[name].comparisons(device, config.compiled):
                rounds = interleaved(comparison.contenders, config.rounds, wait=wait)
                label = " ".join(filter(None, comparison[:3]))
                shown = track(rounds, label, config.rounds, console=console)
                done = bench.add(done, comparison, shown, device)
            if config.out is not None:
                config.out.write_text(bench.markdown(done, config))
    for table in bench.tables(done):
        console.print(table, soft_wrap=True)
    console.print(bench.verdict(done.rows))
    return done


def reproduce_and_report(config: ReproduceConfig, console: Console) -> None:
    """Make the page of results, one chapter after another."""
    done = reproduce.kept(config)
    for name, text in reproduce.reproduce(config):
        done[name] = text
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        config.page.write_text(reproduce.page(done, config))
    console.print(f"results in {config.page}")


def run_and_report(config: RunConfig, console: Console) -> list[Result]:
    """Run to the end, alone or with other processes, and write the results to the run's folder."""
    config = resumed(config)
    with processes(config.device) as ranks:
        console = console if ranks.rank == 0 else Console(quiet=True)
        if config.resume is None and config.processes is None:
            config = replace(config, processes=ranks.size)
        parts = shares(config)
        if len(parts) == 1:
            results = learn_and_log(config, console, ranks).results
        else:
            folder = RunFolder(config, ranks)
            ranks.gather(None)  # now the folder exists
            done = [learn_and_log(part, console) for part in ranks.share(parts)]
            results = [one for each in ranks.collect([run.results for run in done]) for one in each]
            if ranks.rank == 0:
                folder.conclude(range(config.seed, config.seed + config.seeds), results)
        show(results, console)
        console.print(f"results in {config.folder}")
    return results


def learn_and_log(config: RunConfig, console: Console, ranks: Ranks = ALONE) -> Run:
    """Learn, show the progress, and write everything to the run's folder."""
    with warnings.catch_warnings():
        # Without gates every task uses every unit, so warnings about this say nothing new.
        warnings.simplefilter("always" if config.method == "hat" else "ignore", HATWarning)
        warnings.showwarning = lambda message, *_: console.print(
            str(message), style="yellow", markup=False
        )
        folder = RunFolder(config, ranks)
        console.print(
            f"{config.method} on {config.stream} with {config.model}: preparing", markup=False
        )
        run = start(config, ranks)
        console.print(run.hat.wiring.summary(), highlight=False)
        if config.resume is not None:
            folder.restore(run)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[live]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            bars = {
                i: progress.add_task(f"task {i} {task.name}", total=None, live="")
                for i, task in enumerate(run.stream)
                if config.method != "joint" or i == len(run.stream) - 1  # one bar for all tasks
            }
            for event in learn(run):
                folder.log(run, event)
                if isinstance(event, Step):
                    live = f"loss {event.loss:.4f}  s {event.scale:6.1f}  acc {event.accuracy:.3f}"
                    progress.update(
                        bars[event.task], total=event.steps, completed=event.step, live=live
                    )
                else:
                    live = f"acc {event.accuracies[-1]:.4f}  drift {event.drift!r}"
                    progress.update(bars[event.task], live=live)
    folder.finish(run)
    return run
