"""Bad input: where, what was expected, what came and how to mend it; and the caller loses nothing."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import wrong_building
import wrong_reading
import wrong_training
from nets import equal, moved
from wrong import CLOSED, HAT, LEARNED, OPEN, OPENED, RIGHT, START, Wrong, X, Y, public

from hatfn.numerics.trees import tree_map

CASES = [*wrong_training.CASES, *wrong_building.CASES, *wrong_reading.CASES]
pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

KEPT = tree_map(torch.clone, (OPEN, LEARNED, OPENED, CLOSED))
NEEDS_NOTHING = {
    "gate embedding": "any tensor of floating numbers is right",
    "hard_gate embedding": "the same",
    "cross_entropy y": "PyTorch says what is wrong with it",
    "cross_entropy options": "the same",
    "gate gate_fn": "any function is right; build() checks that it is one",
    "accuracy logits": "what the labels are compared with",
    "drift before": "what the other is compared with",
    "forgetting_ratio accuracies": "what the others are compared with",
    "verify_pure function": "whatever cannot be called says so itself",
    "verify_pure args": "the function's own",
    "verify_pure kwargs": "the same",
    "verify_state_stable function": "whatever cannot be called says so itself",
    "verify_state_stable state": "the function's own",
    "verify_state_stable args": "the same",
    "verify_state_stable kwargs": "the same",
    "verify_vmap_equals_loop function": "whatever cannot be called says so itself",
    "verify_vmap_equals_loop args": "the function's own",
    "verify_vmap_equals_loop in_dims": "torch.vmap's own, which says what is wrong",
    "verify_vmap_equals_loop randomness": "the same",
    "verify_vmap_equals_loop rtol": "torch.testing's own",
    "verify_vmap_equals_loop atol": "the same",
}
"""Parameters without a wrong argument, and why. So are flags: whatever they are given is true or false."""


def identity(case: Wrong) -> str:
    return f"{case.function} {case.parameter} {str(case.value)[:24]!r}"


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_bad_input_gets_a_clear_error(case: Wrong) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error, "a subclass tells of something else"
    for word in case.words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"
    assert equal(KEPT, (OPEN, LEARNED, OPENED, CLOSED)), "the caller lost something"


@pytest.mark.parametrize("name", sorted(RIGHT.keys() - {"save", "load", "read_meta"}))
def test_the_calls_are_right_but_for_one_argument(name: str) -> None:
    function, right = RIGHT[name]
    function(**right)


def test_every_parameter_of_every_public_function_has_a_wrong_argument() -> None:
    tried = {f"{case.function} {case.parameter}" for case in CASES}
    wanted = {
        f"{name} {parameter.name}"
        for name, function in public().items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self" and not isinstance(parameter.default, bool)
    }
    assert wanted - tried == {*NEEDS_NOTHING}


def test_integers_without_an_input_cannot_be_sliced() -> None:
    with pytest.raises(ValueError, match=r"random numbers.*hat\.compact\(state, task, x=batch\)"):
        wrong_training.unreadable()


@pytest.mark.parametrize("task", [np.int64(1), torch.tensor(1), np.array(1)], ids=repr)
def test_other_integers_are_tasks(task: Any) -> None:
    state = HAT.begin(START, task)
    begun, (state, info) = state, HAT.update(state, (X, Y), task, 1.0)
    assert info.ok
    assert moved(begun, state)
    assert HAT.forward(HAT.consolidate(state, task), X, task).shape == (8, 2)
