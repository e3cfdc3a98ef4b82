"""``torchrun -m hatfn run``: as one process with the whole batch, and gone on with after a loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nets import equal
from safetensors.torch import load_file

from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.folder import CONFIG, LOG, PROGRESS
from hatfn.experiments.run.processes import shares

ROOT = Path(__file__).parents[2]
QUICK = ("--width", "40", "--tasks", "2", "--epochs", "3")


def begin(count: int, *arguments: str) -> subprocess.Popen:
    """Start a run of so many processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "hatfn"]
    command = [sys.executable, "-m", *(launcher if count > 1 else ["hatfn"]), "run", *arguments]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env={**os.environ, **paths}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(count: int, *arguments: str) -> str:
    """Run to the end; what was said."""
    process = begin(count, *arguments)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def result(folder: Path) -> dict:
    found = json.loads((folder / "result.json").read_text())
    for one in (found, *found.get("seeds", {}).values()):
        del one["seconds"]
    return found


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def lines(folder: Path) -> int:
    log = folder / LOG
    return log.read_text().count("\n") if log.exists() else 0


def lose_one(process: subprocess.Popen, folder: Path, after: int) -> str:
    """Kill the second of two processes once so many steps are saved; what the run said."""
    while lines(folder) < after or not (folder / PROGRESS).exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    return said


def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    said = finish(2, *QUICK, "--batch-size", "16", "--optimizer", "sgd", "--out", str(two))
    assert said.count("results in") == 1, "the second process is quiet"
    finish(1, *QUICK, "--batch-size", "32", "--optimizer", "sgd", "--out", str(one))
    for name in ("accuracy_matrix", "class_incremental_matrix", "drift"):
        assert result(two)[name] == result(one)[name]
    assert result(two)["drift"] == 0.0
    mine, theirs = (load_file(folder / "state.safetensors") for folder in (two, one))
    for name, leaf in mine.items():
        torch.testing.assert_close(leaf, theirs[name], atol=1e-5, rtol=1e-5)


def test_a_lost_process_stops_the_run_and_it_goes_on_with_one_or_two(tmp_path: Path) -> None:
    whole = finish_whole(tmp_path / "whole")
    folder = tmp_path / "cut"
    keep = ("--save-every", "0")
    said = lose_one(begin(2, *QUICK, "--batch-size", "16", *keep, "--out", str(folder)), folder, 10)
    assert "exitcode  : -9" in said or "has ended" in said
    assert not (folder / "result.json").exists()
    assert json.loads((folder / CONFIG).read_text())["processes"] == 2

    alone = begin(1, "--resume", str(folder), *keep)
    seen = lines(folder)
    while lines(folder) < seen + 10:
        assert alone.poll() is None, alone.stdout.read()
        time.sleep(0.01)
    alone.kill()
    alone.communicate()

    finish(2, "--resume", str(folder))
    assert result(folder)["drift"] == 0.0
    assert lines(folder) == lines(tmp_path / "whole")
    mine = load_file(folder / "state.safetensors")
    for name, leaf in mine.items():
        torch.testing.assert_close(leaf, whole[name], atol=1e-3, rtol=1e-3)


def finish_whole(folder: Path) -> dict[str, torch.Tensor]:
    finish(2, *QUICK, "--batch-size", "16", "--out", str(folder))
    return load_file(folder / "state.safetensors")


def test_seeds_are_dealt_out_to_processes(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    said = finish(2, *QUICK, "--seeds", "3", "--out", str(folder))
    assert "± " in said
    found = result(folder)
    assert list(found["seeds"]) == ["0", "1", "2"]
    finish(1, *QUICK, "--seed", "0", "--seeds", "2", "--out", str(tmp_path / "first"))
    first = result(tmp_path / "first")["seeds"]
    assert {seed: found["seeds"][seed] for seed in first} == first
    states = [
        load_file(path / "state-1.safetensors")
        for path in (folder / "seeds-0-to-1", tmp_path / "first")
    ]
    assert equal(*states)


def test_shares_of_seeds() -> None:
    def of(**settings: int) -> list[tuple[int, int]]:
        return [(run.seed, run.seeds) for run in shares(RunConfig(out=Path("x"), **settings))]

    assert of(seeds=16, processes=2) == [(0, 8), (8, 8)]
    assert of(seed=3, seeds=5, processes=2) == [(3, 3), (6, 2)]
    assert of(seeds=1, processes=2) == [(0, 1)]
    assert of(seeds=4) == [(0, 4)]
    with pytest.raises(ValueError, match="3 seeds for 4 processes"):
        of(seeds=3, processes=4)


def test_more_processes_than_images_in_a_batch_are_refused(tmp_path: Path) -> None:
    process = begin(2, *QUICK, "--batch-size", "1", "--processes", "1", "--out", str(tmp_path))
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "batches of 1 images for 2 processes" in said
