"""What a trace tells of a module as a whole, and what it says of one that it cannot follow."""

from __future__ import annotations

import json
import re

import pytest
import torch
from nets import Fn
from told import ROWS, chain, said, told, traced
from torch import Tensor, nn
from torch.nn import functional as F

import hatfn
from hatfn.numerics.digests import digest
from hatfn.tracing import interpret

A, C, W = nn.Linear(3, 4), nn.Linear(3, 4), torch.ones(2, 4)


class Whole(nn.Module):
    """Everything that a wiring tells beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("shift", torch.zeros(4))
        self.register_buffer("factor", torch.tensor([1.0, 2.0, 0.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x)) * self.factor + self.shift)


def test_what_a_wiring_tells_of_a_module() -> None:
    module = Whole()
    wiring = hatfn.trace(module, torch.randn(1, 3), head="head", strict=True)
    assert wiring.heads == (("head.weight", "head.bias"),)
    assert wiring.buffers == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert wiring.constants == tuple((n, digest(module.get_buffer(n))) for n in ("factor", "shift"))
    assert (wiring.input_shape, wiring.output_shape) == ((3,), (2,))
    assert (wiring.fallbacks, wiring.remembers, wiring.input, wiring.output) == ((), False, None, None)
    assert set(wiring.layers) == {"a", "head"}
    assert wiring.params["head.weight"].in_units.group == "a"


def test_the_output_of_a_module_is_gated_only_if_asked() -> None:
    net = Fn(lambda m, x: (m.b(m.a(x)), m.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    found = told(hatfn.trace(net, torch.randn(2, 3)))
    assert found == {
        "a.weight": "a",
        "a.bias": "a",
        "b.weight": "< a",
        "b.bias": "task",
        "y": ".",
        "groups": "a:4",
    }
    assert traced(net, torch.randn(2, 3))["groups"] == "a:4 b:2"
    assert hatfn.trace(net, torch.randn(2, 3)).output_shape == (2,), "the first output is the output"
    assert traced(net, torch.randn(2, 3), head="b", output_gate=False)["groups"] == "a:4"


def test_the_input_can_be_gated() -> None:
    net = Fn(lambda m, x: m.a(x.flatten(1)), a=nn.Linear(6, 2))
    wiring = hatfn.trace(net, torch.randn(1, 2, 3), input_gate=True, output_gate=True)
    assert dict(wiring.groups) == {"input": 6, "a": 2}
    assert wiring.input.group == "input"
    assert wiring.input.index.shape == (2, 3)
    assert wiring.params["a.weight"].in_units.group == "input"
    net = Fn(lambda m, x: x @ m.w, w=nn.Parameter(torch.ones(3, 2)))
    assert traced(net, torch.randn(1, 3), input_gate=True)["w"] == "w@1 < input@0"


def test_groups_are_numbered_in_the_order_of_their_units() -> None:
    """Of joined units the first names the rest; a group that lost all of its units is none."""
    net = Fn(
        lambda m, x: m.b(torch.cat([m.a(x) + m.c(x), (m.d(x)[:, :2] + m.a(x)[:, :2])], 1)),
        a=nn.Linear(3, 4), c=nn.Linear(3, 4), d=nn.Linear(3, 3), b=nn.Linear(6, 2),
    )  # fmt: skip
    found = traced(net, torch.randn(2, 3))
    assert found["groups"] == "a:4 d:1 b:2"
    assert (found["d.weight"], found["b.weight"]) == ("a0 a1 d0", "b < a0 a1 a2 a3 a0 a1")


def test_units_of_one_module_called_twice_are_two_groups() -> None:
    inner = Fn(
        lambda m, x: x.exp() * m.p[:4] if len(x.shape) < 3 else x[:, 0].exp() * m.p[4:],
        p=nn.Parameter(torch.ones(8)),
    )
    net = Fn(lambda m, x: torch.cat([m.s(m.a(x)), m.s(m.a(x)[:, None])], 1), a=nn.Linear(3, 4), s=inner)
    found = traced(net, torch.randn(2, 3))
    assert (found["groups"], found["s.p"]) == ("a:4 s:4 s':4", "task s0 s1 s2 s3 s'0 s'1 s'2 s'3")


def test_what_fell_back_is_told_with_its_place() -> None:
    inner = Fn(lambda m, x: x.logcumsumexp(1))
    net = Fn(
        lambda m, x: m.b(m.s(m.a(x)).logcumsumexp(1)), a=nn.Linear(3, 4), s=inner, b=nn.Linear(4, 2)
    )
    wiring = hatfn.trace(net, torch.randn(1, 3))
    assert wiring.fallbacks == ("aten.logcumsumexp.default in s", "aten.logcumsumexp.default")
    with pytest.raises(
        hatfn.TraceError,
        match=re.escape("no rule for aten.logcumsumexp.default in s, aten.logcumsumexp"),
    ):
        hatfn.trace(net, torch.randn(1, 3), strict=True)


def test_an_operator_of_another_library_is_not_pytorch_s_of_that_name() -> None:
    library = torch.library.Library("zoo", "DEF")
    library.define("clone(Tensor x) -> Tensor")
    library.impl("clone", lambda x: x + 1, "CompositeExplicitAutograd")
    wiring = hatfn.trace(
        Fn(lambda m, x: torch.ops.zoo.clone(m.a(x)), a=nn.Linear(3, 4)),
        torch.randn(1, 3),
        output_gate=True,
    )
    assert (wiring.fallbacks, wiring.output) == (("zoo.clone.default",), None)


def test_numbers_that_are_the_same_in_every_call_are_computed() -> None:
    """Unlike random ones: an index drawn anew in every call may be any."""
    net = Fn(lambda m, x: m.a(x)[:, (m.k * 2 - 1).clamp(0)], a=nn.Linear(3, 4))
    net.register_buffer("k", torch.tensor([2, 0, 1]))
    assert traced(net, torch.randn(2, 3))["y"] == "a3 a0 a1"
    net = Fn(lambda m, x: m.a(x)[:, torch.randperm(4)], a=nn.Linear(3, 4))
    assert traced(net, torch.randn(2, 3))["y"] == "."


class Seen(nn.Module):
    """Adds a statistic of what it has seen, and counts its calls in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        self.calls.add_(1.0)
        if self.training:
            self.mean.copy_(h.detach().mean(0))
        return h * 2, h + self.mean


