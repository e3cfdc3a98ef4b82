"""Of stacked states each function gives what it gives of each state."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from nets import learn, learner

import hatfn
from hatfn.models import MLP

X, Y = torch.randn(12, 5), torch.arange(12) % 2
HAT = learner(MLP(5, 3, width=16), X)


@pytest.fixture(scope="module")
def states() -> list[hatfn.HATState]:
    return [learn(HAT, learn(HAT, HAT.init(seed, fresh=True), X, 0), X, 1) for seed in (1, 2, 3)]


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_usage_overlap_and_free_weights(states: list[hatfn.HATState]) -> None:
    many = hatfn.stack(states)
    for function in (hatfn.usage, hatfn.overlap):
        whole = function(many, HAT.wiring)
        assert whole.index.names[0] == "replica"
        for i, state in enumerate(states):
            pd.testing.assert_frame_equal(whole.loc[i], function(state, HAT.wiring), check_names=False)
    free = hatfn.metrics.free_weights(many, HAT.wiring)
    assert free.tolist() == [hatfn.metrics.free_weights(state, HAT.wiring) for state in states]


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_evaluate(states: list[hatfn.HATState]) -> None:
    loaders = [[(X[:6], Y[:6]), (X[6:], Y[6:])]] * 3
    whole = hatfn.evaluate(HAT, hatfn.stack(states), loaders)
    for i, state in enumerate(states):
        for rows, row in zip(whole, hatfn.evaluate(HAT, state, loaders), strict=True):
            assert rows.shape == (3, 3)
            np.testing.assert_array_equal(rows[i], row)


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_replicas_tell_a_shared_batch_by_its_axes(states: list[hatfn.HATState]) -> None:
    many, stacked = hatfn.Replicas(HAT), hatfn.stack(states)
    each = torch.stack([X] * 3), torch.stack([Y] * 3)
    for method, shared, own in (
        (lambda x, **kw: many.forward(stacked, x, 0, **kw), X, each[0]),
        (lambda x, **kw: many.predict(stacked, x, **kw), X, each[0]),
        (lambda b, **kw: many.update(many.begin(stacked, 2), b, 2, 5.0, **kw)[1].loss, (X, Y), each),
    ):
        torch.testing.assert_close(method(shared), method(own))
        torch.testing.assert_close(method(shared), method(shared, shared=True))
        with pytest.raises(ValueError, match=r"3 replicas|as the module was traced"):
            method(own, shared=True)
        with pytest.raises(ValueError, match="3 replicas"):
            method(shared, shared=False)
