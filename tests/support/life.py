"""The life of a learner in any order, as a state machine that hypothesis drives."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import optree
import pytest
import torch
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from ledger import ROLES, Ledger, fingerprint, shapes
from nets import ConvNet, equal, learner
from optimizers import OPTIMIZERS
from torch import Tensor

import hatfn
from hatfn.models import MLP
from hatfn.state import HATState, trainable

NETWORKS = {"mlp": (lambda: MLP(5, 3, width=8), (6, 5)), "conv net": (ConvNet, (6, 1, 4, 4))}
LARGEST = 6
"""The largest number of tasks that a learner may grow to."""


@cache
def made(network: str, optimizer: str) -> tuple[hatfn.HAT, HATState, Tensor]:
    """A learner of three tasks with unequal heads, its first state, and an input."""
    make, shape = NETWORKS[network]
    x = torch.randn(shape)
    hat = learner(make(), x, classes=[3, 2, 4], optimizer=OPTIMIZERS[optimizer]())
    return hat, hat.init(0), x


class FaultError(Exception):
    """The error that breaks an update in the middle."""


def broken(*_: Any, **__: Any) -> Any:
    raise FaultError


class BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        raise FaultError


SEEDS = st.integers(0, 10**6)
ONE = st.integers(0, LARGEST - 1)
SOME = st.sets(ONE)
BAD = ["nan", "inf", "empty", "labels", "dtype", "dimensions", "scale", "task", "pair"]
SCALES = st.none() | st.floats(0.5, 400.0)


class Life(RuleBasedStateMachine):
    """One learner; every rule is an action of a user, or an accident."""

    network: str
    optimizer: str
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.hat, self.state, self.x = made(self.network, self.optimizer)
        self.start, self.model = self.state, Ledger(ROLES[self.network])
        self.given: deque[tuple[HATState, bytes]] = deque(maxlen=4)
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "state.safetensors"
        self.save()
        self.seen["lives"] += 1

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # Facts about the state, from the model.

    def tasks(self, some: Iterable[int]) -> list[int]:
        return sorted({task for task in some if task < self.hat.tasks})

    def record(self, task: int) -> None:
        logits = self.hat.forward(self.state, self.x, task)
        self.model.recorded[task] = logits, self.state.params

    def step(self, new: HATState, may_move: Iterable[int] = ()) -> None:
        """Take a new state; the logits of all learned tasks but the named ones must stay equal."""
        self.given.append((self.state, fingerprint(self.state)))
        self.state = new
        for task in set(may_move) & self.model.learned.keys():
            old, _ = self.model.recorded[task]
            self.record(task)
            self.seen["drifted"] += not torch.equal(old, self.model.recorded[task][0])

    def own(self, state: HATState, task: int) -> list[Tensor]:
        trees = (state.task_params, state.task_buffers, state.embeddings)
        return [leaf[task] for tree in trees for leaf in tree.values()]

    def batch(self, rows: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
        """A batch: (B, ...) for one task, (K, B, ...) for several."""
        draw = torch.Generator().manual_seed(number)
        x = [self.x + 0.3 * torch.randn(self.x.shape, generator=draw) for _ in rows]
        y = [torch.randint(self.hat.classes[row], (len(self.x),), generator=draw) for row in rows]
        return (x[0], y[0]) if len(rows) == 1 else (torch.stack(x), torch.stack(y))

    def opened(self) -> int | list[int]:
        rows = list(self.model.active)
        return rows[0] if len(rows) == 1 else rows

    # Actions of users.

    @initialize(tasks=st.permutations(range(3)), loose=st.booleans(), number=SEEDS)
    def first(self, tasks: list[int], loose: bool, number: int) -> None:
        """Learn two tasks; the first one is protected or not during the second."""
        self.learn(tasks[0], None, number, 20.0)
        self.learn(tasks[1], set() if loose else None, number, 20.0)

    @rule(task=ONE, locked=st.none() | SOME, number=SEEDS, scale=SCALES)
    def learn(self, task: int, locked: set[int] | None, number: int, scale: float | None) -> None:
        """Begin, train and consolidate a task in one rule, because random lives rarely finish a task."""
        self.begin(task, set(), locked, False)
        self.update(number, scale, 3)
        self.consolidate(None)

    @rule(task=ONE, more=st.just(set()) | SOME, locked=st.none() | SOME, carry=st.booleans())
    def begin(self, task: int, more: set[int], locked: set[int] | None, carry: bool) -> None:
        rows = self.tasks({task % self.hat.tasks, *more})
        keep = None if locked is None else [t for t in self.tasks(locked) if t not in rows]
        asked = rows[0] if len(rows) == 1 else rows
        if carry and self.model.moments != len(rows):
            with pytest.raises(ValueError, match="optimizer state is not that of"):
                self.hat.begin(self.state, asked, keep, carry)
            return
        new = self.hat.begin(self.state, asked, keep, carry)
        assert equal(new.opt_state, self.state.opt_state) or not carry
        assert equal(new.params, self.state.params)
        self.model.begun(self.state, rows, keep)
        self.step(new)

    @precondition(lambda self: self.model.learned)
    @rule(task=ONE, source=st.none() | SEEDS, number=SEEDS)
    def begin_warm(self, task: int, source: int | None, number: int) -> None:
        task = task % self.hat.tasks
        others = [t for t in self.model.learned if t != task]
        if not others:
            return
        init_from = "similar" if source is None else others[source % len(others)]
        batch = self.batch([task], number)
        new = self.hat.begin(self.state, task, init_from=init_from, batch=batch)
        assert not equal(self.own(new, task), self.own(self.state, task))
        self.model.begun(self.state, [task], None)
        self.step(new)

    @precondition(lambda self: self.model.active)
    @rule(number=SEEDS, scale=SCALES, steps=st.integers(1, 3))
    def update(self, number: int, scale: float | None, steps: int) -> None:
        model, before = self.model, self.state
        rows = list(model.active)
        batch, task, new = self.batch(rows, number), self.opened(), self.state
        if model.moments != len(rows):  # of tasks opened together some are closed, or forgotten
            with pytest.raises(ValueError, match=r"optimizer state .* hat\.begin"):
                self.hat.update(new, batch, task, scale)
            return
        for _ in range(steps):
            new, info = self.hat.update(new, batch, task, scale)
            assert info.ok
        assert not equal(self.own(new, rows[0]), self.own(before, rows[0])), "nothing was trained"
        for other in set(range(self.hat.tasks)) - {*rows}:
            assert equal(self.own(new, other), self.own(before, other))
        self.step(new, may_move=model.learned.keys() - model.held.keys())

    @precondition(lambda self: self.model.active and self.model.moments == len(self.model.active))
    @rule(number=SEEDS, bad=st.sampled_from(BAD))
    def update_refused(self, number: int, bad: str) -> None:
        """A refused batch leaves the state unchanged; an error or ``info.ok`` tells of the refusal."""
        rows, task, scale = list(self.model.active), self.opened(), 5.0
        x, y = self.batch(rows, number)
        if bad in ("nan", "inf"):
            x = x.index_fill(-1, torch.tensor([0]), float(bad))
            new, info = self.hat.update(self.state, (x, y), task, scale)
            assert not info.ok
            assert equal(new, self.state)
            self.step(new)
            return
        batch: Any = {
            "empty": (x[..., :0], y[..., :0]),
            "labels": (x, y + 9),
            "dtype": (x, y.int()),
            "dimensions": (x[..., None], y),
            "pair": x,
        }.get(bad, (x, y))
        scale = 401.0 if bad == "scale" else scale
        closed = [t for t in range(self.hat.tasks) if t not in rows]
        if bad == "task":
            task = closed[0] if closed else self.hat.tasks
        with pytest.raises((TypeError, ValueError), match="update"):
            self.hat.update(self.state, batch, task, scale)

    @precondition(lambda self: self.model.active and self.model.moments == len(self.model.active))
    @rule(number=SEEDS, where=st.sampled_from(["loss", "backward", "optimizer", "regularizer"]))
    def crash(self, number: int, where: str) -> None:
        """The process is interrupted in the middle of a step; the live state is still good."""
        hat, loss = self.hat, self.hat.loss
        broke = {
            "loss": lambda: replace(hat, loss=broken),
            "backward": lambda: replace(hat, loss=lambda a, b: BreaksBackward.apply(loss(a, b))),
            "optimizer": lambda: replace(hat, optimizer=hat.optimizer._replace(update=broken)),
            "regularizer": lambda: replace(hat, regularizer=broken),
        }[where]()
        with pytest.raises(FaultError):
            broke.update(self.state, self.batch(list(self.model.active), number), self.opened(), 5.0)
        self.step(self.state)

    @precondition(lambda self: self.model.active)
    @rule(number=SEEDS, which=SEEDS)
    def recalibrate(self, number: int, which: int) -> None:
        task = self.model.active[which % len(self.model.active)]
        x, _ = self.batch([task], number)
        new = self.hat.recalibrate(self.state, x.split(3), task)
        rest = self.state._replace(task_buffers={})
        assert equal(new._replace(task_buffers={}), rest)
        for other in set(range(self.hat.tasks)) - {task}:
            assert equal(self.own(new, other), self.own(self.state, other))
        self.step(new)

    @rule(which=st.none() | ONE)
    def consolidate(self, which: int | None) -> None:
        """Consolidate an open task, or any other."""
        model = self.model
        task = model.active[0] if which is None and model.active else (which or 0) % self.hat.tasks
        known = task in model.learned
        units = self.model.units(self.state, task)
        new = self.hat.consolidate(self.state, task)
        if known and task not in model.active:
            assert equal(new, self.state), "twice is once"
        model.learned[task] = units
        model.active = tuple(row for row in model.active if row != task)
        self.step(new)
        if not known:
            self.record(task)

    @rule(some=SOME, locked=st.none() | SOME, dry=st.booleans(), prune=st.booleans())
    def forget(self, some: set[int], locked: set[int] | None, dry: bool, prune: bool) -> None:
        model, before, everything = self.model, self.state, range(self.hat.tasks)
        rows = self.tasks(some)
        if prune:
            keep = [task for task in everything if task not in rows]
            new, report = self.hat.prune(before, keep, dry)
        else:
            keep = None if locked is None else [t for t in self.tasks(locked) if t not in rows]
            new, report = self.hat.forget(before, rows, keep, dry)
        assert ({*model.learned} | {*model.active}) & {*rows} <= {*report.tasks} <= {*rows}
        stays = (({*model.learned} | {*model.active}) - {*rows}) if keep is None else {*keep}
        used = self.model.entries(self.model.units(before, task) for task in report.tasks)
        kept = self.model.entries(self.model.units(before, task) for task in stays)
        for name, freed in report.params.items():
            assert self.model.pairs(name, freed) == used[name] - kept[name]
            expected = (
                before.params[name]
                if dry
                else torch.where(freed, self.start.params[name], before.params[name])
            )
            assert torch.equal(new.params[name], expected)
        if dry or not report.tasks:
            assert new is before
            return
        loose = model.learned.keys() - stays
        model.forgotten(rows, stays)
        self.step(new, may_move=loose)

    @precondition(lambda self: self.hat.tasks < LARGEST)
    @rule(classes=st.lists(st.integers(2, 6), min_size=1, max_size=2))
    def grow(self, classes: list[int]) -> None:
        self.hat, new = hatfn.grow(self.hat, self.state, classes[: LARGEST - self.hat.tasks])
        assert equal(new.params, self.state.params)
        self.step(new)

    @rule()
    def save(self) -> None:
        hatfn.save(self.path, self.state, self.hat)
        self.kept = self.hat, self.state, self.model.copy()
        assert [path.name for path in self.folder.iterdir()] == [self.path.name]

    @rule(where=st.sampled_from(["fsync", "rename"]))
    def save_fails(self, where: str) -> None:
        """A save fails; the file that was saved before is still there."""
        target = (os, "fsync") if where == "fsync" else (Path, "replace")
        with mock.patch.object(*target, broken), pytest.raises(FaultError):
            hatfn.save(self.path, self.state, self.hat)
        self.load()

    @rule()
    def load(self) -> None:
        hat, state, _ = self.kept
        assert equal(hatfn.load(self.path, hat), state)
        assert [path.name for path in self.folder.iterdir()] == [self.path.name]

    @rule()
    def kill(self) -> None:
        """The process is killed, and its memory is lost."""
        self.given.clear()
        self.hat, _, model = self.kept
        self.model, self.state = model.copy(), hatfn.load(self.path, self.hat)

    # Invariants, checked after each rule.

    @invariant()
    def learned_tasks_did_not_move(self) -> None:
        for task, (logits, params) in self.model.recorded.items():
            assert torch.equal(self.hat.forward(self.state, self.x, task), logits), f"task {task}"
            promised = task in self.model.held or not self.model.active
            moved = not equal(params, self.state.params)
            self.seen["compared"] += 1
            self.seen["compared, weights moved since"] += moved
            self.seen["compared, weights moved since, in promise"] += moved and promised
        self.seen["steps"] += 1

    @invariant()
    def nothing_given_was_changed(self) -> None:
        for state, then in self.given:
            assert fingerprint(state) == then

    @invariant()
    def books_are_kept(self) -> None:
        self.model.check(self.hat, self.state)

    @invariant()
    def its_structure_is_that_of_a_new_state(self) -> None:
        fresh = self.hat.init(0)
        moments = self.hat.optimizer.init(trainable(fresh, range(self.model.moments)))
        fresh = fresh._replace(opt_state=moments)
        assert optree.tree_structure(fresh) == optree.tree_structure(self.state)
        assert shapes(fresh) == shapes(self.state)
