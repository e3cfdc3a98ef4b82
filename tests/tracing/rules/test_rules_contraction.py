"""Layers, products and attention: who gates each weight, what it reads, and which units come out."""

from __future__ import annotations

import pytest
import torch
from told import IMAGES, INDICES, LINES, ROWS, TOKENS, chain, said
from torch import Tensor, nn
from torch.nn import functional as F

A, B, W = nn.Linear(3, 4), nn.Linear(3, 2), torch.ones(4, 2)
CONV, LINE = nn.Conv2d(1, 4, 1), nn.Conv1d(1, 4, 1)


def attended(m: nn.Module, x: Tensor, *settings: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(m.a(x), m.a(x), m.b(x), *settings)


def grouped(m: nn.Module, x: Tensor, bend=lambda values: values) -> Tensor:
    """Four heads of queries on two of values, each of two units."""
    q, v = m.a(x)[:, None], bend(m.c(x)).unflatten(-1, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(
        q.expand(-1, 4, -1, -1), q.expand(-1, 2, -1, -1), v, enable_gqa=True
    )


LAYERS = {
    "linear": (ROWS, chain, {"a": A, "b": nn.Linear(4, 2)}, {"a.weight": "a", "b.weight": "b < a", "b.bias": "b", "y": "b"}),
    "linear over tokens": (TOKENS, chain, {"a": A, "b": nn.Linear(4, 2)}, {"b.weight": "b < a", "y": "b@1"}),
    "linear without a bias": (TOKENS, chain, {"a": A, "b": nn.Linear(4, 2, bias=False)}, {"b.weight": "b < a", "y": "b@1"}),
    "linear that reads what is partly open": (
        ROWS, lambda m, x: m.b(torch.cat([m.a(x), x], 1)), {"a": A, "b": nn.Linear(7, 2)}, {"b.weight": "b < a0 a1 a2 a3 . . ."},
    ),
    "linear that reads what differs between tokens": (
        TOKENS, lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)), {"a": A, "c": nn.Linear(3, 4), "b": nn.Linear(4, 2)},
        {"b.weight": "b", "y": "b@1"},
    ),
    "linear without a bias that reads what differs between tokens": (
        TOKENS,
        lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)),
        {"a": A, "c": nn.Linear(3, 4), "b": nn.Linear(4, 4, bias=False)},
        {"b.weight": "b", "y": "b@1"},
    ),
    "linear that reads one unit, without a bias": (
        ROWS, lambda m, x: m.b(m.a(x)[:, :1].expand(-1, 4)), {"a": A, "b": nn.Linear(4, 2, bias=False)},
        {"b.weight": "b < a0", "y": "b"},
    ),
    "linear of tokens, without a bias": (
        TOKENS, lambda m, x: m.b(m.a(x).mT), {"a": A, "b": nn.Linear(5, 2, bias=False)}, {"b.weight": "task", "y": "a"},
    ),
    "linear of tokens": (TOKENS, lambda m, x: m.b(m.a(x).mT), {"a": A, "b": nn.Linear(5, 2)}, {"b.weight": "b", "y": "b@1"}),
    "a weight that is a vector": (
        TOKENS, lambda m, x: F.linear(m.a(x) * m.s, m.w, m.v), {"a": A, "s": torch.ones(4), "w": torch.ones(4), "v": torch.ones(())},
        {"w": "task", "v": "task", "s": "task", "y": "."},
    ),
    "a weight that is computed from the input": (
        ROWS, lambda m, x: F.linear(x, m.b(x).mT.repeat(1, 2)[:, :3]), {"b": B}, {"b.weight": "b", "y": "b"},
    ),
    "a weight that is computed from the input, and open": (
        ROWS, lambda m, x: F.linear(x, m.b(x).mT.exp().repeat(1, 2)[:, :3]), {"b": B}, {"b.weight": "b", "y": "."},
    ),
    "a weight of no layer": (ROWS, lambda m, x: F.linear(m.a(x), m.w), {"a": A, "w": torch.ones(2, 4)}, {"w": "w < a", "y": "w"}),
    "a bias that is used twice": (
        ROWS, lambda m, x: F.linear(m.a(x), m.w, m.v) + F.linear(x, m.u, m.v),
        {"a": A, "w": torch.ones(2, 4), "u": torch.ones(2, 3), "v": torch.ones(2)},
        {"w": "w < a", "u": "w", "v": "w", "y": "w"},
    ),
    "a bias that is used in another order": (
        ROWS, lambda m, x: torch.cat([F.linear(m.a(x), m.w, m.v), F.linear(x, m.u, m.v.flip(0))], 1),
        {"a": A, "w": torch.ones(2, 4), "u": torch.ones(2, 3), "v": torch.ones(2)},
        {"w": "w < a", "u": "w1 w0", "v": "w", "y": "w0 w1 w1 w0"},
    ),
    "convolution": (IMAGES, chain, {"a": CONV, "b": nn.Conv2d(4, 3, 2)}, {"b.weight": "b < a", "b.bias": "b", "y": "b"}),
    "convolution of lines": (LINES, chain, {"a": LINE, "b": nn.Conv1d(4, 3, 2)}, {"b.weight": "b < a", "y": "b"}),
    "convolution of volumes": (
        IMAGES, lambda m, x: m.b(m.a(x)[:, :, None]), {"a": CONV, "b": nn.Conv3d(4, 3, (1, 2, 2))}, {"b.weight": "b < a", "y": "b"},
    ),
    "convolution of one sample": (LINES, lambda m, x: m.b(m.a(x)[0])[None], {"a": LINE, "b": nn.Conv1d(4, 3, 2)}, {"b.weight": "b < a", "y": "b"}),
    "convolution of unlike places": (
        IMAGES, lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 3)), {"a": CONV, "c": nn.Conv2d(1, 4, 1), "b": nn.Conv2d(4, 3, 2)}, {"b.weight": "b", "y": "b"},
    ),
    "convolution in groups": (
        IMAGES, chain, {"a": CONV, "b": nn.Conv2d(4, 6, 2, groups=2)},
        {"b.weight": "b < [[a0 a1] [a0 a1] [a0 a1] [a2 a3] [a2 a3] [a2 a3]]", "b.bias": "b", "y": "b"},
    ),
    "depthwise convolution": (IMAGES, chain, {"a": CONV, "b": nn.Conv2d(4, 4, 2, groups=4)}, {"b.weight": "b < a@0", "y": "b"}),
    "depthwise convolution, twice as wide": (
        LINES, chain, {"a": LINE, "b": nn.Conv1d(4, 8, 2, groups=4)}, {"b.weight": "b < a0 a0 a1 a1 a2 a2 a3 a3@0", "y": "b"},
    ),
    "transposed convolution": (
        IMAGES, chain, {"a": CONV, "b": nn.ConvTranspose2d(4, 3, 2)}, {"b.weight": "b@1 < a@0", "b.bias": "b", "y": "b"},
    ),
    "transposed convolution of lines": (LINES, chain, {"a": LINE, "b": nn.ConvTranspose1d(4, 3, 2)}, {"b.weight": "b@1 < a@0", "y": "b"}),
    "transposed convolution in groups": (
        IMAGES, chain, {"a": CONV, "b": nn.ConvTranspose2d(4, 6, 2, groups=2)},
        {"b.weight": "[[b0 b1 b2] [b0 b1 b2] [b3 b4 b5] [b3 b4 b5]] < a@0", "b.bias": "b", "y": "b"},
    ),
    "transposed convolution of volumes": (
        IMAGES, lambda m, x: m.b(m.a(x)[:, :, None]), {"a": CONV, "b": nn.ConvTranspose3d(4, 3, (1, 2, 2))}, {"b.weight": "b@1 < a@0", "y": "b"},
    ),
    "a kernel whose places have units of their own": (
        LINES, lambda m, x: F.conv1d(m.a(x) + 0 * F.linear(x[:, 0, :1], m.w.permute(2, 0, 1).reshape(-1, 1))[:, :4, None], m.w),
        {"a": LINE, "w": torch.ones(2, 4, 3)}, {"y": "."},
    ),
    "a transposed kernel whose places have units of their own": (
        LINES, lambda m, x: F.conv_transpose1d(m.a(x) + 0 * F.linear(x[:, 0, :1], m.w.permute(2, 0, 1).reshape(-1, 1))[:, :4, None], m.w),
        {"a": LINE, "w": torch.ones(4, 2, 3)}, {"y": "."},
    ),
    "a fixed blur": (IMAGES, lambda m, x: F.conv2d(m.a(x), m.k, groups=4), {"a": CONV, "k": torch.ones(4, 1, 2, 2)}, {"y": "a"}),
    "a fixed blur, twice as wide": (
        IMAGES, lambda m, x: F.conv2d(m.a(x), m.k, groups=4), {"a": CONV, "k": torch.ones(8, 1, 2, 2)}, {"y": "a0 a0 a1 a1 a2 a2 a3 a3"},
    ),
    "a fixed blur with a bias": (
        IMAGES, lambda m, x: F.conv2d(m.a(x), m.k, m.k[:, 0, 0, 0], groups=4), {"a": CONV, "k": torch.ones(4, 1, 2, 2)}, {"y": "."},
    ),
    "a fixed sum of channels": (IMAGES, lambda m, x: F.conv2d(m.a(x), m.k, groups=2), {"a": CONV, "k": torch.ones(4, 2, 1, 1)}, {"y": "."}),
    "embedding": (INDICES, lambda m, x: m.e(x), {"e": nn.Embedding(5, 4)}, {"e.weight": "e@1", "y": "e@1"}),
    "embedding of one place": (
        ROWS, lambda m, x: m.a(x) + m.e(torch.tensor(2)), {"a": A, "e": nn.Embedding(5, 4)}, {"e.weight": "a@1", "y": "a"},
    ),
    "embedding with a layer behind": (
        INDICES, lambda m, x: m.b(m.e(x)), {"e": nn.Embedding(5, 4), "b": nn.Linear(4, 2)}, {"e.weight": "e@1", "b.weight": "b < e"},
    ),
}  # fmt: skip

