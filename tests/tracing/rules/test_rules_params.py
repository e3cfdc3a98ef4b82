"""What becomes of a parameter that is moved, combined, read twice or shown."""

from __future__ import annotations

import pytest
import torch
from told import IMAGES, ROWS, TOKENS, said, traced
from torch import Tensor, nn
from torch.nn import functional as F

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
    "plus itself turned": (ROWS, lambda m, x: F.linear(m.a(x), m.w + m.w.T), {"w": torch.ones(4, 4)}, {"w": "< a folded", "y": "."}),
    "plus another": (ROWS, lambda m, x: F.linear(m.a(x), m.w + m.d), {"w": W, "d": W}, {"w": "d < a folded", "d": "task d", "y": "d"}),
    "over its norm": (ROWS, lambda m, x: F.linear(m.a(x), m.w / m.w.norm(dim=1, keepdim=True)), {"w": W}, {"w": "w < a folded", "y": "w"}),
    "summed up": (ROWS, lambda m, x: F.linear(m.a(x), m.w, m.u.sum(1)), {"w": W, "u": W}, {"w": "w < a", "u": "task w", "y": "w"}),
    "of no known operator": (ROWS, lambda m, x: F.linear(m.a(x), m.w.logcumsumexp(1)), {"w": W}, {"w": "task", "y": "."}),
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
    "never read": (ROWS, lambda m, x: m.a(x), {"w": W}, {"w": "unread", "y": "a"}),
    "empty": (ROWS, lambda m, x: torch.cat([m.a(x), m.w.expand(2, 0).tanh()], 1), {"w": torch.ones(0)}, {"y": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_what_becomes_of_a_parameter(name: str) -> None:
    shape, function, parts, expected = PARAMS[name]
    found = said(shape, function, {"a": A} | parts)
    assert {key: found[key] for key in expected} == expected


# Whatever else w is here, it is the weight of a layer as well, and v its bias.
ELSEWHERE = {
    "a factor on the left": (lambda m, x: m.w @ m.a(x)[:, :4], "w"),
    "a factor of one place": (lambda m, x: m.a(x) @ m.v, "v"),
    "a factor of an einsum": (lambda m, x: torch.einsum("ntc,td->ncd", m.a(x)[:, :4], m.w), "w"),
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
    "of no known operator": (lambda m, x: m.a(x) + m.w.logcumsumexp(1)[0], "w"),
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
        ("a sum onto a view", ". unread"),
        ("a sum onto what dropout passed on", ". c"),
        ("a sum onto a view of units", "a a"),
        ("a product with itself", "a c"),
        ("two sums", ". a"),
    ],
)
def test_what_is_written_over_is_as_if_it_were_new(kind: str, expected: str) -> None:
    found = traced(Written(kind), torch.randn(2, 3))
    assert f"{found['y']} {found['c.weight']}" == expected
