"""Forgetting and pruning: exactly what is asked for goes, and nothing else moves."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
import torchopt
from nets import equal, learn, learner, moved, outputs
from torch import Tensor

import hatfn
import hatfn.models
from hatfn.method.masks import binary_gates
from hatfn.method.protection import exact_protection
from hatfn.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def own(state: hatfn.HATState, task: int) -> Any:
    trees = (state.task_params, state.task_buffers, state.embeddings)
    return [{name: leaf[task] for name, leaf in tree.items()} for tree in trees]


def needed(hat: hatfn.HAT, state: hatfn.HATState, tasks: list[int]) -> dict[str, Tensor]:
    """The shared entries that some tasks use, by definition."""
    return exact_protection(hat.wiring, binary_gates(state), hat.flags(state, tasks))


def test_forgetting_gives_back_what_only_the_task_used(case) -> None:
    hat, x, states = case
    state = states["three"]
    before = outputs(hat, state, x, 0, 2)
    new, report = hat.forget(state, 1)
    assert equal(outputs(hat, new, x, 0, 2), before), "other tasks moved"
    assert report.tasks == (1,)

    start, mine, others = states["none"], needed(hat, state, [1]), needed(hat, state, [0, 2])
    freed = 0
    for name, value in new.params.items():
        gone = mine[name] & ~others[name]
        assert torch.equal(report.params[name], gone)
        assert torch.equal(value, torch.where(gone, start.params[name], state.params[name]))
        freed += int((value != state.params[name]).sum())
        counts = report.counts.loc[name]
        assert counts["forgotten"] == gone.sum()
        assert counts["kept"] == others[name].sum()
        assert counts.sum() == gone.numel()
    assert freed, "nothing changed, so nothing is proven"
    assert equal(own(new, 1), own(start, 1)), "its own values are its initial ones"
    assert not equal(own(state, 1), own(start, 1))
    assert equal([own(new, 0), own(new, 2)], [own(state, 0), own(state, 2)])
    assert not any(mask[1].any() for mask in new.masks.values())
    assert new.learned.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="never learned"):
        hat.forward(new, x, 1)


def test_what_was_freed_can_be_learned_in_again(case) -> None:
    """The task that follows moves weights that no step could move before, and the others stay."""
    hat, x, states = case
    state = states["three"]
    before = outputs(hat, state, x, 0, 2)
    free, report = hat.forget(state, 1)
    begun = hat.begin(free, 1)
    for name, gone in report.params.items():
        assert not (begun.protection[name] & gone).any(), "still protected"
    again = learn(hat, free, x, 1)
    moved = sum(int((again.params[n] != free.params[n])[g].sum()) for n, g in report.params.items())
    assert moved
    assert equal(outputs(hat, again, x, 0, 2), before)
    assert again.learned.all()


def signs(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Whether two numbers of four have the same sign; the others are zero."""
    x = torch.zeros(count, 4)
    x[:, first : first + 2] = torch.randn(count, 2)
    return x, (x[:, first] * x[:, first + 1] > 0).long()


def test_a_task_that_could_not_be_learned_is_learned_in_what_was_freed() -> None:
    """Two tasks take all units and never look at two of the numbers, which the third is about."""
    module = MLP(4, 2, width=32)
    with torch.no_grad():
        module.hidden[0].weight[:, 2:] = 0
    optimizer = torchopt.adam(2e-2)
    hat = learner(module, torch.zeros(1, 4), classes=[2] * 3, optimizer=optimizer, sparsity=0.0)

    def taught(state: hatfn.HATState, task: int, units: range, first: int, steps: int) -> Any:
        e = torch.where(torch.isin(torch.arange(32), torch.tensor(units)), 2.0, -2.0)
        state = hat.begin(state, task)
        row = torch.tensor([task])
        state = state._replace(
            embeddings={g: old.index_copy(0, row, e[None]) for g, old in state.embeddings.items()}
        )
        for _ in range(steps):
            state, _ = hat.update(state, signs(first, 64), task, None)
        return hat.consolidate(state, task)

    def right(state: hatfn.HATState) -> float:
        x, y = signs(2, 500)
        return (hat.forward(state, x, 2).argmax(-1) == y).double().mean().item()

    state = taught(taught(hat.init(0), 0, range(16), 0, 20), 1, range(16, 32), 0, 20)
    assert not hatfn.usage(state, hat.wiring)["free"].any()
    assert right(taught(state, 2, range(32), 2, 20)) < 0.6, "of the two numbers nothing is seen"
    free, _ = hat.forget(state, 1)
    again = taught(free, 2, range(32), 2, 100)
    assert right(again) > 0.9
    x, _ = signs(0, 8)
    assert torch.equal(hat.forward(again, x, 0), hat.forward(state, x, 0))


def test_prune_is_to_forget_all_others(case) -> None:
    hat, x, states = case
    state = states["three"]
    new, report = hat.prune(state, 1)
    assert equal(new, hat.forget(state, [0, 2])[0])
    assert equal(new, hat.forget(state, [2, 0])[0])
    assert report.tasks == (0, 2)
    assert new.learned.tolist() == [False, True, False]
    assert equal(outputs(hat, new, x, 1), outputs(hat, state, x, 1))
    entries = needed(hat, state, [1])
    for name, value in new.params.items():  # what no task ever used keeps what training left there
        used = needed(hat, state, [0, 1, 2])[name]
        left = torch.where(entries[name] | ~used, state.params[name], states["none"].params[name])
        assert torch.equal(value, left)


