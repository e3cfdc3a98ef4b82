"""A file's settings and the learner's: a difference is told, with both values, and one argument chooses."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from nets import learner

import hatfn
from hatfn.models import MLP

X = torch.randn(8, 5)
BEFORE = learner(MLP(5, 3, width=16), X, s_max=100.0, sparsity=0.5)
NOW = learner(MLP(5, 3, width=16), X, s_max=400.0, sparsity=[5.0, 0.5, 0.5])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    hatfn.save(tmp_path / "state", BEFORE.init(0), BEFORE)
    return tmp_path / "state"


def test_a_difference_is_told_with_both_values(path: Path) -> None:
    with pytest.warns(
        hatfn.HATWarning, match=r"s_max=100\.0, the learner has 400\.0.*hyper=\"learner\""
    ):
        state = hatfn.load(path, NOW)
    assert state.hyper["s_max"] == 100


def test_one_argument_chooses(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_file, of_learner = (hatfn.load(path, NOW, hyper=whose) for whose in ("file", "learner"))
        hatfn.load(path, BEFORE)  # no difference
    assert of_file.hyper["s_max"] == of_file.hyper["compensation"] == 100
    assert of_file.hyper["sparsity"].tolist() == [0.5] * 3
    assert of_learner.hyper["s_max"] == of_learner.hyper["compensation"] == 400
    assert of_learner.hyper["sparsity"].tolist() == [5.0, 0.5, 0.5]


def test_another_word_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"hyper='mine'.*'file', 'learner'"):
        hatfn.load(path, NOW, hyper="mine")
