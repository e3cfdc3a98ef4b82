"""Modules of a few lines for the rules of values: sums, products, movement, arithmetic on parameters."""

from __future__ import annotations

import torch
from nets import Fn, image
from torch import Tensor, nn
from torch.nn import functional as F


def tied() -> dict[str, nn.Module]:
    """Two layers with one weight and two biases."""
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    return {"a": a, "b": b}


def into_a_part(x: Tensor, part: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:6] = part
    return x


def standardised(weight: Tensor, gain: Tensor | None = None) -> Tensor:
    """Standardise a weight as timm's ScaledStdConv2d does."""
    return F.batch_norm(weight[None], None, None, gain, training=True)[0]


torch.manual_seed(0)  # the table draws its inputs when it is imported, whatever was imported before
VALUES = {
    "add: a residual stream": (
        Fn(lambda m, x: (lambda h: m.head(m.c(h + m.b(h.relu())).relu()))(m.a(x)), a=nn.Linear(5, 8),
           b=nn.Linear(8, 8), c=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "add: rolled onto itself": (
        Fn(lambda m, x: (lambda h: m.head(m.b((h + h.roll(1, 1)).relu())))(m.a(x)), a=nn.Linear(5, 8),
           b=nn.Linear(8, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "add: one unit to all": (
        Fn(lambda m, x: m.head(m.b((m.a(x) + m.c(x)).relu())), a=nn.Linear(5, 8), c=nn.Linear(5, 1),
           b=nn.Linear(8, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "add: an ungated shortcut": (
        Fn(lambda m, x: m.head(m.b((m.a(x) + x).relu())), a=nn.Linear(5, 5), b=nn.Linear(5, 8),
           head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "add: one number to all channels": (
        Fn(lambda m, x: m.head(m.b(m.a(x).relu() ** 2 * m.scale + m.shift).mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           b=nn.Conv2d(8, 6, 1), scale=nn.Parameter(torch.ones(1)), shift=nn.Parameter(torch.ones(1)),
           head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "add: one number in two places": (
        Fn(lambda m, x: m.head(m.b(m.a(x).relu() + m.shift) + m.shift), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           shift=nn.Parameter(torch.ones(1)), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "add: a constant": (
        Fn(lambda m, x: m.head(m.b((m.a(x) + 1).relu())), a=nn.Linear(5, 8), b=nn.Linear(8, 8),
           head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "mul: a gate that sigmoid opens": (
        Fn(lambda m, x: (lambda h: m.head(m.b(h * torch.sigmoid(m.c(h)))))(m.a(x).relu()),
           a=nn.Linear(5, 8), c=nn.Linear(8, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "mul: two activations": (
        Fn(lambda m, x: m.head(m.b(F.silu(m.a(x)) * m.c(x))), a=nn.Linear(5, 8), c=nn.Linear(5, 8),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "mul: a layer scale": (
        Fn(lambda m, x: (lambda h: m.head(h + m.b(h).relu() * m.scale))(m.a(x)), a=nn.Linear(5, 8),
           b=nn.Linear(8, 8), scale=nn.Parameter(torch.ones(8)), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "mul: a scale on something open": (
        Fn(lambda m, x: m.head(m.b(x * m.scale).relu()), b=nn.Linear(5, 8),
           scale=nn.Parameter(torch.rand(5)), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "cat": (
        Fn(lambda m, x: (lambda h: m.head(m.b(torch.cat([h, m.c(h).relu()], 1))))(m.a(x).relu()),
           a=nn.Linear(5, 8), c=nn.Linear(8, 4), b=nn.Linear(12, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "cat and split": (
        Fn(lambda m, x: (lambda u, v: m.head(m.b(torch.cat([v, u * 2, v], 1))))(*m.a(x).chunk(2, 1)),
           a=nn.Linear(5, 8), b=nn.Linear(12, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "cat of unlike places": (
        Fn(lambda m, x: m.head(m.b(torch.cat([m.a(x), m.c(x)], 2)).mean((2, 3))), a=nn.Conv2d(2, 4, 3),
           c=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 6, 1), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "channel shuffle": (
        Fn(lambda m, x: m.head(m.b(m.a(x).relu().reshape(-1, 2, 4, 6, 6).transpose(1, 2)
                                   .reshape(-1, 8, 6, 6)).mean((2, 3))),
           a=nn.Conv2d(2, 8, 3), b=nn.Conv2d(8, 6, 1, groups=2), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "unfold and fold": (
        Fn(lambda m, x: m.head(m.b(F.fold(F.unfold(m.a(x), 3, padding=1), (6, 6), 3, padding=1)).mean((2, 3))),
           a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 6, 3), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "unfold into a linear layer": (
        Fn(lambda m, x: m.head(m.b(F.unfold(m.a(x), 3, stride=3).mT).relu().mean(1)), a=nn.Conv2d(2, 4, 3),
           b=nn.Linear(36, 6), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "padding": (
        Fn(lambda m, x: m.head(m.b(F.pad(F.pad(m.a(x), (1, 1, 1, 1)), (1, 1, 1, 1), mode="reflect")).mean((2, 3))),
           a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 6, 3), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "padding with ones": (
        Fn(lambda m, x: m.head(m.b(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)).mean((2, 3))),
           a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 6, 3), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "padding for a maximum": (
        Fn(lambda m, x: m.head(m.b(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1), value=-torch.inf), 2)).mean((2, 3))),
           a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 6, 3), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "the largest of some places": (
        Fn(lambda m, x: m.head(m.b(m.a(x).max(1)[0])), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "the larger of two": (
        Fn(lambda m, x: m.head(m.b(torch.max(m.a(x), m.c(x)))), a=nn.Linear(5, 8), c=nn.Linear(5, 8),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "written into a part": (
        Fn(lambda m, x: m.head(m.b(into_a_part(m.a(x), m.c(x)))), a=nn.Linear(5, 8), c=nn.Linear(5, 4),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "written into zeros": (
        Fn(lambda m, x: m.head(m.b(into_a_part(torch.zeros_like(x[:, :1]).repeat(1, 8), m.c(x)))),
           c=nn.Linear(5, 4), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a matrix as a parameter": (
        Fn(lambda m, x: m.head(m.b((x @ m.w).relu())), w=nn.Parameter(torch.randn(5, 8)),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "positions that are resized": (
        Fn(lambda m, x: m.head(m.b((m.a(x) + F.interpolate(m.p, (6, 6), mode="bicubic")).relu()).mean((2, 3))),
           a=nn.Conv2d(2, 4, 3), p=nn.Parameter(torch.randn(1, 4, 3, 3)), b=nn.Conv2d(4, 6, 1),
           head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "a class token": (
        Fn(lambda m, x: m.head(m.b(torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1)).relu().mean(1)),
           token=nn.Parameter(torch.randn(1, 1, 8)), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "a module used twice": (
        Fn(lambda m, x: m.head(m.b(m.b(m.a(x)).relu()).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 8),
           head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "tied weights": (
        Fn(lambda m, x: m.head(m.b(m.a(m.e(x)).relu()).relu()), e=nn.Linear(5, 8), **tied(),
           head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight tied to its transpose": (
        Fn(lambda m, x: m.head(F.linear(m.a(x).relu(), m.a.weight.T).relu()), a=nn.Linear(5, 8),
           head=nn.Linear(5, 3)),
        torch.randn(2, 5), "head",
    ),
    "an embedding tied to an output": (
        Fn(lambda m, x: m.head(F.linear(m.e(x).mean(1), m.e.weight).relu()), e=nn.Embedding(7, 6),
           head=nn.Linear(7, 3)),
        torch.randint(7, (3, 4)), "head",
    ),
    "a weight plus its transpose": (
        Fn(lambda m, x: m.head(F.linear(m.a(x).relu(), m.w + m.w.T)), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(8, 8)), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight plus another": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), m.w) + F.linear(m.b(x), m.d + m.w)), a=nn.Linear(5, 8),
           b=nn.Linear(5, 8), w=nn.Parameter(torch.randn(7, 8)), d=nn.Parameter(torch.randn(7, 8)),
           head=nn.Linear(7, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight and its norm": (
        Fn(lambda m, x: m.head(F.linear(m.a(x).relu(), m.w) / m.w.norm(dim=1).clamp_min(1e-6)),
           a=nn.Linear(5, 8), w=nn.Parameter(torch.randn(7, 8)), head=nn.Linear(7, 3)),
        torch.randn(2, 5), "head",
    ),
    "a normalised weight, used again elsewhere": (
        Fn(lambda m, x: m.head(F.linear(m.c(m.n(F.linear(x, m.w)).relu()).relu(), m.w.T)),
           w=nn.Parameter(torch.randn(8, 5)), n=nn.BatchNorm1d(8), c=nn.Linear(8, 8), head=nn.Linear(5, 3)),
        torch.randn(2, 5), "head",
    ),
    "a normalised bias, used again elsewhere": (
        Fn(lambda m, x: m.head(m.n(m.a(x)).relu() + m.b(x[:, :1] * m.a.bias)), a=nn.Linear(5, 8),
           n=nn.BatchNorm1d(8), b=nn.Linear(8, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight that is also an output": (
        Fn(lambda m, x: (m.head(F.linear(m.a(x), m.w)), m.w), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(7, 8)), head=nn.Linear(7, 3)),
        torch.randn(2, 5), "head",
    ),
    "weights put together": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), torch.cat([m.w, m.u])).relu()), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(3, 8)), u=nn.Parameter(torch.randn(4, 8)), head=nn.Linear(7, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight moved and scaled": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), m.w.T * 0.5).relu()), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(8, 7)), head=nn.Linear(7, 3)),
        torch.randn(2, 5), "head",
    ),
    "samples mixed like features": (
        Fn(lambda m, x: m.head(m.b(torch.cat([m.a(x), m.c(x)]).reshape(len(x), -1))), a=nn.Linear(5, 8),
           c=nn.Linear(5, 8), b=nn.Linear(16, 6), head=nn.Linear(6, 3)),
        torch.randn(4, 5), "head",
    ),
    "a module called input": (
        Fn(lambda m, x: m.head(m.input(x).relu()), input=nn.Linear(5, 5), head=nn.Linear(5, 3)),
        torch.randn(2, 5), "head",
    ),
    "nothing in a slice": (
        Fn(lambda m, x: (lambda h: m.head(m.b(torch.cat([h[:, :0], h], 1))))(m.a(x)), a=nn.Linear(5, 8),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight that is a vector": (
        Fn(lambda m, x: m.head(m.a(x) * F.linear(x, m.w)[:, None]), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(5)), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "an activation in place": (
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        torch.randn(2, 5), "3",
    ),
    "written over what is read again": (
        Fn(lambda m, x: (lambda h: m.head(m.b(h.add_(1.0)) + m.c(h)))(m.a(x)), a=nn.Linear(5, 8),
           b=nn.Linear(8, 6), c=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "written over a view": (
        Fn(lambda m, x: (lambda h: (h.view(-1, 2, 4).add_(1.0), m.head(m.b(h))))(m.a(x))[1], a=nn.Linear(5, 8),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "written over what dropout passed on": (
        Fn(lambda m, x: (lambda h: (F.dropout(h, training=m.training).add_(1.0), m.head(m.b(h))))(m.a(x))[1],
           a=nn.Linear(5, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a shortcut added in place": (
        Fn(lambda m, x: (lambda h: m.head(m.c(m.b(h.relu()).add_(h).relu_())))(m.a(x)), a=nn.Linear(5, 8),
           b=nn.Linear(8, 8), c=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a temperature": (  # one number is no unit: it would switch a task off as a whole
        Fn(lambda m, x: m.scale * m.head(m.a(x).relu()), a=nn.Linear(5, 8),
           scale=nn.Parameter(torch.ones(1)), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "a bias put together": (
        Fn(lambda m, x: m.head(m.b(F.linear(x, m.w, torch.cat([m.u, torch.zeros(3), m.v])).tanh())),
           w=nn.Parameter(torch.randn(8, 5)), u=nn.Parameter(torch.randn(3)),
           v=nn.Parameter(torch.randn(2)), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight that is standardised": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), (m.w - m.w.mean(1, keepdim=True)) / m.w.std(1, keepdim=True)).relu()),
           a=nn.Linear(5, 8), w=nn.Parameter(torch.randn(8, 8)), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "a weight that batch norm standardises": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), standardised(m.w, m.gain)).relu() @ m.v), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(7, 8)), gain=nn.Parameter(torch.rand(7)),
           v=nn.Parameter(torch.randn(7, 6)), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a standardised weight without gain": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), standardised(m.w)).relu() @ m.v), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(7, 8)), v=nn.Parameter(torch.randn(7, 6)), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a standardised weight that another layer uses": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), standardised(m.w)) + F.linear(m.b(x), m.w)), a=nn.Linear(5, 8),
           b=nn.Linear(5, 8), w=nn.Parameter(torch.randn(7, 8)), head=nn.Linear(7, 3)),
        torch.randn(2, 5), "head",
    ),
    "an operator without a rule": (
        Fn(lambda m, x: m.head(m.b(m.a(x).logcumsumexp(1))), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a sum of two paths": (
        Fn(lambda m, x: m.head(m.b(torch.stack([m.a(x), m.c(x)], 1).relu().sum(1))), a=nn.Linear(5, 8),
           c=nn.Linear(5, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a sum over a few channels": (
        Fn(lambda m, x: m.head(m.b(m.a(x) * m.a(x).sum(1, keepdim=True))), a=nn.Linear(5, 8),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
}  # fmt: skip
"""{what is tried: (module, inputs, head)}"""
