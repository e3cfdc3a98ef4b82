"""The run loop and the command line, on the real digits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hatfn
from hatfn.evaluation import metrics
from hatfn.experiments import atlas, cli
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.loop import NonFiniteStepError, learn, start
from hatfn.experiments.run.measure import CALIBRATION_IMAGES, representative
from hatfn.experiments.run.progress import Place
from hatfn.experiments.run.result import Learned
from hatfn.experiments.run.setup import batches, training_part
from hatfn.experiments.streams import Part, make_stream
from hatfn.storage import checkpoint
from hatfn.wiring import Measures

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
ANNEALS = ("none", "linear")
QUICK = {"width": 64, "epochs": 3, "tasks": 2}


@given(count=st.integers(2, 200), size=st.integers(2, 64))
def test_an_epoch_is_every_image_once_and_no_batch_of_one(count: int, size: int) -> None:
    data = Part(torch.arange(count), torch.arange(count))
    parts = list(batches(data, size, torch.Generator().manual_seed(0)))
    assert torch.cat([part.y for part in parts]).sort().values.tolist() == list(range(count))
    assert max(len(part.y) for part in parts) <= size
    assert min(len(part.y) for part in parts) >= min(2, size // 2)


def test_test_images_take_no_part_in_a_search() -> None:
    task = make_stream("split-digits", None, 0)[0]
    held = training_part(RunConfig(evaluate_on="validation"), task)
    full = training_part(RunConfig(), task)
    assert len(full.y) == len(task.train.y) + len(task.validation.y)
    assert torch.equal(held.x, task.train.x)


def finished(**settings) -> tuple:
    run = start(RunConfig(**QUICK | settings))
    events = list(learn(run))
    return run, events


@pytest.mark.parametrize("stream", ["split-digits", "permuted-digits", "rotated-digits"])
def test_a_run_learns_and_nothing_drifts(stream: str) -> None:
    run, events = finished(stream=stream, epochs=4)
    result = run.result
    assert result.max_drift == 0.0
    assert result.bwt == 0.0
    assert result.acc > (0.9 if stream == "split-digits" else 0.75)
    assert np.isnan(result.accuracy_matrix[0, 1])
    given, inferred = result.accuracy_matrix, result.class_incremental
    assert np.array_equal(np.isnan(inferred), np.isnan(given))
    assert inferred[0, 0] == given[0, 0]  # one task needs no inference
    assert (inferred <= given)[~np.isnan(given)].all()
    assert (inferred[-1] <= result.task_inference).all()
    logits = [run.hat.predict(run.state, run.prepare(task.test.x)) for task in run.stream]
    found = [hatfn.infer_task(each) == index for index, each in enumerate(logits)]
    shares = [each.double().mean().item() for each in found]
    assert result.task_inference.tolist() == pytest.approx(shares, abs=2 / 180)
    assert 0 < result.class_acc < result.acc
    assert events[-1].class_incremental == inferred[-1].tolist()
    steps = [event for event in events if hasattr(event, "loss")]
    assert len(steps) == sum(
        4 * math.ceil(len(training_part(run.config, task).y) / 32) for task in run.stream
    )
    assert min(step.scale for step in steps) == pytest.approx(1 / run.config.s_max)


def test_a_run_in_parts_that_checkpoints() -> None:
    settings = {"model": "test_resnet", "image_size": 32, "epochs": 1, "batch_size": 128}
    run, events = finished(**settings, accumulate=2, grad_checkpointing=True)
    assert run.hat.accumulate == 2
    assert run.hat.network.recomputes
    assert run.result.max_drift == 0.0
    losses = [event.loss for event in events if hasattr(event, "loss")]
    assert min(losses) < losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_a_run_of_compiled_steps(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchOpt's optimisers take the steps of torch's, up to rounding."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, leaves: graph)
    settings = {"width": 20, "epochs": 1, "tasks": 2, "optimizer": optimizer, "lr": 1e-3}
    decay = {"weight_decay": 1e-3, "momentum": 0.9 if optimizer in ("sgd", "rmsprop") else 0.0}
    (plain, before), (compiled, after) = (
        finished(**settings, **decay, compile=part) for part in ("none", "step")
    )
    assert len(compiled.hat.graphs)
    assert not plain.hat.compile
    assert compiled.result.max_drift == 0.0
    pairs = zip(before, after, strict=True)
    losses = [(a.loss, b.loss) for a, b in pairs if hasattr(a, "loss")]
    assert len(losses) > 10
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-3)


def closed(**settings: Any) -> tuple[Any, Any]:
    """A network with batch norm after its first task, and what the run says of that."""
    quick = {"model": "test_resnet", "image_size": 32, "epochs": 1, "batch_size": 128, "tasks": 5}
    run = start(RunConfig(**quick | settings))
    return run, next(event for event in learn(run) if isinstance(event, Learned))


def served(run: Any) -> float:
    """The first task's loss as it is served, on its training images."""
    data = training_part(run.config, run.stream[0])
    logits = run.hat.forward(run.state, run.prepare(data.x), 0)
    return torch.nn.functional.cross_entropy(logits, data.y).item()


