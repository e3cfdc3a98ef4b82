"""Numbers are read where there are some; an error of the device is no sign that there are none."""

from __future__ import annotations

import pytest
import torch
from nets import learner
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hatfn.models import MLP
from hatfn.numerics.concrete import is_concrete, is_transformed, read
from hatfn.numerics.vmap import batched, is_unbatchable


def test_numbers_of_plain_and_tracked_tensors_are_read() -> None:
    assert read(torch.tensor([1, 2])) == [1, 2]
    assert read(torch.tensor(0.5, requires_grad=True)) == 0.5
    seen = []
    torch.func.grad(lambda x: seen.append((read(x), is_transformed(x))) or x**2)(torch.tensor(3.0))
    assert seen == [(3.0, True)]


def test_there_are_none_inside_vmap_nor_in_a_graph() -> None:
    seen = []
    torch.vmap(lambda x: seen.append(read(x)) or x)(torch.ones(2))
    torch.vmap(torch.func.grad(lambda x: seen.append(read(x)) or x**2))(torch.ones(2))
    with FakeTensorMode():
        seen.append(read(torch.ones(2)))
    seen.append(read(torch.ones(2, device="meta")))
    assert seen == [None] * 4
    assert is_concrete(torch.ones(2))


def test_an_error_of_the_device_is_not_taken_for_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot read must not be skipped."""
    hat, x = learner(MLP(5, 3, width=16), torch.randn(8, 5)), torch.randn(8, 5)
    state = hat.begin(hat.init(0), 0)

    def failing(self: Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Tensor, "tolist", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        hat.update(state, (x, torch.zeros(8, dtype=torch.int64)), 0, 5.0)


def test_what_has_no_rule_is_told_from_what_is_wrong() -> None:
    cell = torch.nn.LSTMCell(3, 4)

    def error(function, *args) -> Exception:
        with pytest.raises((RuntimeError, ValueError)) as caught:
            batched(function, (0,) * len(args))(*args)
        return caught.value

    assert is_unbatchable(error(lambda x: cell(x)[0], torch.randn(2, 5, 3)))
    assert not is_unbatchable(error(lambda x: x @ torch.ones(7), torch.randn(2, 5, 3)))
    assert not is_unbatchable(RuntimeError("out of memory"))
