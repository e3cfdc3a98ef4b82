"""Laws of what becomes of tasks: closed, locked, forgotten, pruned, cut out, saved and loaded."""

from __future__ import annotations

import tempfile
from functools import reduce
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from nets import equal, examples, near
from torch import Tensor

import hatfn
from hatfn.method.masks import binary_gates
from hatfn.numerics.trees import take
from hatfn.state import HATState
from hatfn.testing import strategies as st_hat
from hatfn.testing import verify_pure, verify_state_stable

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MODULES = st_hat.modules(dtypes=DTYPES, max_blocks=2)


def rows(flags: Tensor) -> list[int]:
    return flags.nonzero().flatten().tolist()


def used(hat: hatfn.HAT, state: HATState, tasks: list[int]) -> dict[str, Tensor]:
    """The entries that some of the tasks depend on: a unit that is on, at every end."""
    gates = binary_gates(state)
    found = {
        name: torch.zeros(role.shape, dtype=torch.bool) for name, role in hat.wiring.shared.items()
    }
    for task in tasks:
        on = torch.cat([*(gates[group][task] for group in hat.wiring.groups), torch.ones(1).bool()])
        for name, role in hat.wiring.shared.items():
            ends = [on[units.index] for units in (role.out_units, role.in_units) if units is not None]
            found[name] = found[name] | reduce(torch.logical_and, ends)
    return found


def drawn(data: st.DataObject, learned: int) -> tuple[hatfn.HAT, HATState]:
    hat = data.draw(st_hat.learners(MODULES, min_tasks=max(2, learned)))
    return hat, data.draw(st_hat.states(hat, learned=learned))


@given(data=st.data())
@examples(15)
def test_consolidating_twice_is_to_consolidate_once(data: st.DataObject) -> None:
    hat, state = drawn(data, 0)
    task = data.draw(st.integers(0, hat.tasks - 1))
    once = verify_pure(hat.consolidate, state, task)
    verify_state_stable(hat.consolidate, state, task)
    assert once.learned[task]
    assert not once.active[task]
    assert equal(take(once.masks, task), take(binary_gates(state), task))
    assert equal(hat.consolidate(once, task), once)
    rest = {"masks": state.masks, "learned": state.learned, "active": state.active}
    assert equal(once._replace(**rest), state), "nothing else is touched"


@given(data=st.data())
@examples(15)
def test_what_is_locked_is_what_is_protected(data: st.DataObject) -> None:
    """Any subset, learned or not; the default is all that is learned."""
    hat, state = drawn(data, 1)
    task = data.draw(st.integers(0, hat.tasks - 1))
    rest = [t for t in range(hat.tasks) if t != task]
    locked = data.draw(st.lists(st.sampled_from(rest), unique=True))
    begun = verify_pure(hat.begin, state, task, locked)
    assert rows(begun.locked) == sorted(locked)
    assert equal(begun.protection, used(hat, state, locked))
    default = verify_state_stable(hat.begin, state, task)
    assert equal(default, hat.begin(state, task, [t for t in rows(state.learned) if t != task]))
    more = hat.begin(state, task, rest)
    assert all((more.protection[name] >= held).all() for name, held in begun.protection.items())


@given(data=st.data())
@examples(15)
def test_forgetting_frees_what_the_task_alone_held_and_nothing_else(data: st.DataObject) -> None:
    hat, state = drawn(data, 1)
    task = data.draw(st.sampled_from(rows(state.learned)))
    stay = [t for t in rows(state.learned | state.active) if t != task]
    x, _ = data.draw(st_hat.batches(hat, task))
    others = [t for t in rows(state.learned) if t != task]
    new, report = verify_pure(hat.forget, state, task)
    verify_state_stable(hat.forget, state, task)
    mine, theirs = used(hat, state, [task]), used(hat, state, stay)
    start = hat.init(int(state.seed), bool(state.fresh))
    for name, value in state.params.items():
        freed = mine[name] & ~theirs[name]
        assert torch.equal(report.params[name], freed)
        assert torch.equal(new.params[name], torch.where(freed, start.params[name], value))
    assert not new.learned[task]
    assert rows(new.learned) == others
    assert rows(new.locked) == [t for t in rows(state.locked) if t in stay]
    assert equal(new.protection, used(hat, new, rows(new.locked)))
    for t in others:
        assert torch.equal(hat.forward(new, x, t), hat.forward(state, x, t))
    for ours, first in ((new.task_params, start.task_params), (new.embeddings, start.embeddings)):
        assert equal(take(ours, task), take(first, task))
    again, nothing = hat.forget(new, task)
    assert equal(again, new)
    assert nothing.tasks == ()


