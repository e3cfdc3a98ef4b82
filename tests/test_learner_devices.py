"""Everything stays on the module's device: run on fake CUDA tensors, which need no GPU.

Fake tensors carry shapes and devices and refuse operators that mix devices. Two things cannot run on
them: the optimiser's trial, which reads numbers, and the backward pass, which wants a driver.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, Transformer
from reads import Messages
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hatfn
from hatfn.engine.optimizer import PureOptimizer
from hatfn.network.skipping import layer_ends
from hatfn.state import Trainable


def pretend(objective: Callable[[Trainable], tuple[Tensor, Any]], has_aux: bool) -> Any:
    """In the place of torch.func.grad: gradients of the right shapes and devices."""
    return lambda own: (own, objective(own)[1])


@pytest.mark.parametrize("protection", ["exact", "paper"])
@pytest.mark.parametrize("make", [ConvNet, Transformer])
def test_no_leaf_leaves_the_device(
    make: type, protection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 6, 6) if make is ConvNet else (4, 5)
    wiring = hatfn.trace(make(), torch.zeros(1, *shape), head="head", input_gate=True)
    assert set(wiring.outputs) == (set() if make is ConvNet else {"embed", "qkv", "proj", "fc1", "fc2"})
    assert len(layer_ends(wiring).of_layers) == (3 if make is ConvNet else 6)
    pair, build = torchopt.adam(1e-3), import_module("hatfn.builder")
    monkeypatch.setattr(torch.func, "grad", pretend)
    monkeypatch.setattr(
        build,
        "check_optimizer",
        lambda o: PureOptimizer(o.init, partial(o.update, inplace=False)),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            module, x = make(), torch.randn(4, *shape)
            y = torch.zeros(4, dtype=torch.long)
        hat = hatfn.build(module, wiring, [3, 2, 3], pair, protection=protection)
        state = hat.begin(hat.begin(hat.init(0), 0), 1, locked=[0, 2])
        with Messages() as messages:
            assert torch.tensor([1], device="cuda").is_cuda
            assert messages.seen, "such a tensor comes from the CPU"
            messages.seen.clear()
            state, info = hat.update(state, (x, y), 1, 5.0)
            hat.forward(state, x, 0), hat.forward(state, x, 1, 5.0), hat.forward(state, x, None)
            hat.predict(state, x, [0, 1]), hat.predict(state, x, [2, 0], chunk_size=1)
            assert messages.seen == []
        state = hat.consolidate(hat.recalibrate(state, [x, x], 1), 1)
        exported = hatfn.export(hat, state, 1)
        outputs = (
            exported(x), *exported.parameters(), *exported.buffers(),
            hat.forward(state, x, 1), hat.forward(state, x, 1, 2.0), hat.forward(state, x, None),
            hat.predict(state, x, tasks=[0, 1]),
        )  # fmt: skip
        assert {leaf.device.type for leaf in optree.tree_leaves((state, info, outputs))} == {"cuda"}
