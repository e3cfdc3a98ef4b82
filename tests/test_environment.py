"""What conftest.py promises: types and shapes of leaf functions are checked, and a warning is an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from checked import LEAVES
from jaxtyping import TypeCheckError

from hatfn.evaluation import metrics
from hatfn.method import gates, transforms
from hatfn.network import outputs
from hatfn.numerics import trees
from hatfn.tracing import labels

WRONG: dict[str, Callable[[], object]] = {
    "method.gates": lambda: gates.gate(torch.tensor([1]), 1.0),
    "method.transforms": lambda: transforms.clip_by_norm({"a": torch.ones(2)}, "1"),
    "network.outputs": lambda: outputs.forward_mixed(None, None, torch.ones(2), [0], torch.ones(1)),
    "evaluation.metrics": lambda: metrics.accuracy(torch.ones(3), torch.tensor([0, 1, 0])),
    "numerics.trees": lambda: trees.take({"a": torch.ones(2)}, "0"),
    "tracing.labels": lambda: labels.agree([1, 1], (0,)),
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_wrong_type_or_shape_is_refused(leaf: str) -> None:
    with pytest.raises(TypeCheckError, match=f"hatfn.{leaf}"):
        WRONG[leaf]()


def test_an_int_is_a_float() -> None:
    assert gates.gate(torch.zeros(1), 1) == 0.5


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="told"):
        warnings.warn("told", stacklevel=1)