PRODUCTS = {
    "a matrix on the right": (ROWS, lambda m, x: m.a(x) @ m.w, {"a": A, "w": W}, {"w": "w@1 < a@0", "y": "w"}),
    "a matrix behind tokens": (TOKENS, lambda m, x: m.a(x) @ m.w, {"a": A, "w": W}, {"w": "w@1 < a@0", "y": "w@1"}),
    "a matrix on the left": (TOKENS, lambda m, x: m.w @ m.b(x)[:, :2], {"b": B, "w": W}, {"w": "task", "y": "b@1"}),
    "a matrix for each place": (
        TOKENS, lambda m, x: (m.a(x).transpose(0, 1) @ m.w).transpose(0, 1), {"a": A, "w": torch.ones(5, 4, 2)},
        {"w": "[[w0 w1] [w2 w3] [w4 w5] [w6 w7] [w8 w9]] < a", "y": "[[w0 w1] [w2 w3] [w4 w5] [w6 w7] [w8 w9]]"},
    ),
    "a stack of one matrix": (TOKENS, lambda m, x: m.a(x) @ m.w, {"a": A, "w": torch.ones(1, 4, 2)}, {"w": "w@2 < a", "y": "w@1"}),
    "a matrix for each of two heads": (
        ROWS, lambda m, x: (m.a(x)[:, None, None] @ m.w)[:, :, 0], {"a": A, "w": torch.ones(2, 4, 2)},
        {"w": "[[w0 w1] [w2 w3]] < a", "y": "[[w0 w1] [w2 w3]]"},
    ),
    "a matrix on the left of units": (TOKENS, lambda m, x: (m.w @ m.a(x).mT).mT, {"a": A, "w": W.mT}, {"w": "w < a", "y": "w@1"}),
    "a fixed matrix": (ROWS, lambda m, x: m.a(x) @ m.k, {"a": A, "k": W}, {"y": "."}),
    "a vector on the right": (ROWS, lambda m, x: m.a(x) @ m.w, {"a": A, "w": torch.ones(4)}, {"w": "task", "y": "."}),
    "what a matrix makes of one unit": (
        ROWS, lambda m, x: m.a(x)[:, :1].expand(-1, 4) @ m.k, {"a": A, "k": W}, {"y": "a0"},
    ),
    "attention by hand": (TOKENS, lambda m, x: m.c(x).softmax(-1) @ m.b(x), {"c": nn.Linear(3, 5), "b": B}, {"b.weight": "b", "y": "b@1"}),
    "values on the left": (TOKENS, lambda m, x: m.b(x).mT @ m.a(x).exp(), {"a": A, "b": B}, {"y": "b"}),
    "two matrices, the finer on the left": (TOKENS, lambda m, x: m.a(x).mT @ m.b(x), {"a": A, "b": B}, {"y": "a"}),
    "two matrices, the finer on the right": (TOKENS, lambda m, x: m.b(x).mT @ m.a(x), {"a": A, "b": B}, {"y": "a@1"}),
    "two matrices, as fine": (TOKENS, lambda m, x: m.b(x).mT @ m.c(x), {"c": nn.Linear(3, 2), "b": B}, {"y": "c@1"}),
    "columns that are partly open": (
        TOKENS, lambda m, x: m.b(x).mT @ torch.cat([m.a(x)[..., :3], x], 2), {"a": A, "b": B},
        {"y": "[[a0 a1 a2 b0 b0 b0] [a0 a1 a2 b1 b1 b1]]"},
    ),
    "columns of zeros": (
        TOKENS, lambda m, x: m.b(x).mT @ torch.cat([torch.zeros_like(x), m.a(x)[..., :3]], 2), {"a": A, "b": B},
        {"y": "[[b0 b0 b0 a0 a1 a2] [b1 b1 b1 a0 a1 a2]]"},
    ),
    "addmm": (ROWS, lambda m, x: torch.addmm(m.v, m.a(x), m.w), {"a": A, "w": W, "v": torch.ones(2)}, {"w": "w@1 < a@0", "v": "w", "y": "w"}),
    "addmm with one number": (
        ROWS, lambda m, x: torch.addmm(m.v, m.a(x), m.w), {"a": A, "w": W, "v": torch.ones(1)}, {"w": "w@1 < a@0", "v": "task", "y": "."},
    ),
    "addmm with a matrix": (
        ROWS, lambda m, x: torch.addmm(m.v, m.a(x), m.w), {"a": A, "w": W, "v": torch.ones(2, 2)}, {"v": "task", "y": "."},
    ),
    "addmm without parameters": (
        TOKENS, lambda m, x: torch.addmm(m.v, m.b(x)[0].mT, m.a(x)[0].exp())[None], {"a": A, "b": B, "v": torch.ones(4)}, {"v": "task", "y": "."},
    ),
    "einsum": (TOKENS, lambda m, x: torch.einsum("nqk,nkc->nqc", m.c(x).exp(), m.b(x)), {"c": nn.Linear(3, 5), "b": B}, {"y": "b@1"}),
    "einsum that turns": (TOKENS, lambda m, x: torch.einsum("nqk, nkc -> ncq", m.c(x).exp(), m.b(x)), {"c": nn.Linear(3, 5), "b": B}, {"y": "b"}),
    "einsum, the first of two": (TOKENS, lambda m, x: torch.einsum("nka,nkb->nba", m.a(x), m.b(x)), {"a": A, "b": B}, {"y": "a@1"}),
    "einsum over everything but samples": (TOKENS, lambda m, x: torch.einsum("nka->n", m.a(x)), {"a": A}, {"y": "."}),
    "einsum that sums nothing": (ROWS, lambda m, x: torch.einsum("na,nb->nab", m.a(x).exp(), m.b(x)), {"a": A, "b": B}, {"y": "b@1"}),
    "einsum over tokens": (TOKENS, lambda m, x: torch.einsum("nka->na", m.a(x)), {"a": A}, {"y": "a"}),
    "einsum with a parameter": (ROWS, lambda m, x: torch.einsum("na,ab->nb", m.a(x), m.w), {"a": A, "w": W}, {"w": "w@1 < a@0", "y": "w"}),
    "einsum with a parameter on the left": (ROWS, lambda m, x: torch.einsum("ab,na->nb", m.w, m.a(x)), {"a": A, "w": W}, {"w": "w@1 < a@0", "y": "w"}),
    "einsum into heads": (
        ROWS, lambda m, x: torch.einsum("na,ahd->nhd", m.a(x), m.w), {"a": A, "w": torch.ones(4, 2, 3)},
        {"w": "[[w0 w1 w2] [w3 w4 w5]] < a@0", "y": "[[w0 w1 w2] [w3 w4 w5]]"},
    ),
    "einsum out of heads": (
        ROWS, lambda m, x: torch.einsum("nhd,ahd->na", m.a(x).unflatten(1, (2, 2)), m.w), {"a": A, "w": torch.ones(3, 2, 2)},
        {"w": "w < [[a0 a1] [a2 a3]]", "y": "w"},
    ),
    "einsum in heads": (
        ROWS, lambda m, x: torch.einsum("nhd,hde->nhe", m.a(x).unflatten(1, (2, 2)), m.w), {"a": A, "w": torch.ones(2, 2, 3)},
        {"w": "[[w0 w1 w2] [w3 w4 w5]] < [[a0 a1] [a2 a3]]", "y": "[[w0 w1 w2] [w3 w4 w5]]"},
    ),
    "einsum over places with a parameter": (
        TOKENS, lambda m, x: torch.einsum("pq,nqa->npa", m.w, m.a(x)), {"a": A, "w": torch.ones(3, 5)}, {"w": "task", "y": "a@1"},
    ),
    "einsum with a parameter that is summed alone": (
        ROWS, lambda m, x: torch.einsum("na,abc->nb", m.a(x), m.w), {"a": A, "w": torch.ones(4, 2, 3)}, {"w": "task", "y": "."},
    ),
    "einsum with a vector": (TOKENS, lambda m, x: torch.einsum("nka,a->nk", m.a(x), m.w), {"a": A, "w": torch.ones(4)}, {"w": "task", "y": "."}),
    "einsum that scales with a parameter": (
        ROWS, lambda m, x: torch.einsum("na,ab->nab", m.a(x), m.w), {"a": A, "w": W}, {"w": "task", "y": "a"},
    ),
    "a stack of products that is added to": (
        TOKENS, lambda m, x: torch.baddbmm(m.b(x), m.a(x), m.w.expand(2, 4, 2)), {"a": A, "b": B, "w": W}, {"w": "b@1 < a@0", "y": "b@1"},
    ),
    "einsum that leaves out what it makes": (TOKENS, lambda m, x: torch.einsum("nka,nak", m.a(x), m.a(x).mT)[None], {"a": A}, {"y": "."}),
    "einsum over whatever there is": (TOKENS, lambda m, x: torch.einsum("...a->...a", m.a(x)), {"a": A}, {"y": "."}),
    "einsum of a diagonal": (TOKENS, lambda m, x: torch.einsum("nkk->nk", m.c(x)), {"c": nn.Linear(3, 5)}, {"y": "."}),
    "attention": (TOKENS, attended, {"a": A, "b": B}, {"a.weight": "a", "b.weight": "b", "y": "b@1"}),
    "attention with a learned mask": (
        TOKENS, lambda m, x: attended(m, x, m.p), {"a": A, "b": B, "p": torch.ones(5, 5)}, {"p": "task", "y": "b@1"},
    ),
    "attention to values that differ between tokens": (
        TOKENS, lambda m, x: F.scaled_dot_product_attention(m.a(x), m.a(x), torch.cat([m.b(x)[:, :1], m.b(x).exp()[:, 1:]], 1)),
        {"a": A, "b": B}, {"y": "."},
    ),
    "attention of queries and values that are learned": (
        TOKENS, lambda m, x: F.scaled_dot_product_attention(m.p[None], m.a(x), m.q[None]), {"a": A, "p": torch.ones(5, 4), "q": torch.ones(5, 4)},
        {"p": "task", "q": "task"},
    ),
    "attention in groups to what is open": (TOKENS, lambda m, x: grouped(m, x, torch.exp), {"a": A, "c": nn.Linear(3, 4)}, {"y": "."}),
    "attention without samples": (TOKENS, lambda m, x: attended(m, x[0])[None], {"a": A, "b": B}, {"y": "b@1"}),
    "a scale before any layer": (ROWS, lambda m, x: x * m.p, {"p": torch.ones(3)}, {"p": "task mul", "y": "mul"}),
    "attention in groups": (TOKENS, grouped, {"a": A, "c": nn.Linear(3, 4)}, {"y": "[[c0 c1] [c0 c1] [c2 c3] [c2 c3]]"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS | PRODUCTS)
def test_who_gates_and_what_is_read(name: str) -> None:
    shape, function, parts, expected = (LAYERS | PRODUCTS)[name]
    found = said(shape, function, parts)
    assert {key: found[key] for key in expected} == expected


HEADS = {
    "linear": (ROWS, chain, {"a": A, "b": nn.Linear(4, 2)}, "head < a"),
    "of what is partly open": (ROWS, lambda m, x: m.b(torch.cat([m.a(x), x], 1)), {"a": A, "b": nn.Linear(7, 2)}, "head < a0 a1 a2 a3 . . ."),
    "convolution": (IMAGES, lambda m, x: m.b(m.a(x)).mean((2, 3)), {"a": CONV, "b": nn.Conv2d(4, 2, 1)}, "head < a"),
    "used twice": (ROWS, lambda m, x: m.b(m.a(x)) + m.b(m.a(x).relu()), {"a": A, "b": nn.Linear(4, 2)}, "head < a"),
    "used twice, on other units": (
        ROWS, lambda m, x: m.b(m.a(x)) + m.b(torch.cat([m.a(x)[:, :1], m.c(x)], 1)), {"a": A, "c": nn.Linear(3, 3), "b": nn.Linear(4, 2)},
        "head < a0 . . .",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_gated_by_nothing_and_knows_what_it_reads(name: str) -> None:
    shape, function, parts, expected = HEADS[name]
    found = said(shape, function, parts, head="b")
    assert (found["b.weight"], found["b.bias"], found["y"]) == (expected, "head", ".")
