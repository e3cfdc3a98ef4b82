"""The command line: what a run prints and leaves, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hatfn
from hatfn.evaluation import metrics
from hatfn.experiments import cli
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.loop import start
from hatfn.storage import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

COLLAPSES = {
    "the first takes everything": (
        ["--init", "dense", "--sparsity", "0"],
        "task 0 leaves fewer units than there are tasks to come (1) in hidden.0 (0 of 20 free), hidden.1",
    ),
    "switched off": (
        ["--sparsity", "1e4", "--lr", "0.3"], "task 0 uses no unit of hidden.0, hidden.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_run_that_collapses_says_so_and_names_the_group(name: str, tmp_path: Path, capsys) -> None:
    settings, said = COLLAPSES[name]
    quick = ["run", "--width", "20", "--epochs", "1", "--tasks", "2", "--out", str(tmp_path)]
    cli.main([*quick, *settings])
    assert said in " ".join(capsys.readouterr().out.split())
    cli.main(quick)
    assert " uses no unit" not in " ".join((other := capsys.readouterr().out).split())
    assert " leaves fewer" not in " ".join(other.split())


def test_the_command_leaves_its_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    cli.main(["run", "--tasks", "2", "--epochs", "2", "--width", "64", "--out", str(out)])
    printed = capsys.readouterr().out
    for word in (
        "Accuracy",
        "task inferred",
        "Mask use",
        "ACC",
        "class-inc.",
        "BWT",
        "forgetting",
        "drift       0.0",
        "hidden.0",
    ):
        assert word in printed
    names = {path.name for path in out.iterdir()}
    plots = {"accuracy_matrix.png", "mask_use.png", "capacity.png", "training.png"}
    states = {"state.safetensors", "progress.safetensors"}
    assert names == plots | states | {"config.json", "metrics.jsonl", "result.json"}
    assert all((out / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    result = json.loads((out / "result.json").read_text())
    assert result["drift"] == 0.0
    assert result["acc"] > 0.8
    assert result["accuracy_matrix"][0][1] is None
    assert result["class_incremental_matrix"][0] == [result["accuracy_matrix"][0][0], None]
    held = sum(result["memory"].values())
    assert f"state {held / 2**20:.2f} MiB: params" in " ".join(printed.split())
    assert {
        "accuracy_matrix", "acc", "bwt", "forgetting", "drift", "free_capacity", "seconds",
        "class_incremental_matrix", "class_incremental", "task_inference",
    } <= result.keys()  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines if "accuracies" in line] == [0, 1]
    config = json.loads((out / "config.json").read_text())
    assert config["epochs"] == 2

    run = start(RunConfig(**config | {"out": None}))
    state = hatfn.load(out / "state.safetensors", run.hat.wiring)
    logits = run.hat.forward(state, run.prepare(run.stream[1].test.x), 1)
    assert metrics.accuracy(logits, run.stream[1].test.y) == result["accuracy_matrix"][1][1]
    kept = {n: v for n, v in config.items() if n not in ("out", "resume", "save_every")}
    assert checkpoint.read_meta(out / "state.safetensors")["config"] == kept, (
        "but for where and how often"
    )


def test_a_wrong_flag_ends_in_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--model", "resnt18", "--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert "resnt18" in capsys.readouterr().out


def test_the_command_shows_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    flags = ["--tasks", "2", "--epochs", "1", "--width", "32", "--method", "joint", "--out", str(out)]
    cli.main(["run", *flags, "--seeds", "2"])
    printed = " ".join(capsys.readouterr().out.split())
    result = json.loads((out / "result.json").read_text())
    accs = [one["acc"] for one in result["seeds"].values()]
    assert result["acc"] == pytest.approx(np.mean(accs))
    assert min(accs) > 0.6
    assert f"ACC {np.mean(accs):.4f} ± {np.std(accs, ddof=1):.4f}" in printed
    assert "BWT - backward transfer" in printed
    assert result["bwt"] is None
    config = json.loads((out / "config.json").read_text())
    run = start(RunConfig(**config | {"out": None, "seed": 1, "seeds": 1}))
    state = hatfn.load(out / "state-1.safetensors", run.hat.wiring)
    logits = run.hat.forward(state, run.prepare(run.stream[1].test.x), 1)
    accuracy = metrics.accuracy(logits, run.stream[1].test.y)
    assert accuracy == result["seeds"]["1"]["accuracy_matrix"][1][1]
    assert checkpoint.read_meta(out / "state-1.safetensors")["config"]["seed"] == 1


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("seeds", 0, "at least 1"), ("epochs", 0, "at least 1"), ("batch_size", -1, "at least 1"),
        ("width", 0, "at least 1"), ("depth", 0, "at least 1"), ("image_size", 0, "at least 1"),
        ("lr", math.nan, "a number"), ("device", "abacus", "cannot be used"), ("device", "meta", "cannot be used"),
        ("model", "resnet18.nothing", "Expected 'resnet18'"),
    ],
)  # fmt: skip
def test_settings_that_no_run_can_have(name: str, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=rf"run: {name}={value!r}.*{match}"):
        start(RunConfig(**{name: value}))
