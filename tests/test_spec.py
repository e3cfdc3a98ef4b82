"""A learner is a value: equal to itself alone, hashable, a leaf of any tree, with graphs of its own."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import optree
import pytest
import torch
import torchopt
from nets import learner
from torch import nn
from torch.utils import _pytree as pytree

import hatfn
from hatfn.models import MLP
from hatfn.spec import Spec

X = torch.randn(8, 5)
HAT = learner(MLP(5, 3, width=16), X)


def test_a_learner_is_equal_to_itself_alone() -> None:
    other = replace(HAT)
    assert HAT == HAT  # noqa: PLR0124
    assert other != HAT
    assert len({HAT, other, HAT}) == 2


def test_a_learner_is_a_leaf_of_trees() -> None:
    assert optree.tree_leaves({"hat": HAT}) == [HAT]
    assert pytree.tree_leaves({"hat": HAT}) == [HAT]


def test_a_learner_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        HAT.clamp = 1.0  # type: ignore[misc]
    assert type(replace(HAT, clamp=1.0)) is hatfn.HAT
    assert isinstance(HAT, Spec)


def test_fields_have_the_names_and_the_values_that_build_was_given() -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x)

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, y)

    rule = hatfn.protection.magnitude(0.5)
    given = {"loss": loss, "gate": gate, "protection": rule, "compile": "update", "clamp": 5.0}
    given |= {"max_norm": 3.0, "accumulate": 2, "decay_embeddings": True}
    hat = learner(MLP(5, 3, width=16), X, optimizer=torchopt.sgd(0.1), **given)
    assert {name: getattr(hat, name) for name in given} == given


def test_no_two_learners_share_compiled_graphs() -> None:
    grown, _ = hatfn.grow(HAT, HAT.init(0), [2])
    adopted = hatfn.adopt(HAT, MLP(5, 3, width=16))
    every = (HAT, replace(HAT, loss=nn.functional.cross_entropy), grown, adopted)
    assert len({id(hat.graphs.known) for hat in every}) == 4


def test_graphs_are_left_where_they_were_made() -> None:
    HAT.graphs.known["some"] = None  # type: ignore[assignment]
    try:
        assert len(pickle.loads(pickle.dumps(HAT.graphs))) == 0
    finally:
        HAT.graphs.known.clear()
