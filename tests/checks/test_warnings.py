"""A warning points at the line of the user's that led to it, however deep it was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchopt
from nets import learn, learner
from torch import nn

import hatfn
from hatfn.models import MLP

X, Y = torch.randn(8, 5), torch.arange(8) % 2
NARROW = MLP(5, 3, width=2)
WIRING = hatfn.trace(NARROW, X[:1])
HAT = learner(MLP(5, 3, width=4), X)
FULL = HAT.init(0)._replace(embeddings={g: torch.ones(3, u) for g, u in HAT.wiring.groups.items()})
OPEN = HAT.begin(HAT.init(0), 0)
STATES = hatfn.stack([OPEN, OPEN])
OFF = HAT.init(0)._replace(embeddings={g: -torch.ones(3, u) for g, u in HAT.wiring.groups.items()})
NORM = learner(nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), X, "3")
TRAINED = NORM.update(NORM.begin(NORM.init(0), 0), (X, Y), 0, 5.0)[0]


def saved(folder: Path) -> Path:
    hatfn.save(folder / "state", HAT.init(0), HAT)
    return folder / "state"


CALLS: dict[str, tuple[Callable[[Path], object], str]] = {
    "build": (lambda _: hatfn.build(NARROW, WIRING, [3] * 3, torchopt.sgd(0.1)), "fewer units in"),
    "grow": (lambda _: hatfn.grow(HAT, HAT.init(0), [2, 2]), "fewer units in"),
    "begin, full": (lambda _: HAT.begin(HAT.consolidate(FULL, 0), 1), "no free capacity|leaves fewer"),
    "begin, another": (lambda _: HAT.begin(OPEN, 1), "task 0 is open and was not consolidated"),
    "consolidate, all": (lambda _: HAT.consolidate(FULL, 0), "leaves fewer units"),
    "consolidate, none": (lambda _: HAT.consolidate(OFF, 0), "uses no unit"),
    "consolidate, statistics": (lambda _: NORM.consolidate(TRAINED, 0), "running statistics"),
    "forget": (lambda _: HAT.forget(HAT.init(0), 1), "nothing to forget"),
    "prune": (lambda _: HAT.prune(HAT.init(0), 1), "nothing to forget"),
    "replicas' begin": (lambda _: hatfn.Replicas(HAT).begin(STATES, 1), "task 0 is open"),
    "replicas' consolidate": (
        lambda _: hatfn.Replicas(NORM).consolidate(hatfn.stack([TRAINED] * 2), 0), "running statistics"),
    "load, settings": (
        lambda folder: hatfn.load(saved(folder), learner(MLP(5, 3, width=4), X, s_max=99.0)), "s_max"),
    "load, optimiser": (
        lambda folder: hatfn.load(
            saved(folder), learner(MLP(5, 3, width=4), X, optimizer=torchopt.adam(1e-3))),
        "no optimizer state"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_it_points_at_the_line_of_the_call(name: str, tmp_path: Path) -> None:
    call, words = CALLS[name]
    with pytest.warns(hatfn.HATWarning, match=words) as caught:
        call(tmp_path)
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}


def test_it_points_at_the_top_level_of_a_script() -> None:
    """Where there is no further line to point at than the script's own."""
    script = compile("import hatfn\nhatfn.grow(hat, state, [2, 2])\n", "script.py", "exec")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(script, {"hat": HAT, "state": HAT.init(0)})
    assert [(warning.filename, warning.lineno) for warning in caught] == [("script.py", 2)]


def test_a_task_that_is_closed_or_held_open_is_not_warned_of() -> None:
    wide = learner(MLP(5, 3, width=64), X)
    state = learn(wide, wide.init(0), X, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = wide.begin(state, 1)
        wide.begin(opened, [1, 2])  # it stays open
        wide.begin(opened, 2, locked=[0])  # the caller says what to lock
