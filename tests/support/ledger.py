"""A model of a learner's state in plain Python sets, which tests compare with the state."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import hatfn
from hatfn.state import HATState

Units = dict[str, frozenset[int]]
"""The units that a task uses, of every group."""

Pairs = set[tuple[int, int | None]]
"""Entries of a weight, named by their out and in units alone."""

Roles = dict[str, tuple[str, str | None]]
"""A wiring by hand: for every shared weight, the groups of its out units and in units."""

ROLES: dict[str, Roles] = {
    "mlp": {
        "hidden.0.weight": ("hidden.0", None),
        "hidden.0.bias": ("hidden.0", None),
        "hidden.1.weight": ("hidden.1", "hidden.0"),
        "hidden.1.bias": ("hidden.1", None),
    },
    "conv net": {
        "conv1.weight": ("conv1", None),
        "conv2.weight": ("conv1", "conv1"),
        "conv2.bias": ("conv1", None),
    },
}


@dataclass
class Ledger:
    """The tasks that are learned, protected and open so far.

    Attributes:
        roles: the roles of the network's parameters.
        learned: for each learned task, its units when it was consolidated.
        held: for each protected task, its units when it became protected.
        active: the tasks that are open.
        moments: the number of tasks that the optimizer state is for.
        recorded: for each learned task, its logits and the shared weights that gave them.
    """

    roles: Roles
    learned: dict[int, Units] = field(default_factory=dict)
    held: dict[int, Units] = field(default_factory=dict)
    active: tuple[int, ...] = ()
    moments: int = 1
    recorded: dict[int, tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)

    def copy(self) -> Ledger:
        """An independent copy."""
        dicts = {name: dict(getattr(self, name)) for name in ("learned", "held", "recorded")}
        return replace(self, **dicts)

    def units(self, state: HATState, task: int) -> Units:
        """The units that a task uses, or would use if it was consolidated now."""
        if task in self.learned:
            return self.learned[task]
        return {
            group: frozenset(u for u, number in enumerate(e[task].tolist()) if number > 0)
            for group, e in state.embeddings.items()
        }

    def begun(self, state: HATState, rows: list[int], keep: list[int] | None) -> None:
        """Record that tasks were opened, and that others became protected."""
        self.drop(rows)
        locked = [*self.learned] if keep is None else keep
        self.held = {task: self.units(state, task) for task in locked}
        self.active, self.moments = tuple(rows), len(rows)

    def forgotten(self, rows: list[int], stays: set[int]) -> None:
        """Record that tasks were forgotten, and that some others became protected."""
        self.drop(rows)
        self.active = tuple(task for task in self.active if task not in rows)
        self.held = {task: units for task, units in self.held.items() if task in stays}
        self.moments = len(self.active) or 1

    def drop(self, rows: list[int]) -> None:
        """Record that tasks do not count as learned any more."""
        for row in rows:
            self.learned.pop(row, None)
            self.recorded.pop(row, None)

    def entries(self, tasks: Iterable[Units]) -> dict[str, Pairs]:
        """The entries of every shared weight that some tasks depend on."""
        users = list(tasks)
        return {
            name: {
                pair
                for units in users
                for pair in itertools.product(units[out], units[into] if into else (None,))
            }
            for name, (out, into) in self.roles.items()
        }

    def pairs(self, name: str, entries: Tensor) -> Pairs:
        """The same from a bool tensor shaped like a weight, constant along axes without units."""
        gated = self.roles[name][1] is not None
        flat = entries.reshape(len(entries), entries.shape[1] if gated else 1, -1)
        assert torch.equal(flat.all(-1), flat.any(-1)), name
        return {(i, j if gated else None) for i, j in flat.all(-1).nonzero().tolist()}

    def check(self, hat: hatfn.HAT, state: HATState) -> None:
        """Check that the state agrees with this model."""
        for name, tasks in (("learned", self.learned), ("locked", self.held), ("active", self.active)):
            assert getattr(state, name).nonzero().flatten().tolist() == sorted(tasks), name
        learned, used = sorted(self.learned), hat.used(state)
        usage, overlap = hatfn.usage(state, hat.wiring), hatfn.overlap(state, hat.wiring)
        for group, size in hat.wiring.groups.items():
            users = {task: self.learned[task][group] for task in learned}
            for task, row in enumerate(state.masks[group]):
                assert {*row.nonzero().flatten().tolist()} == users.get(task, set())
            for one, other in itertools.product(learned, repeat=2):
                assert overlap.loc[(group, one), other] == len(users[one] & users[other])
            for task in learned:
                assert usage.loc[group, task] == pytest.approx(len(users[task]) / size)
            taken = frozenset().union(*users.values())
            assert usage.loc[group, "free"] == pytest.approx(1 - len(taken) / size)
            held = frozenset().union(*(units[group] for units in self.held.values()))
            assert {*used[group].nonzero().flatten().tolist()} == held
        for name, entries in self.entries(self.held.values()).items():
            assert self.pairs(name, state.protection[name]) == entries
        needed = {}
        for name, entries in self.entries(self.learned.values()).items():
            whole = self.pairs(name, torch.ones_like(state.protection[name]))
            needed[name] = len(entries) * state.params[name].numel() / len(whole)
        share = sum(needed.values()) / sum(value.numel() for value in state.params.values())
        assert hatfn.evaluation.usage.free_weights(state, hat.wiring) == pytest.approx(1 - share)


def shapes(tree: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(leaf.shape), leaf.dtype) for leaf in optree.tree_leaves(tree)]


def fingerprint(tree: Any) -> bytes:
    """A fingerprint of the bytes of every leaf, and of how often each was written in place."""
    digest = hashlib.blake2b()
    for leaf in optree.tree_leaves(tree):
        digest.update(leaf.numpy().tobytes() + bytes([leaf._version % 256]))
    return digest.digest()
