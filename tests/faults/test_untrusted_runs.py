"""Run folders of strangers are data: nothing in them is obeyed or believed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import DEEP, TEXTS, refused

from hatfn.experiments import cli
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.folder import CONFIG, LOG, PROGRESS, resumed
from hatfn.storage import container

pytestmark = [pytest.mark.filterwarnings("ignore::hatfn.HATWarning"), pytest.mark.usefixtures("wide")]

SETTINGS: dict[str, Any] = {
    "lr": math.nan, "s_max": "1e3", "width": 2**70, "epochs": 0, "batch_size": -5, "seed": 2**64, "seeds": 0, "dropout": [0.5],
    "device": "cpu\x1b[2J", "model": "hf-hub:stranger/model", "stream": "split-../../etc", "data_dir": "/tmp\n", "out": ["x"], "__class__": "x",
    "../x": 1, "weight_decay": 10**400, "tasks": True, "max_norm": {}, "resume": 7, "depth": None, "compensation": "eval",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS, ids=ascii)
def test_settings_that_no_run_has(name: str, folder: Path, capsys) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {name: SETTINGS[name]}))
    said = refused(folder, capsys)
    assert name in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "text", [*TEXTS.values(), " " * 2**21, "\xff"], ids=[*TEXTS, "large", "no UTF-8"]
)
def test_settings_that_are_none(text: str, folder: Path, capsys) -> None:
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert CONFIG in refused(folder, capsys)


def test_a_run_writes_into_its_folder_alone(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Whatever the settings call ``out`` and ``resume``."""
    elsewhere = tmp_path / "elsewhere"
    settings = json.loads((folder / CONFIG).read_text())
    settings |= {"out": str(elsewhere), "resume": str(tmp_path / "other")}
    (folder / CONFIG).write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    cli.main(["run", "--resume", str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder / "result.json").exists()


@pytest.mark.parametrize(
    "name", [CONFIG, LOG, PROGRESS, "result.json", "training.png", "state.safetensors"]
)
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_links_and_pipes_are_refused(
    name: str, kind: str, folder: Path, tmp_path: Path, capsys
) -> None:
    """A link would have the log cut or a plot written wherever it leads; a pipe is read for ever."""
    mine = tmp_path / "mine"
    mine.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"mine")
    before = mine.read_bytes()
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(mine if kind == "link" else tmp_path / "new")
    assert f"'{name}' is {'no plain file' if kind == 'pipe' else 'a link'}" in refused(folder, capsys)
    assert mine.read_bytes() == before
    assert not (tmp_path / "new").exists()


def progress(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    header, leaves = container.read(folder / PROGRESS)
    change(header, leaves)
    container.write(folder / PROGRESS, leaves, header)


HEADERS: dict[str, Any] = {
    "place": [[0, 0], [-1, 0, 0], [99, 0, 0], [0, 99, 0], [0, 0, -1], ["0", 0, 0], [0.5, 0, 0], None, {}, [2**70, 0, 0]],
    "log": [-1, 2**62, 2**70, "3", 1.5, None],
    "seconds": ["x", None, [], {}],
    "machine": [[], None, 3],
    "config": [None, {}, []],
    "results": [[], None, [{}], [None], [1, 2], {}, "x"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in HEADERS.items() for v in vs], ids=repr)
def test_progress_that_no_run_makes(name: str, value: Any, folder: Path, capsys) -> None:
    before = (folder / LOG).read_bytes()
    progress(folder, lambda header, _: header.update({name: value}))
    assert PROGRESS in refused(folder, capsys)
    progress(folder, lambda header, _: header.pop(name))
    assert PROGRESS in refused(folder, capsys)
    assert (folder / LOG).read_bytes() == before, "nothing is cut before all is looked at"


RESULTS: dict[str, list[Any]] = {
    "accuracy_matrix": [[], [[1.0]], "x", None], "drift": ["x", [[0.0]], None], "free_units": [3, [3], [{"a": "b"}]],
    "free_weights": [[], None], "closings": [[[1.0]], "x"], "seconds": [None, "x"], "task_inference": [[0.0] * 9],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in RESULTS.items() for v in vs], ids=repr)
def test_results_that_no_run_has(name: str, value: Any, folder: Path, capsys) -> None:
    progress(folder, lambda header, _: header["results"][0].update({name: value}))
    assert PROGRESS in refused(folder, capsys)


@pytest.mark.parametrize(
    "name", ["logits/0/7", "logits/-1/0", "logits/0/../x", "logits/9/0", "logits", "../x", "params/x"]
)
def test_tensors_that_no_run_has(name: str, folder: Path, capsys) -> None:
    progress(folder, lambda _, leaves: leaves.update({name: torch.zeros(3)}))
    assert f"{name} is not expected" in refused(folder, capsys)


def test_a_machine_by_a_hostile_name_is_shown_as_text(folder: Path, capsys) -> None:
    progress(folder, lambda header, _: header["machine"].update({"torch": "[/red]\x1b[2J"}))
    cli.main(["run", "--resume", str(folder)])
    said = capsys.readouterr().out
    assert "[/red]" in said
    assert "\x1b[2J" not in said


STEP = {
    "task": 0,
    "epoch": 0,
    "step": 1,
    "steps": 2,
    "loss": 1.0,
    "penalty": 0.0,
    "scale": 1.0,
    "accuracy": 0.5,
}
LINES = [
    b"[]",
    b"3",
    b"{",
    DEEP.encode(),
    b"\xff",
    json.dumps(STEP | {"loss": "x"}).encode(),
    json.dumps(STEP | {"task": None}).encode(),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: ascii(line[:20]))
def test_lines_that_no_run_logs(line: bytes, folder: Path, capsys) -> None:
    """Told before anything is learned, not when the plots are drawn."""
    whole = line + b"\n" + json.dumps(STEP).encode()
    (folder / LOG).write_bytes(whole)
    progress(folder, lambda header, _: header.update(log=len(line) + 1))
    assert f"{LOG}, line 1, was not written by a run" in refused(folder, capsys)
    assert (folder / LOG).read_bytes() == whole


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", Path(__file__)):
        with pytest.raises(ValueError, match="no run was begun there"):
            resumed(RunConfig(resume=path))
