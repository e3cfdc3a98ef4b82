"""Gating what a layer returns is gating its weights, and is done only where nobody else reads them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
from nets import ConvNet, Transformer, mlp
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.func import grad

import hatfn
from hatfn.models import MLP, AlexNet
from hatfn.network.call import call
from hatfn.network.hooks import GATE, remove_hooks
from hatfn.network.network import make_network
from hatfn.numerics.arguments import Inputs
from hatfn.wiring import Units


class Cases(nn.Module):
    """Two layers whose use is up to the case."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.head = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


class ReadsTheWeight(Cases):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(nn.functional.linear(x, self.a.weight, self.a.bias))
        return self.head(torch.relu(self.b(x)))


class CallsTwice(Cases):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(torch.relu(self.a(x)))))))


class ReadsItToo(Cases):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(x * self.a.weight.abs().mean())


class Ties(Cases):
    def __init__(self) -> None:
        super().__init__()
        self.a.weight = self.b.weight


class Scaled(nn.Linear):
    """A layer that does more than multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + 1


class DoesMore(Cases):
    def __init__(self) -> None:
        super().__init__()
        self.a = Scaled(8, 8)


class Doubled(Cases):
    """A hook of the user's changes what the layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda layer, args, output: output * 2)


class Spectral(Cases):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(self.a)


FOUND = {
    Cases: {"a", "b"},
    ReadsTheWeight: {"b"},
    CallsTwice: {"b"},
    ReadsItToo: {"b"},
    Ties: set(),
    DoesMore: {"b"},
    Doubled: {"b"},
    Spectral: {"b"},
}


@pytest.mark.parametrize("make", FOUND)
def test_layers_are_those_that_only_multiply(make: type[nn.Module]) -> None:
    wiring = hatfn.trace(make(), torch.randn(1, 8), head="head")
    assert set(wiring.outputs) == FOUND[make]
    assert set(wiring.layers) == FOUND[make] | {"head"}


def test_heads_and_layers_before_a_norm_are_not_among_them() -> None:
    assert not hatfn.trace(ConvNet(), torch.randn(1, 1, 6, 6)).outputs
    wiring = hatfn.trace(AlexNet(3, width=0.1), torch.randn(1, 3, 32, 32))
    assert set(wiring.outputs) == {"conv1", "conv2", "conv3", "fc1", "fc2"}
    assert wiring.layers["conv2"].params == ("conv2.weight", "conv2.bias")
    assert wiring.layers["conv1"].size == 6 * 29 * 29
    assert wiring.outputs["conv1"].index.shape == (6, 1, 1)


@pytest.mark.parametrize(
    "change",
    [{"gated": False}, {"out_units": None}, {"out_units": Units(torch.arange(8).roll(1)[:, None])}],
)
def test_a_layer_whose_weight_and_bias_differ_is_gated_by_them(change: dict) -> None:
    wiring = hatfn.trace(Cases(), torch.randn(1, 8), head="head")
    role = wiring.params["a.weight"]._replace(**change)
    other = replace(wiring, params=dict(wiring.params) | {"a.weight": role})
    assert set(other.outputs) == {"b"}


NETWORKS = {
    **{make.__name__: (make, (8,)) for make in FOUND},
    "mlp": (lambda: MLP(5, 3, width=16), (5,)),
    "alexnet": (lambda: AlexNet(3, width=0.1), (3, 32, 32)),
    "transformer": (Transformer, (4, 5)),
    "vit": (lambda: timm.create_model("test_vit", img_size=64, num_classes=3), (3, 64, 64)),
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=3), (3, 64, 64)),
    "mixer": (lambda: MlpMixer(3, img_size=64, embed_dim=32, num_blocks=2), (3, 64, 64)),
}  # fmt: skip


@pytest.mark.parametrize("binary", [False, True], ids=["soft", "binary"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gated_outputs_are_gated_weights(name: str, binary: bool) -> None:
    """The same outputs and the same gradients of weights and gates, layer by layer."""
    make, shape = NETWORKS[name]
    module, x = make().double().eval(), torch.randn(3, *shape).double()
    head = "head" if isinstance(module, Cases) else None
    network = make_network(module, hatfn.trace(module, x[:1], head=head), None)
    plain = network._replace(outputs={})
    params = {n: network.initial[n] for n in network.wiring.params}
    params = {n: p + 0.1 * torch.randn_like(p) for n, p in params.items()}  # a mixer's head is zero
    buffers = {n: network.initial[n] for n in network.wiring.buffers}
    gates = {g: torch.rand(units).double() for g, units in network.wiring.groups.items()}
    if binary:
        gates = {g: a > 0.5 for g, a in gates.items()}

    def output(net, given, params, **where) -> Tensor:
        module = network.evaluate
        if net is plain:
            module = copy.deepcopy(module)
            remove_hooks(module)
        return call(net, module, params, buffers, given, Inputs((x,)), **where)[0].square().mean()

    expected = output(plain, gates, params)
    torch.testing.assert_close(output(network, gates, params), expected)
    torch.testing.assert_close(output(network, gates, params, one_weight=True), expected)
    slopes = grad(lambda p: output(network, gates, p, one_weight=True))(params)
    torch.testing.assert_close(slopes, grad(lambda p: output(plain, gates, p))(params))
    if not binary and network.outputs:
        ours = grad(lambda g: output(network, g, params, one_weight=True))(gates)
        theirs = grad(lambda g: output(plain, g, params))(gates)
        assert any(slope.abs().max() > 0 for slope in theirs.values())
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("one_weight", [False, True])
def test_an_overflow_in_a_row_that_is_off_stays_there(one_weight: bool) -> None:
    module, x = mlp(), torch.randn(4, 5)
    network = make_network(module, hatfn.trace(module, x[:1], head="4"), None)
    params = {n: network.initial[n] for n in network.wiring.params}
    masks = {g: torch.arange(units) % 2 == 0 for g, units in network.wiring.groups.items()}
    before, _ = call(network, network.evaluate, params, {}, masks, Inputs((x,)), one_weight)
    huge = {**params, "0.weight": params["0.weight"].clone()}
    huge["0.weight"][1::2] = 3e38
    assert not (nn.functional.linear(x, huge["0.weight"])).isfinite().all()
    after, _ = call(network, network.evaluate, huge, {}, masks, Inputs((x,)), one_weight)
    assert torch.equal(before, after)


def test_which_is_gated_depends_on_which_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MLP(5, 3, width=16)
    network = make_network(module, hatfn.trace(module, torch.randn(1, 5)), [3])
    gates = {g: torch.rand(units) for g, units in network.wiring.groups.items()}
    seen: list[dict[str, Tensor]] = []

    def spy(module: nn.Module, values: dict[str, Tensor], *_: object, **__: object) -> Tensor:
        seen.append(values)
        return torch.zeros(1, 16)

    monkeypatch.setattr("hatfn.network.call.functional_call", spy)
    params = {n: network.initial[n] for n in network.wiring.params}
    for samples, one_weight in ((2, False), (200, False), (200, True)):
        call(
            network, network.evaluate, params, {}, gates, Inputs((torch.randn(samples, 5),)), one_weight
        )
    few, many, shared = ({n: v.numel() for n, v in v.items() if GATE in n} for v in seen)
    assert few == shared == {f"hidden.0.{GATE}": 16, f"hidden.1.{GATE}": 16}
    assert many == dict.fromkeys(few, 0)
    assert seen[0]["hidden.0.weight"] is params["hidden.0.weight"], "nothing is done to the weight"
