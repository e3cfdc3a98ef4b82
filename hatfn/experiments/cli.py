"""The command line: ``hatfn run``."""

from __future__ import annotations

import sys
import warnings

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hatfn.checks import HATWarning
from hatfn.experiments.config import RunConfig
from hatfn.experiments.report import RunFolder, show
from hatfn.experiments.run import NonFiniteStepError, Run, Step, learn, start


def main(arguments: list[str] | None = None) -> None:
    """The entry point of the ``hatfn`` command."""
    config = tyro.extras.subcommand_cli_from_dict({"run": RunConfig}, prog="hatfn", args=arguments)
    console = Console()
    try:
        run_and_report(config, console)
    except (ValueError, NonFiniteStepError) as error:
        console.print(f"[red]{error}")
        sys.exit(1)


def run_and_report(config: RunConfig, console: Console) -> Run:
    """Run to the end, show how it goes, and leave the results in the run's folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", HATWarning)
        warnings.showwarning = lambda message, *_: console.print(f"[yellow]{message}")
        console.print(f"{config.method} on {config.stream} with {config.model}: preparing")
        run = start(config)
        console.print(run.hat.wiring.summary(), highlight=False)
        folder = RunFolder(config)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[live]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            bars = [
                progress.add_task(f"task {i} {task.name}", total=None, live="")
                for i, task in enumerate(run.stream)
            ]
            for event in learn(run):
                folder.log(run, event)
                if isinstance(event, Step):
                    live = f"loss {event.loss:.4f}  s {event.scale:6.1f}  acc {event.accuracy:.3f}"
                    progress.update(
                        bars[event.task], total=event.steps, completed=event.step, live=live
                    )
                else:
                    kept = f"acc {event.accuracies[-1]:.4f}  drift {event.drift!r}"
                    progress.update(bars[event.task], live=kept)
    folder.finish(run.result)
    show(run.result, console)
    console.print(f"results in {folder.path}")
    return run