def test_a_run_takes_the_statistics_that_serve_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so; those that serve worse it does not take."""
    never, always, measured = (closed(recalibrate=how) for how in ("never", "always", "measured"))
    assert [event.recalibrated for _, event in (never, always, measured)] == [False, True, True]
    assert served(always[0]) < served(never[0]) - 0.01
    assert served(measured[0]) == served(always[0])

    def worse(spec: hatfn.HAT, state: hatfn.HATState, *_: Any) -> hatfn.HATState:
        return state._replace(task_buffers={n: 0 * b for n, b in state.task_buffers.items()})

    monkeypatch.setattr("hatfn.lifecycle.consolidate.recalibrate", worse)
    run, event = closed()
    assert not event.recalibrated
    assert served(run) == served(never[0])


def test_a_run_reports_what_serving_changes() -> None:
    """By the statistics that it took, those of training being of no use here."""
    run, event = closed()
    data = training_part(run.config, run.stream[0])
    whole = [(run.prepare(data.x), data.y)]
    state = run.state._replace(learned=run.state.learned & False)
    seen = hatfn.readiness(run.hat, state, whole, 0)
    assert event.undecided == sum(int(units.sum()) for units in seen.undecided.values()) > 0
    assert event.gap == pytest.approx(seen.gap.item(), abs=1e-4)
    assert abs(event.gap) > 5e-3


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


def test_finetuning_forgets() -> None:
    run, _ = finished(stream="permuted-digits", method="finetune", tasks=4, epochs=5)
    assert run.result.max_drift > 0.1
    assert run.result.forgetting > 0.05


def test_the_learning_rate_falls_over_a_task() -> None:
    kept, falling = (
        [run.state for event in learn(run) if hasattr(event, "loss")]
        for run in (
            start(RunConfig(**QUICK | {"epochs": 1, "seeds": 2}, anneal=how)) for how in ANNEALS
        )
    )
    half = len(falling) // 2  # two tasks of equally many steps, or nearly
    factors = [state.hyper["lr"] for state in falling]
    assert all(factor.shape == (2,) for factor in factors)
    assert factors[0].tolist() == factors[half].tolist() == [1, 1]
    assert factors[half - 1].tolist() == pytest.approx([1 / half] * 2)
    last = "hidden.1.weight"
    assert torch.equal(kept[0].params[last], falling[0].params[last])
    moved = [
        (states[half - 1].params[last] - states[half - 2].params[last]).norm()
        for states in (kept, falling)
    ]
    assert 0 < moved[1] < 0.2 * moved[0]


def test_tasks_may_be_inferred_at_the_end_alone() -> None:
    always, _ = finished(epochs=1, seeds=2)
    end, events = finished(epochs=1, seeds=2, infer="end")
    for one, other in zip(end.results, always.results, strict=True):
        assert np.isnan(one.class_incremental[0]).all()
        assert np.array_equal(one.class_incremental[1], other.class_incremental[1])
        assert np.array_equal(one.accuracy_matrix, other.accuracy_matrix, equal_nan=True)
    first, last = [event for event in events if isinstance(event, Learned)]
    assert (first.class_incremental, first.task_inference) == ([], [])
    assert last.class_incremental == end.result.class_incremental[1].tolist()


def test_isolated_networks_know_nothing_of_each_other() -> None:
    both, _ = finished(method="isolated", epochs=1)
    alone = start(both.config)
    alone.place = Place(1, 0, 0)  # the second task, without the first
    for event in learn(alone):
        if event.step == event.steps:  # trained; the first task cannot be measured
            break
    for index, same in ((0, False), (1, True)):
        for name in ("hidden.0.weight", "hidden.1.bias", "head.weight"):
            own, other = (run.state.task_params[name][index] for run in (both, alone))
            assert torch.equal(own, other) == same


def test_frozen_features_are_those_of_the_first_task() -> None:
    run = start(RunConfig(**QUICK | {"epochs": 1}, method="frozen"))
    seen = [run.state]
    for event in learn(run):
        if isinstance(event, Learned):
            seen.append(run.state)
    for name in run.state.params:
        before, first, last = (state.params[name] for state in seen)
        assert not torch.equal(before, first)
        assert torch.equal(first, last)
    heads = [state.task_params["head.weight"][1] for state in seen]
    assert torch.equal(*heads[:2])
    assert not torch.equal(*heads[1:])


def test_runs_repeat_to_the_bit_and_leave_the_global_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again = finished(dropout=0.2)[0], finished(dropout=0.2)[0]
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state.params.items():
        assert torch.equal(value, again.state.params[name])
    assert np.array_equal(first.result.accuracy_matrix, again.result.accuracy_matrix, equal_nan=True)


def test_any_timm_name_runs() -> None:
    run, _ = finished(model="resnet10t", image_size=32, epochs=1, tasks=5)
    assert run.result.max_drift == 0.0
    with pytest.raises(ValueError, match=r"model='resnt18'.*Expected mlp or a timm model"):
        start(RunConfig(model="resnt18"))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    run = start(RunConfig(**QUICK, optimizer="sgd", lr=1e30, max_norm=None))
    with pytest.raises(NonFiniteStepError, match=r"step \d+ of task 0 .*refused"):
        list(learn(run))
    assert all(value.isfinite().all() for value in run.state.params.values())


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


def test_measures_of_an_accuracy_matrix() -> None:
    matrix = np.array([[0.9, np.nan, np.nan], [0.7, 0.8, np.nan], [0.8, 0.6, 1.0]])
    assert metrics.average_accuracy(matrix) == pytest.approx(0.8)
    assert metrics.backward_transfer(matrix) == pytest.approx((-0.1 - 0.2) / 2)
    assert metrics.forgetting(matrix) == pytest.approx((0.1 + 0.2) / 2)
    one = np.array([[0.9]])
    assert (metrics.backward_transfer(one), metrics.forgetting(one)) == (0.0, 0.0)


def test_hatfn_trace_shows_and_verifies_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["trace", "test_vit", "--verify", "--side", "64"])
    shown = capsys.readouterr().out
    for part in ("test_vit, 64 px", "patch_embed.proj", "pos_embed (1, 17, 64)", "fell back   0"):
        assert part in shown
    assert "verified    50 shared parameters; not tested: none" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "is not a timm model"),
        ([], "Write hatfn trace resnet18"),
        (["test_vit", "--side", "7"], "takes no image of 7 pixels"),
    ],
)
def test_hatfn_trace_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["trace", *arguments])
    assert message in capsys.readouterr().out.replace("\n", " ")


def test_the_table_of_families_tells_good_from_bad() -> None:
    measures = Measures(1.0, 0.99, 0.25, 8)
    good = atlas.Entry("a", "a_1", "64 px", 10, measures, 1, untested=())
    bad = atlas.Entry("b", "b_1", "64 px", 10, measures._replace(shared=0.5), 1, untested=("w",))
    broken = atlas.Entry("c", "c_1", error="RuntimeError: no")
    assert [atlas.good(entry) for entry in (good, bad, broken)] == [True, False, False]
    text = atlas.markdown([good, bad, broken])
    assert "Traced: 2 of 3. Passed the perturbation test: 2 (1 parameters" in text
    assert "| passed; not tested: w |" in text
    assert "- c: RuntimeError: no" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.slow
def test_the_sweep_traces_the_smallest_of_a_family() -> None:
    (entry,) = atlas.sweep(True, ["starnet"])
    assert entry.model == "starnet_s050"
    assert atlas.good(entry)
    assert entry.untested == ()


def test_seeds_at_once_are_the_runs_of_each_seed() -> None:
    """The same accuracies, and weights and embeddings to rounding: a short run, before roundings grow."""
    together, _ = finished(stream="permuted-digits", seeds=3, epochs=1, width=32)
    assert together.seeds == [0, 1, 2]
    for seed, result, state in zip(together.seeds, together.results, together.states, strict=True):
        alone, _ = finished(stream="permuted-digits", seed=seed, epochs=1, width=32)
        np.testing.assert_allclose(result.accuracy_matrix, alone.result.accuracy_matrix, atol=0.01)
        np.testing.assert_allclose(result.drift, 0.0)
        for name, value in alone.state.embeddings.items():
            torch.testing.assert_close(state.embeddings[name], value, rtol=1e-3, atol=1e-3)
    mean, each = together.result, together.results
    assert mean.acc == pytest.approx(np.mean([one.acc for one in each]))
    assert len({one.acc for one in each}) > 1, "every seed has its own weights and order"


def test_all_tasks_in_the_same_steps_are_the_upper_bound() -> None:
    joint, events = finished(method="joint", tasks=5, epochs=4)
    finetune, _ = finished(method="finetune", tasks=5, epochs=4)
    assert joint.result.acc > 0.97 > finetune.result.acc
    matrix = joint.result.accuracy_matrix
    assert np.isnan(matrix[:-1]).all()
    assert not np.isnan(matrix[-1]).any()
    assert joint.state.learned.all()
    steps = [event for event in events if hasattr(event, "loss")]
    longest = max(len(training_part(joint.config, task).y) for task in joint.stream)
    assert len(steps) == 4 * math.ceil(longest / 32)


def test_the_command_shows_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    flags = ["--tasks", "2", "--epochs", "1", "--width", "32", "--method", "joint", "--out", str(out)]
    cli.main(["run", *flags, "--seeds", "2"])
    printed = " ".join(capsys.readouterr().out.split())
    result = json.loads((out / "result.json").read_text())
    accs = [one["acc"] for one in result["seeds"].values()]
    assert result["acc"] == pytest.approx(np.mean(accs))
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


def test_a_task_is_closed_on_batches_of_all_its_classes() -> None:
    """Although its images come class after class, as from generators and folders."""
    y = torch.arange(5).repeat_interleave(200)
    some = representative(Part(torch.arange(1000), y), 32, seed=0)
    rows = torch.cat([x for x, _ in some])
    assert len(rows) == len(rows.unique()) == CALIBRATION_IMAGES
    for x, labels in some:
        assert torch.equal(labels, y[x])
        assert len(labels.unique()) == 5
    odd = representative(Part(torch.arange(33), torch.zeros(33)), 32, seed=0)
    assert [len(x) for x, _ in odd] == [32], "one image has no variance"
