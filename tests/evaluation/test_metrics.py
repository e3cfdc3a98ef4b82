"""Measures of a matrix of accuracies."""

from __future__ import annotations

import numpy as np
import pytest

from hatfn.evaluation import metrics
from hatfn.evaluation.metrics import forgetting_ratio, forward_transfer


def test_measures_of_an_accuracy_matrix() -> None:
    matrix = np.array([[0.9, np.nan, np.nan], [0.7, 0.8, np.nan], [0.8, 0.6, 1.0]])
    assert metrics.average_accuracy(matrix) == pytest.approx(0.8)
    assert metrics.backward_transfer(matrix) == pytest.approx((-0.1 - 0.2) / 2)
    assert metrics.forgetting(matrix) == pytest.approx((0.1 + 0.2) / 2)
    one = np.array([[0.9]])
    assert (metrics.backward_transfer(one), metrics.forgetting(one)) == (0.0, 0.0)


def test_measures_of_the_papers() -> None:
    matrix = np.array([[0.9, np.nan, np.nan], [0.8, 0.7, np.nan], [0.7, 0.6, 0.9]])
    assert forward_transfer(matrix, np.array([0.5, 0.8, 0.8])) == pytest.approx((-0.1 + 0.1) / 2)
    assert forward_transfer(matrix[:1, :1], np.array([0.5])) == 0
    chance, joint = np.full(3, 0.5), np.array([0.9, 0.7, 0.9])
    assert forgetting_ratio(matrix[-1], chance, joint) == pytest.approx((-0.5 - 0.5 + 0) / 3)
