"""The run loop, on the real digits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optree
import pytest
import torch
from nets import moved

import hatfn
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.loop import NonFiniteStepError, learn, start
from hatfn.experiments.run.progress import Progress
from hatfn.experiments.run.result import Learned
from hatfn.experiments.run.setup import training_part

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

ANNEALS = ("none", "linear")
QUICK = {"width": 64, "epochs": 3, "tasks": 2}


def finished(**settings) -> tuple:
    run = start(RunConfig(**QUICK | settings))
    begun, events = run.state, list(learn(run))
    assert moved(begun, run.state), "nothing was learned"
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
    begun, event = run.state, next(event for event in learn(run) if isinstance(event, Learned))
    assert moved(begun, run.state), "nothing was learned"
    return run, event


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


def test_finetuning_forgets() -> None:
    run, _ = finished(stream="permuted-digits", method="finetune", tasks=4, epochs=5)
    assert run.result.max_drift > 0.1
    assert run.result.forgetting > 0.05


def test_the_learning_rate_falls_over_a_task() -> None:
    kept, falling = (
        # A copy, because the next step of the run spends its state.
        [optree.tree_map(torch.clone, run.state) for event in learn(run) if hasattr(event, "loss")]
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
    alone.progress = Progress(1, 0, 0)  # the second task, without the first
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
