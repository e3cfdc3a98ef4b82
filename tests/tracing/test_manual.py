"""Wirings by hand: for a module that no graph describes, and refused where they do not fit."""

from __future__ import annotations

import pytest
import torch
import torchopt
from nets import Fn, learn
from torch import Tensor, nn

import hatfn
from hatfn import manual_wiring
from hatfn.testing import verify_no_forgetting


class Branching(nn.Module):
    """Blocks, a norm, a transposed convolution, and a branch on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 12, 3, groups=4)
        self.norm, self.up = nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 6, 2, groups=2)
        self.full, self.head = nn.Linear(6 * 25, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(x).relu())).relu()
        x = self.up(x).relu()
        if x.sum() > 1e300:
            x = x * 0
        return self.head(self.full(x.flatten(1)).relu())


LAYERS = {
    "a": ("a", None), "b": ("b", "a"), "norm": "b", "up": ("up", "b"), "full": ("full", "up"),
}  # fmt: skip
X = torch.randn(4, 2, 8, 8)


def test_it_is_proven_and_learns_without_forgetting() -> None:
    module = Branching()
    wiring = manual_wiring(module, X, LAYERS, head="head")
    assert dict(wiring.groups) == {"a": 8, "b": 12, "up": 6, "full": 10}
    assert wiring.measures.pair_gated > 0.9
    assert wiring.measures.protected < 0.3
    hat = hatfn.build(module, wiring, [3, 2], torchopt.adamw(1e-2, weight_decay=0.1))
    state = learn(hat, hat.init(seed=0), X, 0)
    before = hat.forward(state, X, 0)
    state = learn(hat, state, X, 1)
    assert torch.equal(hat.forward(state, X, 0), before)
    verify_no_forgetting(hat, state, X)


@pytest.mark.parametrize("says", [False, True])
def test_a_head_that_says_what_feeds_it_can_be_cut(says: bool) -> None:
    module = Branching()
    wiring = manual_wiring(module, X, LAYERS | ({"head": (None, "full")} if says else {}), head="head")
    assert wiring.params["head.weight"].kind == "head"
    hat = hatfn.build(module, wiring, [3, 2], torchopt.sgd(0.1))
    state = hat.consolidate(hat.init(seed=0), 0)
    small = hat.compact(state, 0)
    torch.testing.assert_close(small(X), hat.forward(state, X, 0), rtol=1e-5, atol=1e-6)
    assert small.report.became["a"] == "whole", "a grouped convolution reads it"
    assert small.report.became["full"] == ("sliced" if says else "whole")
    with pytest.raises(ValueError, match="head takes 10 features"):
        manual_wiring(module, X, LAYERS | {"head": (None, "up")}, head="head")


def test_a_head_that_is_fed_by_another_group_than_it_says_is_caught() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    layers = {"0": ("0", None), "2": ("2", "0"), "4": (None, "0")}
    x = torch.randn(4, 5)
    hat = hatfn.build(module, manual_wiring(module, x, layers, head="4"), [3], torchopt.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"compact: .*manual_wiring must read the group"):
        hat.compact(hat.consolidate(hat.init(seed=0), 0), 0)


def test_it_is_what_trace_finds_where_there_is_a_graph() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 5)
    layers = {"0": ("0", None), "2": ("2", "0")}
    assert manual_wiring(module, x, layers, head="4") == hatfn.trace(module, x, head="4")


def test_layers_that_share_a_group_are_a_residual_stream() -> None:
    module = Fn(
        lambda m, x: m.head(m.a(x) + m.b(m.a(x).relu())), a=nn.Linear(5, 8), b=nn.Linear(8, 8),
        head=nn.Linear(8, 3),
    )  # fmt: skip
    x = torch.randn(2, 5)
    wiring = manual_wiring(module, x, {"a": ("stream", None), "b": ("stream", "stream")}, head="head")
    assert dict(wiring.groups) == {"stream": 8}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"aa": ("a", None)}, "'aa' is no layer of Branching. Expected names such as 'a'"),
        ({"a": ("a", "z")}, "fed by the group 'z', which no layer produces"),
        ({"a": ("a", None), "b": ("a", "a")}, "b produces 12 units of the group 'a', which has 8"),
        ({"a": ("a", None), "up": ("up", "a")}, "up takes 12 features from the group 'a' of 8 units"),
        ({"a": ("a", None), "norm": ("n", "a")}, "norm takes 0 features"),
        ({"": ("a", None)}, "has no weight of its own"),
    ],
)
def test_what_does_not_fit_is_refused(layers: dict, message: str) -> None:
    with pytest.raises(ValueError, match="manual_wiring") as error:
        manual_wiring(Branching(), X, layers, head="head")
    assert message in str(error.value)


def test_a_wrong_group_is_caught_by_perturbation() -> None:
    wrong = {"a": ("a", None), "b": ("b", "a"), "up": ("up", "b")}  # the norm between them adds a bias
    with pytest.raises(AssertionError, match="unprotected entries reach the output"):
        manual_wiring(Branching(), X, wrong, head="head")


def test_trace_names_the_line_and_both_ways_out() -> None:
    with pytest.raises(
        hatfn.TraceError, match=r"test_manual\.py:\d+, 'if x\.sum\(\) > 1e300:'"
    ) as error:
        hatfn.trace(Branching(), X, head="head")
    assert "torch.where" in str(error.value)
    assert "hatfn.manual_wiring" in str(error.value)