@given(data=st.data())
@examples(15)
def test_the_order_of_forgetting_does_not_matter(data: st.DataObject) -> None:
    hat, state = drawn(data, 2)
    gone = data.draw(st.permutations(rows(state.learned)).map(lambda tasks: tasks[:2]))
    together, report = hat.forget(state, gone)
    assert report.tasks == tuple(sorted(gone))
    for order in (gone, gone[::-1]):
        one = state
        for task in order:
            one, _ = hat.forget(one, task)
        assert equal(one, together)


@given(data=st.data())
@examples(15)
def test_to_prune_is_to_forget_all_others(data: st.DataObject) -> None:
    hat, state = drawn(data, 1)
    keep = data.draw(st.lists(st.integers(0, hat.tasks - 1), min_size=1, unique=True))
    rest = [task for task in range(hat.tasks) if task not in keep]
    pruned, report = verify_pure(hat.prune, state, keep)
    if not rest:
        assert equal(pruned, state)
        return
    forgotten, same = hat.forget(state, rest, locked=keep)
    assert equal(pruned, forgotten)
    assert report.tasks == same.tasks
    assert equal(report.params, same.params)
    assert set(rows(pruned.learned)) == set(rows(state.learned)) & set(keep)


@given(data=st.data())
@examples(15)
def test_learning_and_forgetting_leaves_the_others_as_they_were(data: st.DataObject) -> None:
    """forget(t) after learn(t): nothing of t is left but what no task uses."""
    hat = data.draw(st_hat.learners(MODULES, min_tasks=2))
    state = data.draw(st_hat.states(hat, learned=1, opened=True))
    task, others = rows(state.active)[0], rows(state.learned)
    x, y = data.draw(st_hat.batches(hat, task))
    logits = [hat.forward(state, x, t) for t in others]
    trained, info = hat.update(state, (x, y), task, 5.0)
    assert info.ok
    trained = hat.consolidate(trained, task)
    assert not equal(trained.task_params, state.task_params)
    new, _ = hat.forget(trained, task)
    assert equal([hat.forward(new, x, t) for t in others], logits)
    assert rows(new.locked) == others
    assert equal(new.protection, state.protection)
    assert equal(new.masks, state.masks)
    before = used(hat, state, others)
    for name, held in before.items():
        assert torch.equal(new.params[name][held], state.params[name][held])


@given(data=st.data())
@examples(15)
def test_a_subnetwork_is_the_masked_network(data: st.DataObject) -> None:
    hat = data.draw(st_hat.learners(st_hat.modules(dtypes=DTYPES)))
    state = data.draw(st_hat.states(hat, learned=1))
    task = data.draw(st.sampled_from(rows(state.learned)))
    x, _ = data.draw(st_hat.batches(hat, task))
    small = verify_pure(hat.compact, state, task)
    assert near(small(x), hat.forward(state, x, task))
    kept = small.report.became == "sliced"
    assert (small.report.kept == small.report.used.clip(lower=1).where(kept, small.report.units)).all()


@given(data=st.data())
@examples(15)
def test_what_is_saved_comes_back_to_the_bit(data: st.DataObject) -> None:
    """Moments after a step, types of numbers, and random numbers in every leaf."""
    hat, state = drawn(data, 0)
    if state.active.any():
        task = rows(state.active)[0]
        opened, (state, _) = state, hat.update(state, data.draw(st_hat.batches(hat, task)), task, 5.0)
        assert not equal(state, opened)
    meta = data.draw(
        st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        hatfn.save(path, state, hat, meta)
        back = verify_pure(hatfn.load, path, hat)
        assert hatfn.storage.checkpoint.read_meta(path) == meta
    verify_state_stable(lambda state: back, state)
    assert equal(back, state)
