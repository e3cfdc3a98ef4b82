"""The verifiers can fail: wirings that are wrong in one place, and networks that prove nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import ConvNet, Transformer, mlp
from torch import Tensor, nn

import hatfn
from hatfn.testing import verify_wiring
from hatfn.wiring import Units, Wiring

CASES = {
    "mlp": (mlp(), torch.randn(2, 5), "4"),
    "conv net": (ConvNet(), torch.randn(2, 1, 6, 6), "head"),
    "transformer": (Transformer(), torch.randn(2, 4, 5), "head"),
}


def changed(wiring: Wiring, name: str, **fields: object) -> Wiring:
    """The wiring with another role for one parameter."""
    role = wiring.params[name]._replace(**fields)
    return replace(wiring, params=dict(wiring.params) | {name: role})


def turned(units: Units) -> Units:
    """The same units at the wrong places: a permutation that a tracing bug could make."""
    dim = max(range(units.index.dim()), key=lambda d: units.index.shape[d])
    return Units(units.index.roll(1, dim))


def shared(name: str) -> list[str]:
    module, x, head = CASES[name]
    return list(hatfn.trace(module, x[:1], head=head).shared)


@pytest.mark.parametrize("end", ["out_units", "in_units"])
@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in shared(case)])
def test_units_at_the_wrong_place_are_caught(case: str, name: str, end: str) -> None:
    module, x, head = CASES[case]
    wiring = hatfn.trace(module, x[:1], head=head)
    units = getattr(wiring.params[name], end)
    if units is None:
        return
    if end == "out_units" and wiring.params[name].gated:
        # A gate at the wrong place is another, equally sound network; what must be caught is a
        # protection that does not follow the gate.
        wrong = changed(wiring, name, out_units=turned(units), gated=False)
    else:
        wrong = changed(wiring, name, **{end: turned(units)})
    with pytest.raises(AssertionError, match="unprotected entries reach the output"):
        verify_wiring(module, wrong, x)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("conv net", "norm1.weight"), ("conv net", "norm1.bias"),
        ("transformer", "norm1.bias"), ("transformer", "norm2.weight"),
        ("transformer", "embed.weight"), ("transformer", "qkv.weight"), ("mlp", "0.weight"),
    ],
)  # fmt: skip
def test_a_missing_gate_is_caught(case: str, name: str) -> None:
    """An ungated norm, position embedding or layer lets switched-off channels through."""
    module, x, head = CASES[case]
    wiring = hatfn.trace(module, x[:1], head=head)
    with pytest.raises(AssertionError, match="unprotected entries reach the output"):
        verify_wiring(module, changed(wiring, name, gated=False), x)


def test_a_gate_deferred_through_a_layer_norm_is_caught() -> None:
    module, x, head = CASES["transformer"]
    wiring = hatfn.trace(module, x[:1], head=head)
    for name in ("embed.weight", "embed.bias", "proj.weight", "proj.bias", "position"):
        wiring = changed(wiring, name, gated=False)
    with pytest.raises(AssertionError, match=r"embed\.weight"):
        verify_wiring(module, wiring, x)


def test_a_network_that_ignores_its_input_proves_nothing() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x * 0.0))

    module, x = Deaf(), torch.randn(2, 5)
    with pytest.raises(AssertionError, match="does not depend on the input"):
        verify_wiring(module, hatfn.trace(module, x, head="head"), x)


def test_a_parameter_without_effect_is_reported_as_untested() -> None:
    class Mute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mute, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x) + self.mute(x) * 0.0)

    module, x = Mute(), torch.randn(2, 5)
    seen = verify_wiring(module, hatfn.trace(module, x, head="head"), x)
    assert set(seen.untested) == {"mute.weight", "mute.bias"}
    assert set(seen.tested) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize("case", CASES)
def test_lazy_traces_fail_the_measures(case: str) -> None:
    """Everything open, and everything one unit, are sound and useless; the measures say so."""
    module, x, head = CASES[case]
    wiring = hatfn.trace(module, x[:1], head=head)
    opened = replace(
        wiring, groups={},
        params={
            name: role._replace(kind="head" if role.kind == "head" else "task", out_units=None, in_units=None)
            for name, role in wiring.params.items()
        },
    )  # fmt: skip
    verify_wiring(module, opened, x)
    assert opened.measures.shared < 0.95

    def one(units: Units | None) -> Units | None:
        return None if units is None else Units(torch.zeros_like(units.index).clamp(max=0))

    single = replace(
        wiring, groups={"all": 1},
        params={n: role._replace(out_units=one(role.out_units), in_units=one(role.in_units)) for n, role in wiring.params.items()},
    )  # fmt: skip
    verify_wiring(module, single, x)
    assert single.measures.protected > 0.30
