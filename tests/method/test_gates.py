"""Gates and initial embeddings: their formulas and their limits."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import hatfn
from hatfn.method.gates import flush, initial_embeddings

NUMBERS = st.floats(-6, 6, width=32)
SCALES = st.floats(0.01, 400)


@given(e=st.lists(NUMBERS, min_size=2, max_size=8), s=SCALES)
def test_gate_is_the_sigmoid_and_monotone_in_the_embedding(e: list[float], s: float) -> None:
    values = torch.tensor(sorted(e), dtype=torch.float64)
    gates = hatfn.gate(values, s)
    torch.testing.assert_close(gates, 1 / (1 + torch.exp(-s * values)))
    assert (gates.diff() >= 0).all()


def test_a_scale_is_at_least_zero() -> None:
    e = torch.tensor([-3.0, 0.0, 5.0])
    assert torch.equal(hatfn.gate(e, 0), torch.full((3,), 0.5))
    assert not torch.equal(hatfn.gate(e, 0.5), hatfn.gate(e, 0))
    for scale in (-0.5, -400.0):
        with pytest.raises(ValueError, match="a negative one inverts masks"):
            hatfn.gate(e, scale)


@given(e=st.lists(st.floats(-6, 6), min_size=1, max_size=8))
def test_flush_keeps_gradients_and_drops_only_what_is_tiny(e: list[float]) -> None:
    leaf = torch.tensor(e, dtype=torch.float32, requires_grad=True)
    gates = torch.sigmoid(20 * leaf)
    flushed = flush(gates)
    small = gates < torch.finfo(torch.float32).eps ** 2
    assert torch.equal(flushed, torch.where(small, 0, gates))
    plain, ours = (torch.autograd.grad(g.sum(), leaf, retain_graph=True)[0] for g in (gates, flushed))
    assert torch.equal(plain, ours)
    limit = torch.tensor([torch.finfo(torch.float32).eps ** 2])
    assert torch.equal(flush(limit), limit), "what is not below it stays"


def test_initial_embeddings_have_their_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = initial_embeddings("normal", 5, 100_000, generator)
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert torch.equal(initial_embeddings("dense", 5, 3, generator), torch.ones(3))
    for tasks in (2, 5, 50):
        sparse = initial_embeddings("sparse", tasks, 100_000, generator)
        assert abs((sparse > 0).double().mean() - 1 / tasks) < 0.01
        assert abs(sparse.std() - 1) < 0.02
    alone = initial_embeddings("sparse", 1, 1000, generator)
    assert (alone > 0).double().mean() > 0.95
    assert alone.isfinite().all()