def test_a_statistic_is_neither_a_constant_nor_an_output() -> None:
    wiring = hatfn.trace(Seen(), torch.randn(2, 3), output_gate=True)
    assert (wiring.buffers, wiring.constants) == (("mean", "calls"), ())
    assert wiring.output.group == "a"
    swapped = Fn(lambda m, x: m.seen(x)[1], seen=Seen())
    assert hatfn.trace(swapped, torch.randn(2, 3), output_gate=True).output is None


def test_a_rule_that_loses_an_element_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(interpret.PASSING, "roll", lambda t, node, x, *_: t.label(x)[:, 1:])
    with pytest.raises(AssertionError, match=r"aten\.roll"):
        said(ROWS, lambda m, x: m.a(x).roll(1, 1), {"a": A})


PLAIN = {
    "written over": lambda m, x: torch.relu_(m.a(x).add_(m.c(x)).add_(1.0)),
    "normed and written over": lambda m, x: F.dropout(m.n(m.a(x)).relu_(), 0.5, m.training),
    "recurrent": lambda m, x: m.r(m.a(x)[:, None])[0],
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_module_is_not_decomposed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's decomposition takes longer than all the rest of a trace."""
    monkeypatch.delattr(torch.export.ExportedProgram, "run_decompositions")
    parts = {"a": A, "c": C, "n": nn.BatchNorm1d(4), "r": nn.LSTM(4, 2)}
    assert not hatfn.trace(Fn(PLAIN[name], **parts), torch.randn(2, 3)).fallbacks


def test_a_module_without_parameters_has_no_units() -> None:
    assert traced(nn.Flatten(), torch.randn(2, 3, 4)) == {"y": ".", "groups": ""}


def test_a_number_that_is_taken_from_a_tensor_cannot_be_followed() -> None:
    net = Fn(lambda m, x: x * x.mean().item())
    with pytest.raises(
        hatfn.TraceError, match="takes a number or a shape from a tensor, which labels cannot"
    ):
        hatfn.trace(net, torch.randn(2, 3))


def test_a_module_that_fails_at_the_input_says_so() -> None:
    with pytest.raises(
        hatfn.TraceError, match=r"Sequential fails in train mode at an input of shape \(2, 5\): "
    ):
        hatfn.trace(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(1, 5))


class Dumping(nn.Module):
    """Fails in Python's own library, but not while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        json.dumps(1 if self.training else object())
        return x


def test_the_line_that_is_named_is_neither_pytorch_s_nor_python_s_own() -> None:
    with pytest.raises(
        hatfn.TraceError, match=r"stops at \S*test_trace_module\.py:\d+, 'json.dumps.* Object of type"
    ):
        hatfn.trace(Dumping(), torch.randn(1, 3))


REFUSED = {
    "a head that is moved": (lambda m, x: m.b(m.a(x)) + m.b.weight.T[:1, :2], {}, "head's b.weight is also used"),
    "a head's bias in another layer": (lambda m, x: F.linear(m.a(x), m.w, m.b.bias) + m.b(m.a(x)), {"w": W}, "head's b.bias is also used"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_is_the_task_s_alone(name: str) -> None:
    function, parts, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        said(ROWS, function, {"a": A, "b": nn.Linear(4, 2)} | parts, head="b")


def test_a_head_whose_weight_has_another_name_is_refused() -> None:
    net = Fn(chain, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    net.c = nn.Linear(4, 2)
    net.c.weight = net.b.weight
    with pytest.raises(ValueError, match=r"head's c\.weight is also used"):
        hatfn.trace(net, torch.randn(1, 3), head="b")


def test_one_sample_will_do() -> None:
    """Though samples that are mixed must not look like features that are."""
    net = Fn(
        lambda m, x: torch.cat([m.a(x), m.c(x)]).reshape(len(x), -1),
        a=nn.Linear(3, 4),
        c=nn.Linear(3, 4),
    )
    one, two = (traced(net, torch.randn(samples, 3)) for samples in (1, 2))
    assert one == two
    assert one["y"] == "."
