"""The wiring is data: immutable, hashable, the same for the same module."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from nets import ConvNet, Transformer, mlp

import hatfn
from hatfn.method.protection import exact_protection

X = torch.zeros(1, 1, 6, 6)


def test_equal_modules_have_equal_wirings() -> None:
    first, again = (hatfn.trace(ConvNet(), X, head="head") for _ in range(2))
    assert first == again
    assert len({first, again}) == 1
    assert first != hatfn.trace(mlp(), torch.zeros(1, 5), head="4")
    assert first != hatfn.trace(ConvNet(), X, head="head", input_gate=True)
    assert first != "a wiring"


def test_a_wiring_cannot_be_changed() -> None:
    wiring = hatfn.trace(ConvNet(), X, head="head")
    with pytest.raises(FrozenInstanceError):
        wiring.groups = {}
    with pytest.raises(TypeError):
        wiring.groups["conv1"] = 9
    with pytest.raises(TypeError):
        del wiring.params["conv1.weight"]


def test_a_wiring_can_be_copied_and_pickled() -> None:
    wiring = hatfn.trace(ConvNet(), X, head="head", input_gate=True)
    assert copy.deepcopy(wiring) == wiring
    assert pickle.loads(pickle.dumps(wiring)) == wiring
    assert wiring.to("cpu") == wiring


def test_what_is_found_in_a_residual_block() -> None:
    wiring = hatfn.trace(ConvNet(), X, head="head")
    assert dict(wiring.groups) == {"conv1": 8}
    kinds = {name: role.kind for name, role in wiring.params.items()}
    assert kinds == {
        "conv1.weight": "shared", "conv2.weight": "shared", "conv2.bias": "shared",
        "norm1.weight": "task", "norm1.bias": "task", "norm2.weight": "task", "norm2.bias": "task",
        "head.weight": "head", "head.bias": "head",
    }  # fmt: skip
    assert not wiring.params["conv1.weight"].gated, "its norm holds the gate"
    assert wiring.params["norm1.weight"].gated
    assert wiring.params["conv1.weight"].out_units.group == "conv1"
    assert wiring.params["conv1.weight"].in_units is None
    assert wiring.params["conv2.weight"].in_units.group == "conv1"
    assert wiring.params["head.weight"].in_units.group == "conv1"
    assert wiring.params["head.weight"].out_units is None
    assert wiring.params["head.bias"].in_units is None
    assert set(wiring.buffers) == {
        f"norm{i}.{name}"
        for i in (1, 2)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert (wiring.input_shape, wiring.output_shape) == ((1, 6, 6), (3,))


def test_what_is_found_in_a_transformer_block() -> None:
    wiring = hatfn.trace(Transformer(), torch.zeros(1, 4, 5), head="head")
    assert dict(wiring.groups) == {"embed": 8, "qkv": 24, "fc1": 16}
    assert wiring.params["proj.weight"].out_units.group == "embed", "one gate for the residual stream"
    values = wiring.params["proj.weight"].in_units.index.flatten() - 8
    assert values.tolist() == list(range(16, 24)), "what the projection reads are the values"
    own = {name for name, role in wiring.params.items() if role.kind == "task"}
    assert own == {"position", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}
    assert wiring.params["position"].out_units is not None


def test_what_is_put_behind_a_module_knows_its_units() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU())
    assert hatfn.trace(net, torch.zeros(1, 5)).output is None, "nothing gates them"
    wiring = hatfn.trace(net, torch.zeros(1, 5), output_gate=True)
    assert wiring.output.group == "0"
    assert wiring.output.index.shape == (6,)


def test_a_fingerprint_does_not_look_at_what_only_slicing_reads() -> None:
    """States that were saved before heads knew their in units still belong to their wiring."""
    wiring = hatfn.trace(ConvNet(), X, head="head")
    params = {
        n: r._replace(in_units=None) if r.kind != "shared" else r for n, r in wiring.params.items()
    }
    assert replace(wiring, params=params, output=None) == wiring
    assert replace(wiring, params={n: r._replace(in_units=None) for n, r in params.items()}) != wiring


def test_the_summary_names_groups_measures_and_what_fell_back() -> None:
    wiring = hatfn.trace(ConvNet(), X, head="head")
    text = wiring.summary()
    for word in ("conv1", "8", "shared", "pair-gated", "protected", "head.weight", "fell back   0"):
        assert word in text

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).logcumsumexp(1)

    assert "aten.logcumsumexp" in hatfn.trace(Odd(), torch.zeros(1, 5)).summary()


def test_measures_are_their_definition() -> None:
    """By sampling: the expected share of entries that one half-open task protects."""
    wiring = hatfn.trace(Transformer(), torch.zeros(1, 4, 5), head="head")
    measures = wiring.measures
    share = []
    for _ in range(400):
        masks = {g: torch.rand(1, units) < 0.5 for g, units in wiring.groups.items()}
        held = exact_protection(wiring, masks, torch.tensor([True]))
        share.append(torch.cat([p.flatten() for p in held.values()]).double().mean())
    assert abs(torch.stack(share).mean() - measures.protected) < 0.02
    counts = {n: torch.Size(r.shape).numel() for n, r in wiring.params.items()}
    kinds = {n: r.kind for n, r in wiring.params.items()}
    total = sum(c for n, c in counts.items() if kinds[n] != "head")
    assert measures.shared == sum(c for n, c in counts.items() if kinds[n] == "shared") / total
    assert measures.smallest_group == 8