def test_a_dry_run_reports_the_same_and_changes_nothing(case) -> None:
    hat, _, states = case
    state = states["three"]
    for action in (lambda dry: hat.forget(state, 0, dry_run=dry), lambda dry: hat.prune(state, 2, dry)):
        (same, would), (_, was) = action(True), action(False)
        assert same is state
        assert would.tasks == was.tasks
        assert equal(would.params, was.params)
        assert would.counts.equals(was.counts)
        assert would.counts["forgotten"].sum() > 0


def test_the_order_of_forgetting_does_not_matter(case) -> None:
    hat, _, states = case
    state = states["three"]
    ways = [
        hat.forget(hat.forget(state, 0)[0], 2)[0],
        hat.forget(hat.forget(state, 2)[0], 0)[0],
        hat.forget(state, [0, 2])[0],
    ]
    assert equal(ways[0], ways[1])
    assert equal(ways[0], ways[2])


def test_locked_tasks_are_kept_where_others_are_not() -> None:
    """forget(locked=...): a learned task that is left out loses what it shared with the forgotten."""
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=16), x)
    state = hat.init(0)
    for task in range(3):
        state = learn(hat, state, x, task)
    before = hat.forward(state, x, 1)
    kept, _ = hat.forget(state, 0, locked=[1])
    assert torch.equal(hat.forward(kept, x, 1), before)
    assert kept.learned.tolist() == [False, True, True]
    assert not kept.locked[2], "the state says that it is no longer guaranteed"
    loose, _ = hat.forget(state, 0, locked=[])
    assert not torch.equal(hat.forward(loose, x, 1), before)


def test_an_open_task_is_kept_and_goes_on() -> None:
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    hat = learner(MLP(5, 3, width=16), x)
    state = hat.begin(learn(hat, learn(hat, hat.init(0), x, 0), x, 1), 2)
    state, _ = hat.update(state, (x, y), 2, 20.0)
    gates = binary_gates(state)
    new, report = hat.forget(state, 0)
    used = exact_protection(hat.wiring, gates, hat.flags(state, [1, 2]))
    assert not any((report.params[name] & used[name]).any() for name in used)
    assert new.active.tolist() == [False, False, True]
    freed = [report.params[n] & new.protection[n] for n in report.params]
    assert not any(entries.any() for entries in freed), "free for the task that is open"
    kept, (new, info) = new, hat.update(new, (x, y), 2, 40.0)
    assert info.ok
    assert moved(kept, new)
    assert torch.equal(hat.forward(new, x, 1), hat.forward(state, x, 1))
    gone, report = hat.forget(state, 2)  # its training is dropped
    assert report.tasks == (2,)
    assert not gone.active.any()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("protection", ["exact", "paper"])
def test_all_forgotten_is_the_beginning(fresh: bool, protection: str) -> None:
    """But for weights that no task used, which no task depends on either."""
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=16), x, protection=protection, optimizer=torchopt.adam(1e-2))
    start = hat.init(3, fresh=fresh)
    state = start
    for task in range(3):
        state = learn(hat, state, x, task)
    used = needed(hat, state, [0, 1, 2])
    new, _ = hat.forget(state, range(3))
    for name, value in new.params.items():
        assert torch.equal(value[used[name]], start.params[name][used[name]])
    same = {"params": start.params}
    assert equal(new._replace(**same), start), "every other leaf, to the bit"


@pytest.mark.filterwarnings("default::hatfn.HATWarning")
def test_nothing_to_forget_warns() -> None:
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=64), x)
    state = hat.init(0)
    with pytest.warns(hatfn.HATWarning, match="forget: nothing to forget: task 1 was never trained"):
        same, report = hat.forget(state, 1)
    assert same is state
    assert report.counts["forgotten"].sum() == 0
    state = learn(hat, state, x, 0)
    with pytest.warns(hatfn.HATWarning, match="prune: nothing to forget: no other task"):
        same, _ = hat.prune(state, 0)
    assert same is state
    with pytest.warns(hatfn.HATWarning, match="forget: nothing to forget: no task was given"):
        assert hat.forget(state, [])[0] is state
    with pytest.warns(hatfn.HATWarning, match="task 1, 2 was"):
        new, report = hat.forget(state, [0, 1, 2])
    assert report.tasks == (0,)
    assert not new.learned.any()


def test_a_task_that_was_closed_untrained_or_only_opened_is_forgotten_too() -> None:
    """Its values are the initial ones; its mask or its being open is not."""
    hat = learner(MLP(5, 3, width=16), torch.zeros(1, 5))
    start = hat.init(0)
    for state in (hat.consolidate(start, 1), hat.begin(start, 1)):
        new, report = hat.forget(state, 1)
        assert report.tasks == (1,)
        assert not (new.learned | new.active).any()
        assert not any(mask.any() for mask in new.masks.values())


def test_nothing_given_is_changed(case) -> None:
    hat, _, states = case
    state = states["three"]
    leaves = optree.tree_leaves(state)
    before = [(leaf.clone(), leaf._version) for leaf in leaves]
    hat.forget(state, [0, 1])
    hat.prune(state, 1)
    hatfn.grow(hat, state, classes=[4])
    for leaf, (bytes_, version) in zip(leaves, before, strict=True):
        assert torch.equal(leaf, bytes_)
        assert leaf._version == version
