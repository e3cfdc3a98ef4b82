"""A run that is cut off anywhere says how to go on, and ends as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import failing
from nets import equal

import hatfn
from hatfn.experiments import cli, commands
from hatfn.experiments.run import loop as run_loop
from hatfn.experiments.run import measure, plots
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.folder import LOG
from hatfn.experiments.run.loop import start
from hatfn.storage import container

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

ARGUMENTS = ["--width", "20", "--epochs", "2", "--tasks", "2", "--batch-size", "128", "--save-every", "0",
             "--optimizer", "sgd", "--momentum", "0.9", "--lr", "0.05", "--dropout", "0.2"]  # fmt: skip
CTRL_C, MEMORY = KeyboardInterrupt(), torch.OutOfMemoryError("no memory is left")
DISK = OSError(errno.ENOSPC, "no space is left")
CUTS = {  # what fails, how, and at which call
    "in a step": (hatfn.HAT, "update", CTRL_C, 9),
    "in the first step": (hatfn.HAT, "update", MEMORY, 0),
    "before a task": (hatfn.HAT, "begin", CTRL_C, 1),
    "at the end of a task": (hatfn.HAT, "consolidate", CTRL_C, 0),
    "after a step": (run_loop, "accuracy", MEMORY, 3),
    "while it is measured": (measure, "evaluate", MEMORY, 1),
    "while data are read": (run_loop, "training_part", OSError(errno.EIO, "the loader died"), 1),
    "before a save": (container, "serialize", CTRL_C, 4),
    "in a save": (os, "fsync", DISK, 10),
    "at the end of a save": (Path, "replace", CTRL_C, 3),
    "while plots are drawn": (plots, "training", DISK, 0),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    cli.main(["run", *ARGUMENTS, "--out", str(folder)])
    settings = json.loads((folder / "config.json").read_text())
    run = start(RunConfig(**settings | {"out": None}))
    state = hatfn.load(folder / "state.safetensors", run.hat.wiring)
    assert not equal(state.params, run.state.params), "what learned nothing loses nothing"
    return folder


def same(folder: Path, other: Path) -> bool:
    """State, log and result, but for the time that it took."""
    trees = [container.read(path / "state.safetensors") for path in (folder, other)]
    results = [json.loads((path / "result.json").read_text()) for path in (folder, other)]
    for result in results:
        del result["seconds"]
    logs = [(path / LOG).read_text() for path in (folder, other)]
    return equal(trees[0][1], trees[1][1]) and results[0] == results[1] and logs[0] == logs[1]


@pytest.mark.parametrize("cut", CUTS)
def test_a_run_goes_on(whole: Path, cut: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Wherever it is cut off: the command says how to go on, and that ends as if nothing had been."""
    target, name, error, nth = CUTS[cut]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing(getattr(target, name), error, nth))
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", *ARGUMENTS, "--out", str(tmp_path)])
    assert stop.value.code == (130 if error is CTRL_C else 1)
    said = "".join(capsys.readouterr().out.split())
    assert f"togoon:hatfnrun--resume{tmp_path}" in said
    if isinstance(error, OSError):
        assert error.strerror.replace(" ", "") in said
    assert not list(tmp_path.glob(".*.tmp"))
    assert not (tmp_path / "result.json").exists() or name == "training"
    cli.main(["run", "--resume", str(tmp_path)])
    assert same(tmp_path, whole)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_run_that_cannot_write_says_so_at_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), str(tmp_path / "runs"))

    monkeypatch.setattr(Path, "mkdir", no)
    monkeypatch.setattr(commands, "start", failing(commands.start, AssertionError("not at once"), 0))
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", *ARGUMENTS, "--out", str(tmp_path / "runs")])
    assert stop.value.code == 1
    said = "".join(capsys.readouterr().out.split())
    assert os.strerror(number).replace(" ", "") in said
    assert str(tmp_path / "runs") in said
