"""Nothing goes wrong in silence: it is an error, a warning that names the group and the task, or cannot be written.

Another library inverts masks at a negative scale, drops all locks where no task is given or the module is
in eval mode, and says nothing where no unit is left, or one.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from nets import ConvNet, equal, learn, learner
from wrong import CLOSED, HAT, LEARNED, MANY, OPEN, RIGHT, STATES, XS, YS, X, Y, public

import hatfn
from hatfn.models import MLP
from hatfn.state import HATState

UNTRAINED = {"HAT.forward": {"state": OPEN}, "Replicas.forward": {"states": MANY.begin(STATES, 1)}}
"""What soft gates are asked of."""


def taking(parameter: str) -> list[str]:
    """The public functions that take an argument of a name."""
    return [name for name, f in public().items() if parameter in inspect.signature(f).parameters]


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["a float", "a tensor"])
@pytest.mark.parametrize("name", taking("scale"))
def test_no_negative_scale_inverts_masks(name: str, number: Any) -> None:
    function, right = RIGHT[name]
    right = right | UNTRAINED.get(name, {})
    function(**right | {"scale": number(1.0)})
    with pytest.raises(ValueError, match=r"scale=-1\.0\. Expected a number"):
        function(**right | {"scale": number(-1.0)})


@pytest.mark.parametrize("name", ["linear's", "exponential's", "cosine's"])
def test_no_schedule_leaves_its_range(name: str) -> None:
    schedule = RIGHT[name][0]
    assert all(0 < schedule(i / 10) <= 400 for i in range(11))
    for progress in (-0.1, 1.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            schedule(progress)


@pytest.mark.parametrize("name", [*(n for n in taking("task") if n != "HAT.forward"), "HAT.prune"])
def test_no_task_is_an_error(name: str) -> None:
    function, right = RIGHT[name]
    argument = "keep" if name == "HAT.prune" else "task"
    with pytest.raises(TypeError, match=r"task=None is a NoneType\. Expected an int"):
        function(**right | {argument: None})


def test_the_module_itself_can_only_be_looked_at() -> None:
    """``forward`` is the one method that takes no task: it reads, and its gradient trains nothing."""
    weights = {n: w.clone().requires_grad_() for n, w in LEARNED.params.items()}
    state = LEARNED._replace(params=weights)
    HAT.forward(state, X, None).sum().backward()
    assert equal(weights, LEARNED.params)
    assert equal(state.protection, LEARNED.protection)


def test_no_function_takes_a_mode() -> None:
    names = {p for f in public().values() for p in inspect.signature(f).parameters}
    assert not names & {"training", "mode", "train", "eval"}


BEGINS = {
    "begin": lambda: HAT.begin(LEARNED, 2),
    "begin several": lambda: HAT.begin(LEARNED, [0, 2]),
    "a warm start": lambda: HAT.begin(LEARNED, 2, init_from="similar", batch=(X, Y)),
    "replicas": lambda: MANY.begin(CLOSED, 2),
    "replicas' warm start": lambda: MANY.begin(CLOSED, 2, init_from="similar", batch=(XS, YS)),
    "forget another": lambda: HAT.forget(HAT.begin(LEARNED, 2), 2)[0],
    "prune others": lambda: HAT.prune(HAT.begin(LEARNED, 2), 1)[0],
    "grow": lambda: hatfn.grow(HAT, HAT.begin(LEARNED, 2), [2])[1],
}


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
@pytest.mark.parametrize("way", BEGINS)
def test_every_learned_task_is_locked_unless_told_otherwise(way: str) -> None:
    state = BEGINS[way]()
    assert state.locked[..., 1].all()
    alone = HAT.begin(LEARNED, 2).protection
    assert any(held.any() for held in alone.values())
    for name, held in state.protection.items():
        if state.learned.dim() == 1:
            assert held[alone[name]].all()
        else:
            assert held.flatten(1).any(1).all()


def full(units_left: int, replicas: bool = False) -> tuple[Any, HATState]:
    """A learner whose first task has taken all but some units of hidden.1, and half of hidden.0."""
    one = HAT.init(0)
    states = STATES if replicas else one
    half = (torch.arange(16) % 2 * 2.0 - 1).expand(states.embeddings["hidden.0"].shape)
    most = (1 - (torch.arange(16) < units_left) * 2.0).expand(half.shape)
    state = states._replace(embeddings={"hidden.0": half.clone(), "hidden.1": most.clone()})
    hat: Any = MANY if replicas else HAT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hatfn.HATWarning)
        return hat, hat.consolidate(hat.begin(state, 0), 0)


WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "several": {"task": [1, 2]},
    "a warm start": {"init_from": 0},
    "similar": {"init_from": "similar", "batch": (X, Y)},
}


@pytest.mark.parametrize("replicas", [False, True], ids=["one learner", "replicas"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("left", "what"), [(0, "no free capacity"), (1, "a single free unit")])
def test_a_group_with_no_unit_left_or_one_is_named(
    left: int, what: str, way: str, replicas: bool
) -> None:
    hat, state = full(left, replicas)
    given = {"task": 1} | WAYS[way]
    if replicas and "batch" in given:
        given["batch"] = (XS, YS)
    tasks = "1, 2" if way == "several" else "1"
    with pytest.warns(hatfn.HATWarning, match=rf"begin: {what} for task {tasks} in hidden\.1:"):
        hat.begin(state, **given)


@pytest.mark.parametrize("replicas", [False, True], ids=["one learner", "replicas"])
def test_groups_with_units_to_spare_are_not(replicas: bool) -> None:
    hat, state = full(2, replicas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hat.begin(state, 1)


@pytest.mark.parametrize("replicas", [False, True], ids=["one learner", "replicas"])
def test_a_task_that_leaves_too_little_is_named(replicas: bool) -> None:
    hat, state = full(1, replicas)
    states = STATES if replicas else HAT.init(0)
    again = hat.begin(states._replace(embeddings=state.embeddings), 0)
    with pytest.warns(hatfn.HATWarning, match=r"consolidate: task 0 leaves .* in hidden\.1 \(1 of 16"):
        hat.consolidate(again, 0)


@pytest.mark.parametrize("replicas", [False, True], ids=["one learner", "replicas"])
def test_a_dead_group_is_named(replicas: bool) -> None:
    hat, state = (MANY, MANY.begin(STATES, 1)) if replicas else (HAT, OPEN)
    off = -torch.ones_like(state.embeddings["hidden.1"])
    with pytest.warns(hatfn.HATWarning, match=r"consolidate: task 1 uses no unit of hidden\.1"):
        hat.consolidate(state._replace(embeddings=state.embeddings | {"hidden.1": off}), 1)


def test_more_tasks_than_units_is_named() -> None:
    x = torch.randn(1, 1, 6, 6)
    with pytest.warns(hatfn.HATWarning, match=r"build: 9 tasks, but fewer units in conv1 \(8\)"):
        learner(ConvNet(), x, classes=[2] * 9)
    hat = learner(ConvNet(), x)
    with pytest.warns(hatfn.HATWarning, match=r"grow: 9 tasks, but fewer units in conv1 \(8\)"):
        hatfn.grow(hat, hat.init(0), [2] * 6)


def test_a_good_life_warns_of_nothing() -> None:
    hat = learner(MLP(5, 3, width=64), X, init="sparse", classes=[2, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(hat, learn(hat, hat.init(0), X, 0), X, 1)
