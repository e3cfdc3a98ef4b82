"""The tests of model.py: run them with python -m pytest examples/testing."""

import hypothesis.strategies as st
import pytest
import torch
import torchopt
from hypothesis import given, settings
from model import Average, TwoRoads, average

import hatfn
from hatfn.testing import strategies as st_hat
from hatfn.testing import (
    verify_no_forgetting,
    verify_pure,
    verify_state_stable,
    verify_vmap_equals_loop,
    verify_wiring,
)

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")  # eight units are soon used up
X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
WIRING = hatfn.trace(TwoRoads(), X[:1], head="head")
HAT = hatfn.build(TwoRoads(), WIRING, [3, 2, 4], torchopt.adamw(1e-2, weight_decay=0.1))


def test_the_wiring_is_sound_and_a_good_one() -> None:
    assert not verify_wiring(TwoRoads(), WIRING, X).untested
    assert WIRING.measures.shared == pytest.approx(1.0, abs=0.1)


@settings(deadline=None, max_examples=5)
@given(order=st_hat.task_sequences(3, min_size=1), data=st.data())
def test_nothing_is_forgotten_in_whatever_order_tasks_come(
    order: list[int], data: st.DataObject
) -> None:
    state = HAT.init(seed=0)
    for task in order:
        batch = data.draw(st_hat.batches(HAT, task))
        state = HAT.begin(state, task)
        for scale in (1.0, 20.0):
            state, _ = verify_state_stable(HAT.update, state, batch, task, scale)
        state = HAT.consolidate(state, task)
    verify_no_forgetting(HAT, state, X)


@settings(deadline=None, max_examples=5)
@given(state=st_hat.states(HAT, learned=1, opened=True), data=st.data())
def test_a_step_on_the_model_is_pure(state: hatfn.HATState, data: st.DataObject) -> None:
    task = state.active.tolist().index(True)
    verify_pure(HAT.update, state, data.draw(st_hat.batches(HAT, task)), task, 1.0)


@settings(deadline=None, max_examples=5)
@given(hat=st_hat.learners(max_tasks=2), seeds=st.lists(st.integers(0, 9), min_size=2, max_size=3))
def test_the_average_is_a_pure_step_of_any_learner(hat: hatfn.HAT, seeds: list[int]) -> None:
    states = [hat.init(seed, fresh=True).params for seed in seeds]
    start = Average(torch.tensor(0.0), states[0])
    first = verify_pure(average, start, states[1])
    torch.testing.assert_close(first.params, states[1])
    verify_state_stable(average, first, states[0])
    many = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    verify_vmap_equals_loop(average, start, many, in_dims=(None, 0))
