"""The folder of a run: its settings, its log, its states, and what it takes to go on after a kill."""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from hatfn import checkpoint
from hatfn.checks import HATWarning
from hatfn.container import CheckpointError, read, remove_leftovers, write, write_atomically
from hatfn.experiments import plots
from hatfn.experiments.config import RunConfig, check_run
from hatfn.experiments.report import result_dict
from hatfn.experiments.result import Learned, from_json, to_json
from hatfn.experiments.run import Place, Run, Step, opened
from hatfn.metrics import memory, usage

CONFIG, LOG, PROGRESS = "config.json", "metrics.jsonl", "progress.safetensors"


class RunFolder:
    """The files of one run, written as it goes.

    config.json: the settings. metrics.jsonl: a line per step, and one per finished task with its
    accuracies and drift. state.safetensors: the learner's state after the last finished task; of
    several seeds one file each. progress.safetensors: all that it takes to go on after a kill, every
    ``save_every`` seconds. result.json: what was measured in the end. Plots as PNG.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path, self.config = config.folder, config
        self.lines: list[str] = []
        self.saved = time.monotonic()
        if config.resume is None:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, PROGRESS, "result.json"):  # of a run that was here before
                (self.path / name).unlink(missing_ok=True)
            (self.path / LOG).write_text("")
            text = json.dumps(asdict(config), default=str, indent=2)
            write_atomically(self.path / CONFIG, text.encode())

    def restore(self, run: Run) -> None:
        """Put a run that has just been started to where it was when it was last saved.

        Raises:
            CheckpointError: what was saved is damaged or does not fit.

        Warns:
            HATWarning: another machine or other versions: numbers will agree to rounding only.
        """
        path = self.path / PROGRESS
        remove_leftovers(self.path)
        if not path.exists():  # killed before anything was saved
            (self.path / LOG).write_text("")
            return
        header, leaves = read(path)
        checkpoint.check_owner(path, header, checkpoint.owner("run", run.hat, "resume"))
        if header["config"] != _settings(self.config):
            raise CheckpointError(f"run: {path} belongs to a run with other settings than {CONFIG}.")
        log = self.path / LOG
        if not log.exists() or log.stat().st_size < header["log"]:
            raise CheckpointError(
                f"run: {log} has lost lines that the run had written. Expected {header['log']} bytes "
                f"or more: put it back, or delete {path.name} to begin anew."
            )
        machine = _machine(self.config)
        if others := [name for name in machine if header["machine"].get(name) != machine[name]]:
            was = ", ".join(f"{name} {header['machine'].get(name)}" for name in others)
            warnings.warn(
                f"run: begun with {was}, and this is {', '.join(machine[name] for name in others)}. It "
                f"goes on, but ends like a run in one go to rounding only.",
                HATWarning,
                stacklevel=2,
            )
        logits: list[dict[int, Tensor]] = [{} for _ in run.seeds]
        for name in [name for name in leaves if name.startswith("logits/")]:
            _, seed, task = name.split("/")
            logits[int(seed)][int(task)] = leaves.pop(name)
        place = Place(*header["place"])
        run.state = checkpoint.restored(path, leaves, opened(run, place))
        run.place, run.logits, run.seconds = place, logits, header["seconds"]
        names = [task.name for task in run.stream]
        run.results = [from_json(names, data) for data in header["results"]]
        for result, state in zip(run.results, run.states, strict=True):
            result.usage, result.memory = usage(state, run.hat.wiring), memory(state)
        os.truncate(log, header["log"])

    def log(self, run: Run, event: Step | Learned) -> None:
        """Keep a step, and now and then all that there is; at the end of a task the state as well."""
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
        """Write what it takes to go on from here, to one file that is replaced in one step."""
        with (self.path / LOG).open("a") as file:
            file.writelines(self.lines)
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        self.lines.clear()
        header = checkpoint.owner("run", run.hat, "save") | {
            "config": _settings(self.config),
            "machine": _machine(self.config),
            "place": run.place,
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
        """Write the result and the plots; of several seeds the mean, and the result of each."""
        result, whole = run.result, result_dict(run.result)
        if len(run.seeds) > 1:
            each = zip(run.seeds, run.results, strict=True)
            whole["seeds"] = {str(seed): result_dict(one) for seed, one in each}
        write_atomically(self.path / "result.json", json.dumps(whole, indent=2).encode())
        plots.accuracy_matrix(result, self.path / "accuracy_matrix.png")
        plots.mask_use(result, self.path / "mask_use.png")
        plots.capacity(result, self.path / "capacity.png")
        lines = [json.loads(line) for line in (self.path / LOG).read_text().splitlines()]
        steps = [Step(**line) for line in lines if line.keys() == set(Step._fields)]
        plots.training(steps, self.path / "training.png")


def resumed(given: RunConfig) -> RunConfig:
    """The settings of the run that is to go on.

    Args:
        given: with ``resume``, and nothing else but ``save_every`` set.

    Raises:
        ValueError: other settings beside it; a folder in which no run was begun, or whose settings
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
        read_settings = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"run: --resume {folder}: no run was begun there ({error}). Begin it: hatfn run --out "
            f"{folder}"
        ) from error
    config = _config(folder, read_settings)
    return replace(config, resume=folder, out=folder, save_every=given.save_every)


def _settings(config: RunConfig) -> dict[str, Any]:
    """What decides a run's numbers, as JSON holds it: not where it is kept, nor how often."""
    whole: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return {name: value for name, value in whole.items() if name not in ("out", "resume", "save_every")}


def _machine(config: RunConfig) -> dict[str, str]:
    """What decides the last bits of numbers, beside the settings."""
    device = torch.device(config.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "hatfn": version("hatfn"),
        "torch": torch.__version__,
        "device": gpu or torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def _config(folder: Path, given: Any) -> RunConfig:
    """Settings out of a file: each a known one, and of its type."""
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
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return type(value) is hint if hint is not NoneType else value is None
