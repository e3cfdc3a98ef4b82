"""The folder of a run: its settings, its log, its states, and the file that --resume reads."""

from __future__ import annotations

import json
import math
import operator
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from hatfn.checks.capacity import HATWarning
from hatfn.engine.ranks import ALONE, Ranks
from hatfn.evaluation.usage import memory, usage
from hatfn.experiments.run import plots
from hatfn.experiments.run.config import RunConfig, check_run
from hatfn.experiments.run.loop import opened
from hatfn.experiments.run.progress import Progress, Run, Step
from hatfn.experiments.run.report import result_dict
from hatfn.experiments.run.result import Learned, Result, from_json, mean, to_json
from hatfn.storage import checkpoint
from hatfn.storage.container import (
    CheckpointError,
    printable,
    read,
    remove_leftovers,
    write,
    write_atomically,
)

CONFIG, LOG, PROGRESS = "config.json", "metrics.jsonl", "progress.safetensors"


class RunFolder:
    """The files of one run, written as it goes.

    config.json: the settings. metrics.jsonl: a line per step, and one per finished task with its
    accuracies and drift. state.safetensors: the learner's state after the last finished task; with
    several seeds, a file for each. progress.safetensors: all that --resume needs, saved every
    ``save_every`` seconds. result.json: the measurements at the end. Plots as PNG.

    If processes train together, the first one writes and all of them read.
    """

    def __init__(self, config: RunConfig, ranks: Ranks = ALONE) -> None:
        self.path, self.config, self.ranks = config.folder, config, ranks
        self.lines: list[str] = []
        self.saved = time.monotonic()
        if config.resume is None and ranks.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, PROGRESS, "result.json"):  # of an earlier run in this folder
                (self.path / name).unlink(missing_ok=True)
            (self.path / LOG).write_text("")
            text = json.dumps(asdict(config), default=str, indent=2)
            write_atomically(self.path / CONFIG, text.encode())

    def restore(self, run: Run) -> None:
        """Set a run that has just been started back to its last save.

        Raises:
            CheckpointError: the saved file is damaged or does not fit.

        Warns:
            HATWarning: the machine or versions are others, so numbers will agree only up to rounding.
        """
        if (self.path / PROGRESS).exists():
            self._restore(run)
        elif self.ranks.rank == 0:  # killed before anything was saved
            (self.path / LOG).write_text("")
        self.ranks.gather(None)  # no process writes before all have read
        if self.ranks.rank == 0:
            remove_leftovers(self.path)

    def _restore(self, run: Run) -> None:
        path = self.path / PROGRESS
        header, leaves = read(path)
        checkpoint.check_owner(path, header, checkpoint.owner("run", run.hat, "resume"), run.hat.wiring)
        try:
            self._take(path, header, leaves, run)
        except CheckpointError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"run: {path} is not what a run writes ({error!r}). Delete it to begin anew."
            ) from error

    def _take(self, path: Path, header: dict[str, Any], leaves: dict[str, Tensor], run: Run) -> None:
        """Put the content of a file into the run, after checking all of it; the file may be foreign."""
        if header["config"] != _settings(self.config):
            raise CheckpointError(f"run: {path} belongs to a run with other settings than {CONFIG}.")
        log, length = self.path / LOG, operator.index(header["log"])
        if not log.exists() or not 0 <= length <= log.stat().st_size:
            raise CheckpointError(
                f"run: {log} has lost lines that the run had written. Expected at least {length} "
                f"bytes: put it back, or delete {path.name} to begin anew."
            )
        machine = _machine(self.config, self.ranks)
        if others := [name for name in machine if header["machine"].get(name) != machine[name]]:
            was = printable(", ".join(f"{name} {header['machine'].get(name)}" for name in others))
            warnings.warn(
                f"run: begun with {was}, and this is {', '.join(machine[name] for name in others)}. It "
                f"goes on, but its numbers equal those of an uninterrupted run only up to rounding.",
                HATWarning,
                stacklevel=3,
            )
        tasks = range(len(run.stream))
        logits: list[dict[int, Tensor]] = [
            {t: leaves.pop(name) for t in tasks if (name := f"logits/{seed}/{t}") in leaves}
            for seed, _ in enumerate(run.seeds)
        ]
        progress = Progress(*map(operator.index, header["place"]))
        if min(progress) < 0 or progress.phase > len(run.phases) or progress.epoch > self.config.epochs:
            raise ValueError(f"progress={progress}")
        results = [
            from_json([task.name for task in run.stream], data)
            for data, _ in zip(header["results"], run.seeds, strict=True)
        ]
        seconds = float(header["seconds"])
        state = checkpoint.restored(path, leaves, opened(run, progress), run.hat)
        with log.open("rb") as file:
            check_log(log, file.read(length))
        run.state, run.progress, run.logits, run.seconds = state, progress, logits, seconds
        run.results = results
        for result, one in zip(run.results, run.states, strict=True):
            result.usage, result.memory = usage(one, run.hat.wiring), memory(one)
        if self.ranks.rank == 0:
            os.truncate(log, length)

    def log(self, run: Run, event: Step | Learned) -> None:
        """Log a step, and save the run from time to time; at the end of a task also save its state."""
        if self.ranks.rank:
            return
        self.lines.append(json.dumps(event._asdict()) + "\n")
        if isinstance(event, Learned):
            for seed, state in zip(run.seeds, run.states, strict=True):
                settings = {**_settings(self.config), "seed": seed, "seeds": 1}
                name = "state.safetensors" if len(run.seeds) == 1 else f"state-{seed}.safetensors"
                meta = {"config": settings, "tasks": event.task + 1}
                checkpoint.save(self.path / name, state, run.hat, meta)
        if isinstance(event, Learned) or time.monotonic() - self.saved >= self.config.save_every:
            self.save(run)

    def save(self, run: Run) -> None:
        """Write all that --resume needs to one file, which is replaced as a whole."""
        with (self.path / LOG).open("a") as file:
            file.writelines(self.lines)
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        self.lines.clear()
        header = checkpoint.owner("run", run.hat, "save") | {
            "config": _settings(self.config),
            "machine": _machine(self.config, self.ranks),
            "place": run.progress,
            "seconds": run.seconds,
            "results": [to_json(result) for result in run.results],
            "log": length,
        }
        logits = {
            f"logits/{seed}/{task}": one
            for seed, learned in enumerate(run.logits)
            for task, one in learned.items()
        }
        write(self.path / PROGRESS, checkpoint.flatten(run.state) | logits, header)
        self.saved = time.monotonic()

    def finish(self, run: Run) -> None:
        """Write the result and the plots."""
        if self.ranks.rank:
            return
        self.conclude(run.seeds, run.results)
        result = run.result
        plots.accuracy_matrix(result, self.path / "accuracy_matrix.png")
        plots.mask_use(result, self.path / "mask_use.png")
        plots.capacity(result, self.path / "capacity.png")
        log = self.path / LOG
        plots.training(read_steps(log, log.read_bytes()), self.path / "training.png")

    def conclude(self, seeds: Sequence[int], results: Sequence[Result]) -> None:
        """Write the result; for several seeds, the mean and the result of each."""
        whole = result_dict(mean(results))
        if len(seeds) > 1:
            each = zip(seeds, results, strict=True)
            whole["seeds"] = {str(seed): result_dict(one) for seed, one in each}
        write_atomically(self.path / "result.json", json.dumps(whole, indent=2).encode())


