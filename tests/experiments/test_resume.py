"""A run that is cut off anywhere goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import equal
from rich.console import Console

import hatfn
from hatfn.experiments import cli, commands
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.folder import CONFIG, LOG, PROGRESS, RunFolder, resumed
from hatfn.experiments.run.loop import learn, start
from hatfn.experiments.run.progress import Run
from hatfn.storage import container

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

QUICK = RunConfig(width=20, epochs=2, tasks=2, batch_size=64, save_every=0.0)
KINDS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "adam, carried, dropout": {"carry": True, "dropout": 0.3},
    "two seeds": {"seeds": 2},
    "joint": {"method": "joint"},
    "two seeds, joint": {"method": "joint", "seeds": 2},
    "warm": {"init_from": "similar", "period": "task"},
}


def follow(config: RunConfig, stop: int | None = None) -> Run:
    """Run, or go on, to the end or until that many events were logged."""
    config = resumed(config)
    folder, run = RunFolder(config), start(config)
    if config.resume is not None:
        folder.restore(run)
    begun = run.state
    for count, event in enumerate(learn(run), start=1):
        folder.log(run, event)
        if count == stop:
            break
    else:
        folder.finish(run)
    weights = [(state.params, state.task_params) for state in (begun, run.state)]
    assert config.resume or not equal(*weights), "nothing was learned that could be lost"
    return run


def left(folder: Path) -> tuple[dict, list[str], list[str]]:
    """What a finished run leaves, but for the time that it took."""
    result = json.loads((folder / "result.json").read_text())
    for one in (result, *result.get("seeds", {}).values()):
        del one["seconds"]
    names = sorted(path.name for path in folder.iterdir())
    return result, (folder / LOG).read_text().splitlines(), names


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[RunConfig, Run]:
    """A run that was not cut off."""
    folder = tmp_path_factory.mktemp("whole")
    config = replace(QUICK, out=folder, **KINDS[request.param])
    return config, follow(config)


@pytest.mark.parametrize("moment", ["first", "middle", "epoch", "task", "second task", "last"])
def test_it_ends_as_if_nothing_had_been(whole, moment: str, tmp_path: Path) -> None:
    config, run = whole
    lines = (config.folder / LOG).read_text().splitlines()
    (closed, *_), per_epoch = [i for i, line in enumerate(lines, 1) if "accuracies" in line], 5
    stop = {
        "first": 1, "middle": 3, "epoch": per_epoch, "task": closed,
        "second task": min(closed + 3, len(lines)), "last": len(lines),
    }[moment]  # fmt: skip
    follow(replace(config, out=tmp_path), stop)
    again = follow(RunConfig(resume=tmp_path, save_every=0.0))
    assert equal(again.state, run.state), "moments included"
    assert left(tmp_path) == left(config.folder)


def test_only_what_is_left_is_computed(tmp_path: Path) -> None:
    cut = follow(replace(QUICK, out=tmp_path), stop=7)
    run = start(resumed(RunConfig(resume=tmp_path)))
    RunFolder(resumed(RunConfig(resume=tmp_path))).restore(run)
    assert run.progress == cut.progress
    assert equal(run.state, cut.state)
    event = next(learn(run))
    assert event.step == 8


def test_from_before_the_first_save_it_begins_again(tmp_path: Path) -> None:
    """Settings are written first; steps that were not followed by a save are done again."""
    config = replace(QUICK, save_every=1e9)
    expected = follow(replace(config, out=tmp_path / "whole"))
    for stop in (0, 4):
        folder = tmp_path / str(stop)
        if stop:
            follow(replace(config, out=folder), stop)
        else:
            RunFolder(replace(config, out=folder))
        assert not (folder / PROGRESS).exists()
        again = follow(RunConfig(resume=folder))
        assert equal(again.state, expected.state)
        assert left(folder) == left(tmp_path / "whole")


def test_steps_after_the_last_save_are_logged_once(tmp_path: Path) -> None:
    expected = follow(replace(QUICK, out=tmp_path / "whole"))
    follow(replace(QUICK, out=tmp_path / "cut"), stop=3)
    with (tmp_path / "cut" / LOG).open("a") as file:
        file.write('{"task": 0, "half a li')
    (tmp_path / "cut" / f".{PROGRESS}.0a0b0c0d.tmp").write_bytes(b"half a file")
    again = follow(RunConfig(resume=tmp_path / "cut"))
    assert equal(again.state, expected.state)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_a_finished_run_shows_its_result_again(tmp_path: Path) -> None:
    run = follow(replace(QUICK, out=tmp_path))
    before = left(tmp_path), (tmp_path / "state.safetensors").read_bytes()
    again = commands.learn_and_log(resumed(RunConfig(resume=tmp_path)), Console(quiet=True))
    assert equal(again.state, run.state)
    assert again.seconds == run.seconds
    assert (left(tmp_path), (tmp_path / "state.safetensors").read_bytes()) == before


def test_a_new_run_in_the_same_folder_starts_anew(tmp_path: Path) -> None:
    follow(replace(QUICK, out=tmp_path, seed=1))
    RunFolder(replace(QUICK, out=tmp_path))
    assert not (tmp_path / "result.json").exists(), "that was another run's"
    again = follow(RunConfig(resume=tmp_path))
    assert equal(again.state, follow(replace(QUICK, out=tmp_path / "other")).state)


def test_the_folder_may_be_moved(tmp_path: Path) -> None:
    follow(replace(QUICK, out=tmp_path / "here"), stop=9)
    (tmp_path / "here").rename(tmp_path / "there")
    again = follow(RunConfig(resume=tmp_path / "there"))
    assert (tmp_path / "there" / "result.json").exists()
    assert not (tmp_path / "here").exists()
    assert all(leaf.isfinite().all() for leaf in again.state.params.values())


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", interrupted)
    arguments = ["run", "--width", "20", "--epochs", "1", "--tasks", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 130
    assert f"hatfn run --resume {tmp_path}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epochs": 3}, "--epochs is given as well"),
        ({"out": Path("elsewhere")}, "--out is given as well"),
        ({"resume": Path("nowhere")}, "no run was begun there"),
    ],
)
def test_what_cannot_be_resumed(tmp_path: Path, change: dict, match: str) -> None:
    RunFolder(replace(QUICK, out=tmp_path))
    with pytest.raises(ValueError, match=match):
        resumed(replace(RunConfig(resume=tmp_path), **change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", "20"), ("width", True), ("width", 2.5), ("method", "magic"), ("lr", None), ("lr", "1"),
        ("carry", 1), ("seed", None), ("out", 3), ("init_from", 0), ("sparsity", [1.0]),
    ],
)  # fmt: skip
def test_settings_of_a_file_are_looked_at(tmp_path: Path, name: str, value: object) -> None:
    RunFolder(replace(QUICK, out=tmp_path))
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert resumed(RunConfig(resume=tmp_path)).width == 20
    (tmp_path / CONFIG).write_text(json.dumps(settings | {name: value}))
    with pytest.raises(ValueError, match=f"{name}="):
        resumed(RunConfig(resume=tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"width": 20}'])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"config\.json|no run was begun"):
        resumed(RunConfig(resume=tmp_path))


@pytest.mark.filterwarnings("default::hatfn.HATWarning")
def test_another_machine_is_told(tmp_path: Path) -> None:
    """Fewer threads add numbers up in another order."""
    follow(replace(QUICK, out=tmp_path, width=100), stop=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(hatfn.HATWarning, match=rf"begun with threads {threads}, and this is"):
            follow(RunConfig(resume=tmp_path))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("damage", ["cut", "another run", "other settings", "a shorter log"])
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    follow(replace(QUICK, out=tmp_path), stop=5)
    path = tmp_path / PROGRESS
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-10])
        case "another run":
            follow(replace(QUICK, out=tmp_path / "other", width=24), stop=5)
            (tmp_path / "other" / PROGRESS).replace(path)
        case "other settings":
            follow(replace(QUICK, out=tmp_path / "other", lr=1e-4), stop=5)
            (tmp_path / "other" / PROGRESS).replace(path)
        case "a shorter log":
            (tmp_path / LOG).write_text("")
    with pytest.raises(container.CheckpointError, match=str(tmp_path)):
        follow(RunConfig(resume=tmp_path))


def final(folder: Path) -> list[torch.Tensor]:
    """Every tensor of the final state, moments included, by name."""
    header, leaves = container.read(folder / "state.safetensors")
    assert header["meta"]["tasks"] == 5
    return [leaves[name] for name in sorted(leaves)]


@pytest.mark.kill
def test_twenty_kills_each_end_in_the_same_state(tmp_path: Path) -> None:
    """kill -9 at random moments: two while the process starts, the others from first save to end."""
    settings = ["--width", "200", "--epochs", "30", "--save-every", "0.02", "--optimizer", "sgd",
                "--momentum", "0.9", "--lr", "0.03", "--dropout", "0.1"]  # fmt: skip
    command = [sys.executable, "-m", "hatfn", "run"]
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.STDOUT,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
    }
    whole, rng, found = tmp_path / "whole", random.Random(0), []
    subprocess.run([*command, *settings, "--out", str(whole)], check=True, **quiet)
    length = (whole / LOG).stat().st_size
    for number in range(20):
        folder = tmp_path / str(number)
        process = subprocess.Popen([*command, *settings, "--out", str(folder)], **quiet)
        if number < 2:
            time.sleep(8 * rng.random())
        else:
            goal = length * (number - 2 + rng.random()) / 18  # by the log: machines are shared
            log = folder / LOG
            while (log.stat().st_size if log.exists() else -1) < goal and process.poll() is None:
                time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        begun = (folder / CONFIG).exists()
        again = ["--resume", str(folder)] if begun else [*settings, "--out", str(folder)]
        place = None
        if (folder / PROGRESS).exists():
            place = tuple(container.read_header(folder / PROGRESS)["place"])
        found.append((place, any(folder.glob(".*.tmp"))))
        subprocess.run([*command, *again], check=True, **quiet)
        assert equal(final(folder), final(whole)), f"kill {number}, {found[-1]}"
        assert left(folder)[:2] == left(whole)[:2]
    print("cut off at (task, epoch, batch), in the middle of a write:", *found, sep="\n")
    assert len({place for place, _ in found}) > 10, "the kills came too close to prove anything"
    assert len(final(whole)) > 20
