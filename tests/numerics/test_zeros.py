"""Zeros that are exact, whatever was there."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from drawn import ANY, MASKS, arrays
from hypothesis import given
from torch import Tensor

from hatfn.numerics.zeros import drop


@given(
    value=arrays(ANY), off=MASKS, dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"])
)
def test_drop_is_where(value: Tensor, off: Tensor, dtype: str) -> None:
    value = value.to(getattr(torch, dtype))
    expected = torch.where(off, 0, value)
    followed = value.clone().requires_grad_()
    for got in (drop(off, value), torch.vmap(drop)(off, value), drop(off, followed).detach()):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert got.dtype == value.dtype
    row = drop(off[0], value)
    assert torch.equal(row.nan_to_num(7.0), torch.where(off[0], 0, value).nan_to_num(7.0))
    (slope,) = torch.autograd.grad(drop(off, followed).sum(), followed)
    assert torch.equal(slope != 0, ~off)