def check_log(log: Path, text: bytes) -> None:
    """Refuse a log with a line that no run writes.

    Raises:
        CheckpointError: the log has such a line.
    """
    read_steps(log, text)


def read_steps(log: Path, text: bytes) -> list[Step]:
    """The steps among the lines of a log.

    Raises:
        CheckpointError: the log has a line that no run writes.
    """
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            event = json.loads(line)
            if event.keys() == {*Step._fields}:
                kinds = get_type_hints(Step)
                found.append(Step(**{name: kinds[name](value) for name, value in event.items()}))
        except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"run: {log}, line {number}, was not written by a run ({error})."
            ) from error
    return found


def resumed(given: RunConfig) -> RunConfig:
    """The settings of the run to resume; without ``resume``, the given settings.

    Args:
        given: settings. If ``resume`` is set, only ``save_every`` may be set as well.

    Raises:
        ValueError: other settings are set as well; no run was begun in the folder, or its settings
            cannot be read.
    """
    check_run(given)
    folder = given.resume
    if folder is None:
        return given
    free = {"resume", "save_every"}
    changed = [name for name, value in vars(given).items() if value != getattr(RunConfig(), name)]
    if others := [name for name in changed if name not in free]:
        raise ValueError(
            f"run: --resume goes on with the settings of {folder / CONFIG}, and "
            f"--{others[0].replace('_', '-')} is given as well. Leave it out."
        )
    try:
        check_files(folder)
        text = (folder / CONFIG).read_bytes()
    except OSError as error:
        raise ValueError(
            f"run: --resume {folder}: no run was begun there ({error}). Begin it: hatfn run --out "
            f"{folder}"
        ) from error
    try:
        read_settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"run: {folder / CONFIG} cannot be read ({error}). Expected what hatfn run wrote there."
        ) from error
    config = _config(folder, read_settings)
    return replace(config, resume=folder, out=folder, save_every=given.save_every)


