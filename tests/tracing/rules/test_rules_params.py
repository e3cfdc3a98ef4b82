"""What becomes of a parameter that is moved, combined, read twice or shown, and of the module as a whole."""

from __future__ import annotations

import json
import re

import pytest
import torch
from nets import Fn
from told import IMAGES, ROWS, TOKENS, chain, said, told, traced
from torch import Tensor, nn
from torch.nn import functional as F

import hatfn
from hatfn.tracing import interpret
from hatfn.wiring import digest

A, C, W = nn.Linear(3, 4), nn.Linear(3, 4), torch.ones(2, 4)
TOKEN = torch.ones(1, 1, 4)

PARAMS = {
    "moved and scaled": (ROWS, lambda m, x: F.linear(m.a(x), m.w.T * 0.5), {"w": torch.ones(4, 2)}, {"w": "w@1 < a@0", "y": "w"}),
    "bent": (ROWS, lambda m, x: F.linear(m.a(x), m.w.tanh()), {"w": W}, {"w": "w < a", "y": "w"}),
    "bent away from zero": (ROWS, lambda m, x: F.linear(m.a(x), m.w.exp()), {"w": W}, {"w": "task", "y": "."}),
    "put together": (
        ROWS, lambda m, x: F.linear(m.a(x), torch.cat([m.w, m.u])), {"w": torch.ones(1, 4), "u": W}, {"w": "u0 < a", "u": "u1 u2 < a", "y": "u"},
    ),
    "put together with zeros": (
        ROWS, lambda m, x: F.linear(x, m.u, torch.cat([m.w, torch.zeros(2), m.v])), {"u": torch.ones(4, 3), "w": torch.ones(1), "v": torch.ones(1)},
        {"u": "u", "w": "u0", "v": "u3", "y": "u"},
    ),
    "read in part": (
        ROWS, lambda m, x: F.linear(m.a(x), m.w[:2]), {"w": torch.ones(3, 4)},
        {"w": "task w0 w1 . < [[a0 a1 a2 a3] [a0 a1 a2 a3] [. . . .]]", "y": "w"},
    ),
    "read in parts, by different layers": (
        ROWS, lambda m, x: F.linear(m.a(x), m.w[:1]) + F.linear(m.c(x), m.w[1:]), {"c": C, "w": W}, {"w": "w < [[a0 a1 a2 a3] [c0 c1 c2 c3]]"},
    ),
    "plus itself turned": (ROWS, lambda m, x: F.linear(m.a(x), m.w + m.w.T), {"w": torch.ones(4, 4)}, {"w": "task", "y": "."}),
    "plus another": (ROWS, lambda m, x: F.linear(m.a(x), m.w + m.d), {"w": W, "d": W}, {"w": "task d", "d": "task d", "y": "d"}),
    "over its norm": (ROWS, lambda m, x: F.linear(m.a(x), m.w / m.w.norm(dim=1, keepdim=True)), {"w": W}, {"w": "task w", "y": "w"}),
    "summed up": (ROWS, lambda m, x: F.linear(m.a(x), m.w, m.u.sum(1)), {"w": W, "u": W}, {"w": "w < a", "u": "task", "y": "."}),
    "of no known operator": (ROWS, lambda m, x: F.linear(m.a(x), m.w.cumsum(1)), {"w": W}, {"w": "task", "y": "."}),
    "weighed by an activation": (ROWS, lambda m, x: F.linear(x, m.w * m.a(x)[:1, :3]), {"w": torch.ones(2, 3)}, {"w": "task", "y": "."}),
    "as it is and turned": (
        ROWS, lambda m, x: F.linear(F.linear(m.a(x), m.w), m.w.T), {"w": W}, {"w": "w", "y": "."},
    ),
    "twice on the same": (ROWS, lambda m, x: F.linear(m.a(x), m.w) + F.linear(m.a(x), m.w), {"w": W}, {"w": "w < a", "y": "w"}),
    "twice on others": (ROWS, lambda m, x: F.linear(m.a(x), m.w) + F.linear(m.c(x), m.w), {"c": C, "w": W}, {"w": "w", "y": "w"}),
    "twice on partly others": (
        ROWS, lambda m, x: F.linear(m.a(x), m.w) + F.linear(torch.cat([m.a(x)[:, :2], m.c(x)[:, 2:]], 1), m.w), {"c": C, "w": W}, {"w": "w < a0 a1 . .", "y": "w"},
    ),
    "as it is and bent, on the same": (ROWS, lambda m, x: F.linear(m.a(x), m.w) + F.linear(m.a(x), m.w.tanh()), {"w": W}, {"w": "w < a", "y": "w"}),
    "as it is and bent, on others": (ROWS, lambda m, x: F.linear(m.a(x), m.w) + F.linear(m.c(x), m.w.tanh()), {"c": C, "w": W}, {"w": "w", "y": "w"}),
    "bent and as it is, on others": (ROWS, lambda m, x: F.linear(m.a(x), m.w.tanh()) + F.linear(m.c(x), m.w), {"c": C, "w": W}, {"w": "w", "y": "w"}),
    "bent twice, on the same": (ROWS, lambda m, x: F.linear(m.a(x), m.w.tanh()) + F.linear(m.a(x), m.w.sin()), {"w": W}, {"w": "w < a", "y": "w"}),
    "bent twice, on partly others": (
        ROWS, lambda m, x: F.linear(m.a(x), m.w.tanh()) + F.linear(torch.cat([m.a(x)[:, :2], m.c(x)[:, 2:]], 1), m.w.sin()),
        {"c": C, "w": W}, {"w": "w < a0 a1 . .", "y": "w"},
    ),
    "bent twice, once on what is open": (
        ROWS, lambda m, x: F.linear(m.a(x), m.w.tanh()) + F.linear(m.a(x).exp(), m.w.sin()), {"w": W}, {"w": "w", "y": "w"},
    ),
    "put together with itself": (
        ROWS, lambda m, x: F.linear(torch.cat([m.a(x), m.c(x)], 1), torch.cat([m.w, m.w], 1)), {"c": C, "w": W}, {"w": "w", "y": "w"},
    ),
    "a bias that is also a scale": (ROWS, lambda m, x: F.linear(m.a(x), m.w, m.v) * m.v, {"w": W, "v": torch.ones(2)}, {"v": "task w", "y": "w"}),
    "a bias of what is open, read again": (
        ROWS, lambda m, x: F.linear(m.a(x), m.w.exp(), m.v) + m.v.tanh(), {"w": W, "v": torch.ones(2)}, {"w": "task", "v": "task", "y": "."},
    ),
    "a number added to images": (IMAGES, lambda m, x: m.i(x) + m.p, {"i": nn.Conv2d(1, 4, 1), "p": torch.ones(1)}, {"p": "task i", "y": "i"}),
    "positions": (TOKENS, lambda m, x: m.a(x) + m.p, {"p": torch.ones(1, 5, 4)}, {"p": "task a@2", "y": "a@1"}),
    "a part of positions": (
        TOKENS, lambda m, x: m.a(x) + m.p[:, :5], {"p": torch.ones(1, 6, 4)},
        {"p": "task [" + "[a0 a1 a2 a3] " * 5 + "[. . . .]]", "y": "a@1"},
    ),
    "positions that are resized": (
        IMAGES, lambda m, x: m.i(x) + F.interpolate(m.p, (4, 4), mode="bicubic"), {"i": nn.Conv2d(1, 4, 1), "p": torch.ones(1, 4, 2, 2)}, {"p": "task i@1", "y": "i"},
    ),
    "positions that are resized and used as they are": (
        IMAGES, lambda m, x: (m.i(x) + F.interpolate(m.p, (4, 4), mode="bicubic"))[..., :2, :2] + m.p, {"i": nn.Conv2d(1, 4, 1), "p": torch.ones(1, 4, 2, 2)},
        {"p": "task i@1", "y": "i"},
    ),
    "positions that are resized before any layer": (
        IMAGES, lambda m, x: F.interpolate(m.p, (4, 4), mode="bicubic") + m.i(x), {"i": nn.Conv2d(1, 4, 1), "p": torch.ones(1, 4, 2, 2)}, {"p": "task i@1", "y": "i"},
    ),
    "a class token": (
        TOKENS, lambda m, x: m.b(torch.cat([m.p.expand(2, -1, -1) + 0 * m.a(x)[:, :1], m.a(x)], 1)), {"b": nn.Linear(4, 2), "p": TOKEN}, {"p": "task a@2", "b.weight": "b < a"},
    ),
    "a class token without units": (
        TOKENS, lambda m, x: m.b(torch.cat([m.p.expand(2, -1, -1), m.a(x)], 1)), {"b": nn.Linear(4, 2), "p": TOKEN}, {"p": "task", "b.weight": "b"},
    ),
    "a learned query": (
        TOKENS, lambda m, x: m.a(x) + m.b(m.q), {"b": nn.Linear(3, 4), "q": torch.ones(5, 3)}, {"q": "task", "b.weight": "a", "a.weight": "a", "y": "a@1"},
    ),
    "normalised": (ROWS, lambda m, x: F.linear(m.a(x), m.n(m.w)), {"n": nn.LayerNorm(4), "w": W}, {"w": "task", "n.weight": "task n", "y": "."}),
    "shown": (ROWS, lambda m, x: (F.linear(m.a(x), m.w), m.w), {"w": W}, {"w": "task w", "y": "w"}),
    "shown first": (ROWS, lambda m, x: (m.w, F.linear(m.a(x), m.w)), {"w": W}, {"w": "task w", "y": "."}),
    "never read": (ROWS, lambda m, x: m.a(x), {"w": W}, {"w": "task", "y": "a"}),
    "empty": (ROWS, lambda m, x: torch.cat([m.a(x), m.w.expand(2, 0).tanh()], 1), {"w": torch.ones(0)}, {"y": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_what_becomes_of_a_parameter(name: str) -> None:
    shape, function, parts, expected = PARAMS[name]
    found = said(shape, function, {"a": A} | parts)
    assert {key: found[key] for key in expected} == expected


# Whatever else w is here, it is the weight of a layer as well, and v its bias.
ELSEWHERE = {
    "a factor on the left": (lambda m, x: m.w @ m.a(x).mT, "w"),
    "a factor of one place": (lambda m, x: m.a(x) @ m.v, "v"),
    "a factor of an einsum": (lambda m, x: torch.einsum("ntc,cd->ntd", m.a(x), m.w), "w"),
    "a weight that is a vector": (lambda m, x: F.linear(m.a(x), m.v), "v"),
    "what a vector weighs": (lambda m, x: F.linear(m.w, m.u) + x.sum(), "w"),
    "what a layer reads": (lambda m, x: m.c(m.w[:, :3]) + x.sum(), "w"),
    "a weight of tokens": (lambda m, x: F.linear(m.a(x)[:, :4].mT, m.w), "w"),
    "a bias that is a matrix": (lambda m, x: torch.addmm(m.w, m.a(x)[0, :4], m.s), "w"),
    "a mask": (lambda m, x: F.scaled_dot_product_attention(m.a(x)[:, :4], m.a(x)[:, :4], m.a(x)[:, :4], m.w), "w"),
    "a query": (lambda m, x: F.scaled_dot_product_attention(m.w[None], m.a(x)[:1], m.a(x)[:1]), "w"),
    "a key": (lambda m, x: F.scaled_dot_product_attention(m.a(x)[:1, :4], m.w[None], m.a(x)[:1, :4]), "w"),
    "values": (lambda m, x: F.scaled_dot_product_attention(m.a(x)[:1, :4], m.a(x)[:1, :4], m.w[None]), "w"),
    "normalised by layers": (lambda m, x: F.layer_norm(m.w, (4,)) + x.sum(), "w"),
    "normalised by its size": (lambda m, x: F.rms_norm(m.w, (4,)) + x.sum(), "w"),
    "normalised by channels": (lambda m, x: F.group_norm(m.w[None], 2) + x.sum(), "w"),
    "a scale of what its own size normalises": (lambda m, x: F.rms_norm(m.a(x), (4,), m.v), "v"),
    "a sequence": (lambda m, x: m.r(m.w[:, None, :3])[0] + x.sum(), "w"),
    "a start": (lambda m, x: m.r(x[:, :4], m.w[None, :, :2])[0], "w"),
    "a sum": (lambda m, x: m.a(x) + m.w.sum(1), "w"),
    "of no known operator": (lambda m, x: m.a(x) + m.w.cumsum(1)[0], "w"),
    "what an activation scales": (lambda m, x: m.a(x)[:, :4] * m.w, "w"),
    "away from zero": (lambda m, x: m.a(x)[:, :4] * (m.w + 1), "w"),
    "shown": (lambda m, x: m.w, "w"),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_no_gate_reaches_is_shared_nowhere(name: str) -> None:
    function, own = ELSEWHERE[name]
    parts = {
        "a": A,
        "c": C,
        "w": torch.ones(4, 4),
        "v": torch.ones(4),
        "u": torch.ones(4),
        "s": torch.ones(4, 4),
    }
    found = said(
        TOKENS, lambda m, x: (function(m, x), F.linear(m.a(x), m.w, m.v)), parts | {"r": nn.RNN(3, 2)}
    )
    assert found[own].startswith("task")
    assert not found["v" if own == "w" else "w"].startswith("task")


class Written(nn.Module):
    """Blocks that write over values that they, or others, read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.c, self.kind = nn.Linear(3, 4), nn.Linear(3, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        a, c = self.a(x), self.c(x)
        if self.kind == "a sum":
            return a.add_(c)
        if self.kind == "a sum onto a view":
            a.view(-1, 2, 2).add_(1.0)
            return a
        if self.kind == "a sum onto a view of units":
            a.view(-1, 2, 2).add_(c.view(-1, 2, 2) * 2)
            return a
        if self.kind == "a sum onto what dropout passed on":
            nn.functional.dropout(a, training=self.training).add_(1.0)
            return a + c * 0
        if self.kind == "a product with itself":
            return a.mul_(a)
        return torch.relu_(a.add_(c).add_(1.0))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("a sum", "a a"),
        ("a sum onto a view", ". task"),
        ("a sum onto what dropout passed on", ". c"),
        ("a sum onto a view of units", "a a"),
        ("a product with itself", "a c"),
        ("two sums", ". a"),
    ],
)
def test_what_is_written_over_is_as_if_it_were_new(kind: str, expected: str) -> None:
    found = traced(Written(kind), torch.randn(2, 3))
    assert f"{found['y']} {found['c.weight']}" == expected


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
    assert wiring.params["head.weight"].into.group == "a"


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
    assert wiring.params["a.weight"].into.group == "input"
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
    inner = Fn(lambda m, x: x.cumsum(1))
    net = Fn(lambda m, x: m.b(m.s(m.a(x)).cumprod(1)), a=nn.Linear(3, 4), s=inner, b=nn.Linear(4, 2))
    wiring = hatfn.trace(net, torch.randn(1, 3))
    assert wiring.fallbacks == ("aten.cumsum.default in s", "aten.cumprod.default")
    with pytest.raises(
        hatfn.TraceError, match=re.escape("no rule for aten.cumsum.default in s, aten.cumprod")
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
        hatfn.TraceError, match=r"stops at \S*test_rules_params\.py:\d+, 'json.dumps.* Object of type"
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
