"""What is printed is one line, whatever it holds."""

from __future__ import annotations

import pytest
import torch
from nets import ConvNet, learn, learner

import hatfn
from hatfn.models import MLP

X, Y = torch.randn(8, 5), torch.arange(8) % 2
HAT = learner(MLP(5, 3, width=16), X)
STATE = HAT.begin(learn(HAT, HAT.init(0), X, 0), 2)


def shown(thing: object, *words: str) -> None:
    text = repr(thing)
    assert "\n" not in text
    assert len(text) < 160
    for word in words:
        assert word in text


def test_a_state() -> None:
    shown(STATE, "HATState(3 tasks", "learned [0]", "open [2]", "MB on cpu")
    shown(hatfn.stack([STATE, STATE]), "2 replicas of 3 tasks", "learned [0]")
    seen = []
    torch.vmap(lambda state: seen.append(repr(state)) or state.learned)(hatfn.stack([STATE, STATE]))
    assert seen[0].startswith("HATState(inside a transform")


def test_a_learner_and_its_wiring() -> None:
    shown(HAT, "HAT(MLP, 3 tasks, classes [3, 2, 3], 2 groups of 32 units, 368 shared weights)")
    shown(learner(MLP(5, 3, width=1000), X), "1.01 M shared weights)")
    shown(HAT.wiring, "Wiring(2 groups of 32 units", "100.0% of the parameters shared", "head.weight")
    shown(HAT.wiring.params["hidden.1.weight"].in_units, "Units(", "hidden.0")
    many = learner(MLP(5, 3, width=100), X, classes=[2] * 100)
    shown(many, "100 tasks", "... 100 in all")


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_what_functions_report() -> None:
    shown(hatfn.readiness(HAT, STATE, [(X, Y)], 2), "Readiness(", "undecided", "as served")
    shown(HAT.forget(STATE, 0)[1], "Forgotten(tasks [0]", "given back")
    shown(HAT.compact(STATE, 0), "Subnet(", "numbers", "groups")
    shown(HAT.update(STATE, (X, Y), 2, 5.0)[1], "Info(loss ", "ok True")
    shown(
        HAT.update(HAT.begin(STATE, [1, 2]), (torch.stack([X, X]), torch.stack([Y, Y])), [1, 2], 5.0)[1]
    )


def test_numbers_are_those_of_the_state() -> None:
    images = torch.randn(4, 1, 8, 8)
    state = learner(ConvNet(), images).init(0)
    size = sum(hatfn.memory(state)) / 1e6
    assert f"{size:.1f} MB" in repr(state)