def check_files(folder: Path) -> None:
    """Refuse a foreign folder with files that are unsafe to write to or to read.

    Raises:
        ValueError: there is a link to a file, something that is neither file nor folder, or a file of
            settings that is too large.
    """
    for entry in folder.iterdir():
        if not entry.is_dir() and (entry.is_symlink() or not entry.is_file()):
            kind = "a link" if entry.is_symlink() else "no plain file"
            raise ValueError(
                f"run: in {folder} {entry.name!r} is {kind}. Expected plain files: put a copy in its "
                f"place."
            )
    if (folder / CONFIG).stat().st_size > 2**20:
        raise ValueError(f"run: {folder / CONFIG} is larger than a MiB. Expected only settings.")


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers, as JSON; not those of its folder and its saves."""
    whole: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return {name: value for name, value in whole.items() if name not in ("out", "resume", "save_every")}


def _machine(config: RunConfig, ranks: Ranks) -> dict[str, str]:
    """The versions and hardware that, beside the settings, decide the last bits of numbers."""
    device = torch.device(config.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "hatfn": version("hatfn"),
        "torch": torch.__version__,
        "device": gpu or torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "processes": str(ranks.size),
    }


def _config(folder: Path, given: Any) -> RunConfig:
    """The settings in a file, after a check of their names and types."""
    hints = get_type_hints(RunConfig)
    if not isinstance(given, dict) or given.keys() != hints.keys():
        odd = sorted(given.keys() ^ hints.keys()) if isinstance(given, dict) else [type(given).__name__]
        raise ValueError(
            f"run: {folder / CONFIG} does not have the settings of this version of hatfn: {odd[0]}. "
            f"Resume with the version that began the run."
        )
    for name, value in given.items():
        if not _fits(value, hints[name]):
            raise ValueError(
                f"run: {folder / CONFIG} has {name}={value!r}. Expected {hints[name]}, as hatfn run "
                f"wrote it."
            )
    names = ("data_dir", "out", "resume")
    paths = {name: value and Path(value) for name, value in given.items() if name in names}
    return RunConfig(**given | paths)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint in (str, Path):
        return isinstance(value, str) and value.isprintable()
    return type(value) is hint if hint is not NoneType else value is None
