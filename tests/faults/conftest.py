"""Folders of runs, for strangers to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from strangers import QUICK

from hatfn.experiments.run.folder import RunFolder
from hatfn.experiments.run.loop import learn as learn_run
from hatfn.experiments.run.loop import start


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No message is wrapped."""
    monkeypatch.setenv("COLUMNS", "10000")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that was cut off in its first task."""
    folder = tmp_path_factory.mktemp("begun")
    config = replace(QUICK, out=folder)
    files, run = RunFolder(config), start(config)
    for event in learn_run(run):
        files.log(run, event)
        if len(run.results[0].drift):
            break
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(begun: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    for name, data in begun.items():
        (path / name).write_bytes(data)
    return path
