"""Labels and the union-find under every rule."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from hatfn.tracing.labels import ZERO, UnionFind, agree, compress, filled, merge, shrink
from hatfn.tracing.rules import movement
from hatfn.tracing.tracer import Tracer, Value
from hatfn.wiring import OPEN

LABELS = st.lists(st.lists(st.integers(-2, 5), min_size=3, max_size=3), min_size=2, max_size=2)


@given(entries=LABELS, dim=st.integers(0, 1))
def test_agree_is_the_label_of_a_sum(entries: list[list[int]], dim: int) -> None:
    label = torch.tensor(entries)
    ours = agree(label, (dim,))
    for index in range(label.shape[1 - dim]):
        terms = set(label.select(1 - dim, index).tolist()) - {ZERO}
        expected = ZERO if not terms else terms.pop() if len(terms) == 1 else OPEN
        assert ours.select(1 - dim, index).item() == expected


@given(entries=LABELS)
def test_compress_only_weakens_zeros(entries: list[list[int]]) -> None:
    label = torch.tensor(entries)
    small = compress(label)
    assert small.shape == label.shape
    assert ((small == label) | (label == ZERO)).all()
    assert shrink(compress(torch.tensor([3, ZERO, 3]))).tolist() == [3]
    assert shrink(compress(torch.tensor([[3, 1], [3, 1]]))).tolist() == [[3, 1]]
    wide = label[:1].expand(4, 3)
    assert shrink(compress(wide)).shape[0] == 1


def units(count: int, cells: int = 0) -> UnionFind:
    forest, _ = UnionFind.empty().grow(count, cell=False)
    return forest.grow(cells, cell=True)[0]


@given(pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12))
def test_join_is_the_closure_of_its_pairs(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1))
    forest = units(8).join(a, b)
    classes = [{i} for i in range(8)]
    for left, right in pairs:
        joined = classes[left] | classes[right]
        for member in joined:
            classes[member] = joined
    for i in range(8):
        assert forest.root[i] == min(classes[i])


def test_merge_makes_two_labels_one() -> None:
    forest, label = merge(units(6), torch.tensor([0, 1, 2]), torch.tensor([3, OPEN, ZERO]))
    assert label.tolist() == [0, OPEN, 2]
    assert forest.root.tolist() == [0, 1, 2, 0, 4, 5]


@pytest.mark.parametrize(
    ("a", "b"),
    [([0, 1, 2], [1, 2, 0]), ([0, 1, 2], [3, 3, 3]), ([3, 3, 3], [0, 1, 2])],
    ids=["rolled", "one to all", "all to one"],
)
def test_merge_refuses_to_collapse_an_operand(a: list[int], b: list[int]) -> None:
    assert merge(units(4), torch.tensor(a), torch.tensor(b)) is None


def test_cells_take_any_unit_and_do_not_count() -> None:
    forest = units(2, cells=4)
    merged = merge(forest, torch.tensor([[0, 1]]), torch.tensor([[2, 3], [4, 5]]))
    assert merged is not None  # two cells each, as a position embedding has, join one unit
    joined, label = merged
    assert joined.find(torch.arange(2, 6)).tolist() == [0, 1, 0, 1]
    assert joined.units[torch.arange(6)].tolist() == [0, 1, 0, 1, 0, 1]
    assert forest.width(torch.arange(2, 6)) == 0
    assert label.shape == (2, 2)


def test_a_class_of_cells_alone_is_open() -> None:
    forest = units(1, cells=2).join(torch.tensor([1]), torch.tensor([2]))
    assert forest.units.tolist() == [0, OPEN, OPEN]


def test_a_label_of_a_large_value_is_small() -> None:
    label = filled((64, 256, 56, 56), OPEN)
    assert label.untyped_storage().nbytes() == 8


def test_a_label_of_large_values_put_together_is_small() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.cat.default)
    node.meta["val"] = torch.empty(2, 6, 56, 57, device="meta")
    parts = [Value(ids[:, None, None].expand(2, 3, 56, 57)) for ids in torch.arange(6).split(3)]
    label = movement.cat(Tracer({}, []), node, parts, 1)
    assert label[1, :, 7, 9].tolist() == [0, 1, 2, 3, 4, 5]
    assert label.shape == (2, 6, 56, 57)
    assert label.untyped_storage().nbytes() == 6 * 8
