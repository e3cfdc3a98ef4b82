"""Every rule on a module of a few lines, perturbed; and the eight architectures of the promise."""

from __future__ import annotations

import pytest
import timm
import torch
from nets import ConvNet, Fn, Transformer, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import hatfn
from hatfn.networks import MLP, AlexNet
from hatfn.testing import verify_wiring


def image(channels: int = 2, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


class AliasedStatistic(nn.Module):
    """A running mean that the graph knows by another name than the module's first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("first", torch.zeros(8))
        self.inner = nn.Module()
        self.inner.register_buffer("second", self.first)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.training:
            self.inner.second.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.head(self.b(h - self.inner.second).relu())


def tied() -> dict[str, nn.Module]:
    """Two layers with one weight and two biases."""
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    return {"a": a, "b": b}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of queries on one of keys and values."""
    q = q.unflatten(-1, (2, -1)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k[:, None], v[:, None])
    return mixed.transpose(1, 2).flatten(2)


def into_a_part(x: Tensor, part: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:6] = part
    return x


def standardised(weight: Tensor, gain: Tensor | None = None) -> Tensor:
    """As timm's ScaledStdConv2d does it."""
    return F.batch_norm(weight[None], None, None, gain, training=True)[0]


torch.manual_seed(0)  # the table draws its inputs when it is imported, whatever was imported before
RULES = {
    "linear": (mlp(), torch.randn(2, 5), "4"),
    "linear without bias": (
        nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5), "2",
    ),
    "conv1d": (
        Fn(lambda m, x: m.head(m.b(F.relu(m.a(x))).mean(2)), a=nn.Conv1d(2, 8, 3, padding="same"),
           b=nn.Conv1d(8, 8, 3, dilation=2), head=nn.Linear(8, 3)),
        torch.randn(2, 2, 9), "head",
    ),
    "conv2d in groups": (
        Fn(lambda m, x: m.head(m.b(F.relu(m.a(x))).mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           b=nn.Conv2d(8, 12, 3, groups=4), head=nn.Linear(12, 3)),
        image(), "head",
    ),
    "depthwise": (
        Fn(lambda m, x: m.head(m.b(F.relu(m.a(x))).mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           b=nn.Conv2d(8, 8, 3, groups=8), head=nn.Linear(8, 3)),
        image(), "head",
    ),
    "conv3d": (
        Fn(lambda m, x: m.head(m.b(F.relu(m.a(x))).mean((2, 3, 4))), a=nn.Conv3d(1, 8, 3, padding=1),
           b=nn.Conv3d(8, 6, 1), head=nn.Linear(6, 3)),
        torch.randn(2, 1, 4, 4, 4), "head",
    ),
    "transposed conv": (
        Fn(lambda m, x: m.head(m.c(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           b=nn.ConvTranspose2d(8, 6, 2, stride=2), c=nn.ConvTranspose2d(6, 4, 3, groups=2),
           head=nn.Linear(4, 3)),
        image(), "head",
    ),
    "transposed conv 1d and 3d": (
        Fn(lambda m, x: m.head(m.b(m.a(x)[:, :, None, None]).mean((2, 3, 4))),
           a=nn.ConvTranspose1d(2, 8, 3), b=nn.ConvTranspose3d(8, 6, (1, 1, 2)), head=nn.Linear(6, 3)),
        torch.randn(2, 2, 5), "head",
    ),
    "batch norm 1d": (
        Fn(lambda m, x: m.head(F.relu(m.n(m.a(x)))), a=nn.Linear(5, 8), n=nn.BatchNorm1d(8),
           head=nn.Linear(8, 3)),
        torch.randn(4, 5), "head",
    ),
    "batch norm 2d": (ConvNet(), image(1), "head"),
    "batch norm 3d": (
        Fn(lambda m, x: m.head(m.n(m.a(x)).relu().mean((2, 3, 4))), a=nn.Conv3d(1, 8, 3),
           n=nn.BatchNorm3d(8), head=nn.Linear(8, 3)),
        torch.randn(2, 1, 4, 4, 4), "head",
    ),
    "batch norm read twice": (  # the convolution has another user, so its gate cannot be deferred
        Fn(lambda m, x: (lambda h: m.head((m.n(h).relu() + h).mean((2, 3))))(m.a(x)),
           a=nn.Conv2d(2, 8, 3), n=nn.BatchNorm2d(8), head=nn.Linear(8, 3)),
        image(), "head",
    ),
    "batch norm of the input": (
        Fn(lambda m, x: m.head(m.a(m.n(x)).relu().mean((2, 3))), n=nn.BatchNorm2d(2),
           a=nn.Conv2d(2, 8, 3), head=nn.Linear(8, 3)),
        image(), "head",
    ),
    "batch norm without affine": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x)).relu()).relu().mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           n=nn.BatchNorm2d(8, affine=False), b=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 3)),
        image(), "head",
    ),
    "instance norm": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x)).relu()).relu().mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           n=nn.InstanceNorm2d(8, affine=True), b=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 3)),
        image(), "head",
    ),
    "instance norm without affine": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x)).relu()).relu().mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           n=nn.InstanceNorm2d(8), b=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 3)),
        image(), "head",
    ),
    "layer norm": (Transformer(), torch.randn(2, 4, 5), "head"),
    "layer norm of a linear layer": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x))).relu()), a=nn.Linear(5, 8), n=nn.LayerNorm(8),
           b=nn.Linear(8, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "layer norm of the input": (
        Fn(lambda m, x: m.head(m.a(m.n(x)).relu()), n=nn.LayerNorm(5), a=nn.Linear(5, 8),
           head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "layer norm of images": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x)).relu()).mean((2, 3))), a=nn.Conv2d(2, 4, 3),
           n=nn.LayerNorm((4, 6, 6)), b=nn.Conv2d(4, 6, 1), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "layer norm without affine": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x))).relu()), a=nn.Linear(5, 8),
           n=nn.LayerNorm(8, elementwise_affine=False), b=nn.Linear(8, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "layer norm of a permuted convolution": (  # mixes channels: no deferring through it
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x).permute(0, 2, 3, 1)).relu()).mean((1, 2))),
           a=nn.Conv2d(2, 8, 3), n=nn.LayerNorm(8), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "group norm": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x)).relu()).mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           n=nn.GroupNorm(2, 8), b=nn.Conv2d(8, 6, 1), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "rms norm": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x))).relu()), a=nn.Linear(5, 8), n=nn.RMSNorm(8),
           b=nn.Linear(8, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "rms norm of the input": (
        Fn(lambda m, x: m.head(m.b(m.n(x)).relu()), n=nn.RMSNorm(5), b=nn.Linear(5, 8),
           head=nn.Linear(8, 3)),
        torch.randn(2, 5), "head",
    ),
    "embedding": (
        Fn(lambda m, x: m.head(m.a(m.e(x)).relu().mean(1)), e=nn.Embedding(7, 6), a=nn.Linear(6, 8),
           head=nn.Linear(8, 3)),
        torch.randint(7, (3, 4)), "head",
    ),
    "pooling and flatten": (
        Fn(lambda m, x: m.head(m.b(F.avg_pool2d(F.max_pool2d(m.a(x), 2), 3, 1, 1).flatten(1)).relu()),
           a=nn.Conv2d(2, 4, 3), b=nn.Linear(36, 8), head=nn.Linear(8, 3)),
        image(), "head",
    ),
    "adaptive pooling": (
        Fn(lambda m, x: m.head(m.b(F.adaptive_avg_pool2d(m.a(x).relu(), 2).flatten(1)).relu()
                               + m.c(F.adaptive_max_pool2d(m.a(x).relu(), 1).flatten(1)).relu()),
           a=nn.Conv2d(2, 4, 3), b=nn.Linear(16, 8), c=nn.Linear(4, 8), head=nn.Linear(8, 3)),
        image(), "head",
    ),
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
    "softmax over channels": (
        Fn(lambda m, x: m.head(m.b(torch.softmax(m.a(x), -1))), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "padding for a maximum": (
        Fn(lambda m, x: m.head(m.b(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1), value=-torch.inf), 2)).mean((2, 3))),
           a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 6, 3), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "attention by hand": (
        Fn(lambda m, x: m.head((torch.softmax(m.q(x) @ m.k(x).mT, -1) @ m.v(x)).mean(1)),
           q=nn.Linear(5, 4), k=nn.Linear(5, 4), v=nn.Linear(5, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "addmm": (
        Fn(lambda m, x: m.head(m.b(torch.addmm(m.v, m.a(x), m.w).relu())), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(8, 7)), v=nn.Parameter(torch.randn(7)), b=nn.Linear(7, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
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
    "einsum": (
        Fn(lambda m, x: m.head(m.b(torch.einsum("nqk,nkc->nqc", torch.einsum("nqc,nkc->nqk", m.a(x), m.c(x)),
                                                m.v(x))).mean(1)),
           a=nn.Linear(5, 4), c=nn.Linear(5, 4), v=nn.Linear(5, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "einsum with a parameter": (
        Fn(lambda m, x: m.head(m.b(torch.einsum("nc,oc->no", m.a(x), m.w).relu())), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(7, 8)), b=nn.Linear(7, 6), head=nn.Linear(6, 3)),
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
    "mixing tokens": (
        Fn(lambda m, x: m.head(m.b(m.t(m.a(x).relu().transpose(1, 2)).transpose(1, 2)).mean(1)),
           a=nn.Linear(5, 8), t=nn.Linear(4, 4, bias=False), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "mixing tokens with a bias": (
        Fn(lambda m, x: m.head(m.b(m.t(m.a(x).relu().transpose(1, 2)).transpose(1, 2)).mean(1)),
           a=nn.Linear(5, 8), t=nn.Linear(4, 4), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
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
    "a statistic under two names": (AliasedStatistic(), torch.randn(4, 5), "head"),
    "samples mixed like features": (
        Fn(lambda m, x: m.head(m.b(torch.cat([m.a(x), m.c(x)]).reshape(len(x), -1))), a=nn.Linear(5, 8),
           c=nn.Linear(5, 8), b=nn.Linear(16, 6), head=nn.Linear(6, 3)),
        torch.randn(4, 5), "head",
    ),
    "instance norm with a bias alone": (
        Fn(lambda m, x: m.head(m.b(F.instance_norm(m.a(x), bias=m.c)).mean((2, 3))), a=nn.Conv2d(2, 8, 3),
           c=nn.Parameter(torch.randn(8)), b=nn.Conv2d(8, 6, 1), head=nn.Linear(6, 3)),
        image(), "head",
    ),
    "batch norm without statistics": (
        Fn(lambda m, x: m.head(m.b(m.n(m.a(x)))), a=nn.Linear(5, 8),
           n=nn.BatchNorm1d(8, track_running_stats=False), b=nn.Linear(8, 8), head=nn.Linear(8, 3)),
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
        Fn(lambda m, x: m.head(m.b(m.a(x).cumsum(1))), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "an lstm": (
        Fn(lambda m, x: m.head(m.b(m.l(m.a(x))[0][:, -1]).relu()), a=nn.Linear(5, 6),
           l=nn.LSTM(6, 4, batch_first=True), b=nn.Linear(4, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "an lstm of two layers in both directions": (
        Fn(lambda m, x: m.head(m.b(m.l(m.a(x))[0].mean(1)).relu()), a=nn.Linear(5, 6),
           l=nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True, bias=False), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "an lstm that starts from the input": (
        Fn(lambda m, x: m.head(m.b(m.l(m.a(x), (x[None, :, 0, :4], x[None, :, 0, :4]))[0][:, -1]).relu()),
           a=nn.Linear(5, 6), l=nn.LSTM(6, 4, batch_first=True), b=nn.Linear(4, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "an lstm's last state": (
        Fn(lambda m, x: m.head(m.b(m.l(m.a(x))[1][0][0]).relu()), a=nn.Linear(5, 6),
           l=nn.LSTM(6, 4, batch_first=True), b=nn.Linear(4, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "a gru": (
        Fn(lambda m, x: m.head(m.b(m.l(m.a(x))[0][-1]).relu()), a=nn.Linear(5, 6), l=nn.GRU(6, 4),
           b=nn.Linear(4, 6), head=nn.Linear(6, 3)),
        torch.randn(4, 2, 5), "head",
    ),
    "a recurrent layer": (
        Fn(lambda m, x: m.head(m.b(m.l(m.a(x))[0][:, -1]).relu()), a=nn.Linear(5, 6),
           l=nn.RNN(6, 4, batch_first=True), b=nn.Linear(4, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "an lstm with projections": (
        Fn(lambda m, x: m.head(m.b(m.l(m.a(x))[0][:, -1]).relu()), a=nn.Linear(5, 6),
           l=nn.LSTM(6, 4, proj_size=3, batch_first=True), b=nn.Linear(3, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "an lstm used twice": (
        Fn(lambda m, x: m.head(m.b(m.l(m.l(m.a(x))[0])[0][:, -1]).relu()), a=nn.Linear(5, 6),
           l=nn.LSTM(6, 6, batch_first=True), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
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
    "attention with one head of values": (
        Fn(lambda m, x: m.head(m.b(attend(m.q(x), m.k(x), m.v(x))).relu().mean(1)), q=nn.Linear(5, 8),
           k=nn.Linear(5, 4), v=nn.Linear(5, 4), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule_is_sound(name: str) -> None:
    module, x, head = RULES[name]
    wiring = hatfn.trace(module, x[:1], head=head)
    seen = verify_wiring(module, wiring, x)
    assert not seen.untested
    assert wiring.groups, "a trace that gates nothing proves nothing"


SHARED = ["tied weights", "a module used twice", "an lstm of two layers in both directions"]


@pytest.mark.parametrize("name", SHARED)
def test_what_can_be_shared_is_shared(name: str) -> None:
    module, x, head = RULES[name]
    kinds = {role.kind for role in hatfn.trace(module, x[:1], head=head).params.values()}
    assert kinds == {"shared", "head"}


@pytest.mark.parametrize(
    "name",
    ["padding for a maximum", "unfold and fold", "a sum of two paths", "attention with one head of values",
     "einsum", "written into zeros", "addmm", "the largest of some places", "the larger of two",
     "positions that are resized"],
)  # fmt: skip
def test_units_reach_the_layer_behind(name: str) -> None:
    module, x, head = RULES[name]
    assert hatfn.trace(module, x, head=head).params["b.weight"].into is not None


def test_one_number_for_all_channels_is_gated_channel_by_channel() -> None:
    module, x, head = RULES["add: one number to all channels"]
    wiring = hatfn.trace(module, x, head=head)
    assert wiring.params["b.weight"].into.group == "a"
    assert wiring.params["shift"].out.index.shape == (8, 1, 1)


def test_no_group_of_one_unit_is_made_of_a_scalar() -> None:
    module, x, head = RULES["a temperature"]
    assert dict(hatfn.trace(module, x, head=head).groups) == {"a": 8}


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(), nn.CELU(), nn.SELU(),
    nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.Tanh(), nn.Hardtanh(), nn.Hardtanh(1, 6), nn.ReLU6(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Softplus(), nn.Softsign(), nn.Mish(), nn.LogSigmoid(),
    nn.Tanhshrink(), nn.Hardshrink(), nn.Softshrink(), nn.Threshold(0.1, 0.0), nn.Threshold(0.1, 2.0),
    nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.GLU(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Identity(),
]  # fmt: skip
KEEPS_ZERO = {
    "ReLU", "GELU", "SiLU", "ELU", "CELU", "SELU", "LeakyReLU", "PReLU", "RReLU", "Tanh", "ReLU6",
    "Hardswish", "Softsign", "Mish", "Tanhshrink", "Hardshrink", "Softshrink", "Dropout", "AlphaDropout",
    "GLU", "Identity",
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activation_keeps_units_only_if_it_keeps_zero(activation: nn.Module) -> None:
    width = 4 if isinstance(activation, nn.GLU) else 8
    module = nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(2, 5)
    wiring = hatfn.trace(module, x, head="4")
    verify_wiring(module, wiring, x)
    keeps = type(activation).__name__ in KEEPS_ZERO
    if isinstance(activation, nn.Hardtanh | nn.Threshold):
        keeps = bool(activation(torch.zeros(1)) == 0)
    assert (wiring.params["2.weight"].into is not None) == keeps


ARCHITECTURES = {
    "mlp": (lambda: MLP(64, 10), (64,)),
    "alexnet": (lambda: AlexNet(10, width=0.5), (3, 32, 32)),
    "resnet18": (lambda: timm.create_model("resnet18"), (3, 64, 64)),
    "resnet50": (lambda: timm.create_model("resnet50"), (3, 64, 64)),
    "vit_tiny_patch16_224": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), (3, 64, 64),
    ),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), (3, 64, 64)),
    "densenet121": (lambda: timm.create_model("densenet121"), (3, 64, 64)),
    "mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), (3, 64, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_sound_and_well_traced(name: str) -> None:
    make, shape = ARCHITECTURES[name]
    module, x = make(), torch.randn(2, *shape)
    wiring = hatfn.trace(module, x[:1])
    assert not verify_wiring(module, wiring, x).untested
    measures = wiring.measures
    assert wiring.heads
    assert measures.shared >= 0.95
    assert measures.pair_gated >= 0.90
    assert measures.protected <= 0.30
    assert not wiring.fallbacks
