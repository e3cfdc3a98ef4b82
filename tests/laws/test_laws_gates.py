"""Laws of gates, protection and wirings, for random modules, embeddings and tasks."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from nets import equal, examples, moved, near
from torch import Tensor

import hatfn
from hatfn.method.masks import binary_gates
from hatfn.state import HATState
from hatfn.testing import strategies as st_hat
from hatfn.testing.cases import Case
from hatfn.wiring import Units, Wiring

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SCALES = st.floats(0.01, 400)


def drawn_embeddings(data: st.DataObject) -> Tensor:
    """(2, U), the embeddings of two tasks, of all groups side by side."""
    wiring = data.draw(st_hat.wirings(max_blocks=1))
    return torch.cat(
        [*data.draw(st_hat.embeddings(wiring, 2, data.draw(st.sampled_from(DTYPES)))).values()], -1
    )


@given(data=st.data(), s=SCALES, more=SCALES)
@examples(25)
def test_gates_are_monotone_in_embedding_and_scale(data: st.DataObject, s: float, more: float) -> None:
    """To rounding: kernels of different width may round one number in two ways."""
    e = drawn_embeddings(data)
    slack = 2 * torch.finfo(e.dtype).eps
    order = e.flatten().sort().values
    assert (hatfn.gate(order, s).diff() >= -slack).all()
    near, far = (hatfn.gate(e, scale) for scale in (s, s + more))
    assert torch.where(e > 0, far >= near - slack, far <= near + slack).all()
    assert ((near >= 0) & (near <= 1)).all()


@given(data=st.data(), s=st.floats(1e-6, 1e-3), s_max=st.floats(50, 1000))
@examples(25)
def test_gates_are_one_half_at_no_scale_and_binary_at_the_largest(
    data: st.DataObject, s: float, s_max: float
) -> None:
    """Within the slope 1/4 of the sigmoid, and its tail exp(-s |e|)."""
    e = drawn_embeddings(data)
    slack = 2 * torch.finfo(e.dtype).eps
    size = e.double().abs()
    assert ((hatfn.gate(e, s).double() - 0.5).abs() <= s * size / 4 + slack).all()
    gap = (hatfn.gate(e, s_max).double() - hatfn.hard_gate(e).double()).abs()
    tail = torch.exp(-s_max * (1 - 2 * slack) * size)
    assert (gap <= tail + slack)[e != 0].all()
    assert (gap[e == 0] == 0.5).all()


def unit_of(wiring: Wiring, units: Units | None, shape: tuple[int, ...]) -> Any:
    """For each entry, the group and the place of its unit, or None: by counting, not by lookup()."""
    names = [(group, place) for group, size in wiring.groups.items() for place in range(size)]
    if units is None:
        return lambda entry: None
    index = units.index.expand(shape)
    return lambda entry: None if index[entry] < 0 else names[int(index[entry])]


def brute_force(
    wiring: Wiring, uses: list[dict[str, list[float]]], together: bool
) -> dict[str, list[float]]:
    """How firmly each entry is held, entry by entry, task by task.

    Args:
        wiring: which units stand behind the entries.
        uses: for each locked task {group: use of each unit}, in [0, 1].
        together: whether one task must use both ends (HAT as hatfn has it), or any task either (the papers').
    """
    held = {}
    for name, role in wiring.shared.items():
        out, into = (unit_of(wiring, units, role.shape) for units in (role.out_units, role.in_units))
        numbers = []
        for entry in product(*map(range, role.shape)):
            ends = [end for end in (out(entry), into(entry)) if end is not None]
            levels = [[task[group][place] for task in uses] for group, place in ends]
            if together:
                numbers.append(max(map(min, zip(*levels, strict=True)), default=0.0))
            else:
                numbers.append(min(max(level, default=0.0) for level in levels))
        held[name] = numbers
    return held


def close(ours: dict[str, Tensor], theirs: dict[str, list[float]], gap: float) -> bool:
    return ours.keys() == theirs.keys() and all(
        (tensor.double().flatten() - torch.tensor(theirs[name]).double()).abs().max() <= gap
        for name, tensor in ours.items()
    )


@pytest.mark.parametrize("protection", ["exact", "paper"])
@given(data=st.data())
@examples(10)
def test_protection_grows_with_every_task_and_is_its_definition(
    protection: str, data: st.DataObject
) -> None:
    modules = st_hat.modules(dtypes=(torch.float32, torch.float64), max_blocks=2)
    hat = data.draw(st_hat.learners(modules, min_tasks=2, protection=protection, s_max=20.0))
    state = data.draw(st_hat.states(hat, opened=False))._replace(learned=torch.zeros(hat.tasks).bool())
    order = data.draw(st_hat.task_sequences(hat.tasks, min_size=2))
    before = None
    for count, task in enumerate(order):
        state = hat.begin(state, task)
        uses = [
            {g: (e[t] > 0).tolist() if protection == "exact" else torch.sigmoid(20 * e[t].double()).tolist()
             for g, e in state.embeddings.items()}
            for t in order[:count]
        ]  # fmt: skip
        assert close(state.protection, brute_force(hat.wiring, uses, protection == "exact"), 1e-5)
        if before is not None:
            assert all((p >= before[name]).all() for name, p in state.protection.items())
        before = state.protection
        state = hat.consolidate(state, task)


# Units of a group are interchangeable where nothing but the wiring ties them: not so where a norm or a
# convolution treats channels differently, attention splits them into heads, or an activation that moves
# zero hides them from the trace.
WITHOUT = ("group", "grouped", "depthwise", "attention", "sigmoid")


def moves(units: Units | None, shape: tuple[int, ...], turn: Tensor) -> tuple[int, Tensor] | None:
    """Along which dimension units lie, and where the numbers of the turned units are taken from.

    The r-th of several entries of a unit takes the place of the r-th of the other's.
    """
    if units is None or units.index.numel() == 1:
        return None
    (dim,) = (d for d, size in enumerate(units.index.shape) if size > 1)
    own = units.index.flatten().tolist()
    places: dict[int, list[int]] = {}
    for place, unit in enumerate(own):
        places.setdefault(unit, []).append(place)
    ranks = [own[:place].count(unit) for place, unit in enumerate(own)]
    source = [places[int(turn[unit])][rank] if unit >= 0 else place
              for place, (unit, rank) in enumerate(zip(own, ranks, strict=True))]  # fmt: skip
    return dim, torch.tensor(source)


def turned(wiring: Wiring, tree: dict[str, Tensor], turn: Tensor, lead: int) -> dict[str, Tensor]:
    """Parameters, or what is shaped like them behind ``lead`` dimensions, with units in new places."""
    result = dict(tree)
    for name in tree:
        stem, _, last = name.rpartition(".")
        role = wiring.params.get(f"{stem}.weight" if "running" in last else name)
        ends = (role.out_units, role.in_units) if role else ()
        for dim, source in dict(filter(None, (moves(end, role.shape, turn) for end in ends))).items():
            result[name] = result[name].index_select(dim + lead, source)
    return result


def permuted(wiring: Wiring, state: HATState, turns: dict[str, Tensor]) -> HATState:
    """A state whose units have changed places."""
    starts, whole = 0, []
    for group, size in wiring.groups.items():
        whole.append(turns[group] + starts)
        starts += size
    turn = torch.cat(whole)
    return state._replace(
        params=turned(wiring, state.params, turn, 0),
        protection=turned(wiring, state.protection, turn, 0),
        task_params=turned(wiring, state.task_params, turn, 1),
        task_buffers=turned(wiring, state.task_buffers, turn, 1),
        embeddings={group: e[:, turns[group]] for group, e in state.embeddings.items()},
        masks={group: mask[:, turns[group]] for group, mask in state.masks.items()},
        used={group: units[turns[group]] for group, units in state.used.items()},
    )


@given(data=st.data())
@examples(15)
def test_units_in_other_places_are_the_same_network(data: st.DataObject) -> None:
    """Outputs are equal to rounding, protection follows to the bit, and a training step commutes."""
    modules = st_hat.modules(dtypes=(torch.float64,), without=WITHOUT)
    hat = data.draw(st_hat.learners(modules, min_tasks=2))
    state = data.draw(st_hat.states(hat, learned=1, opened=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    turns = {g: torch.randperm(units, generator=generator) for g, units in hat.wiring.groups.items()}
    other = permuted(hat.wiring, state, turns)
    assume(not equal(other.params, state.params))
    task = state.active.tolist().index(True)
    learned = state.learned.tolist().index(True)
    x, y = data.draw(st_hat.batches(hat, task))
    for t, scale in ((learned, None), (task, 1.0)):
        assert near(hat.forward(other, x, t, scale), hat.forward(state, x, t, scale))
    assert equal(hat.begin(other, task).protection, other.protection)
    (ours, info), (theirs, told) = (hat.update(s, (x, y), task, 1.0) for s in (other, state))
    assert info.ok
    assert told.ok
    assert moved(state, theirs)
    expected = permuted(hat.wiring, theirs, turns)
    for name in expected.params:
        assert near(ours.params[name], expected.params[name])
    for group in expected.embeddings:
        assert near(ours.embeddings[group], expected.embeddings[group])
    assert equal(binary_gates(expected), {g: m[:, turns[g]] for g, m in binary_gates(theirs).items()})


def test_the_brute_force_is_right_where_it_can_be_read_off() -> None:
    wiring = Case("mlp", ()).wiring
    uses = [{"stem": [1, 0, 0, 1]}, {"stem": [0, 0, 1, 1]}]
    assert brute_force(wiring, uses, True)["stem.bias"] == [1, 0, 1, 1]
    assert math.fsum(brute_force(wiring, uses, True)["stem.weight"]) == 15
