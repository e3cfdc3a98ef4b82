"""Modules of a few lines for the rules of layers: products, norms, pooling, attention, recurrence."""

from __future__ import annotations

import torch
from nets import ConvNet, Fn, Transformer, image, mlp
from torch import Tensor, nn
from torch.nn import functional as F


class AliasedStatistic(nn.Module):
    """A running mean with two names; the graph does not use the module's first one."""

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


class Quantised(nn.Linear):
    """A linear layer that returns a scale as well, as layers of quantised models do."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with two heads of queries and one head of keys and values."""
    q = q.unflatten(-1, (2, -1)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k[:, None], v[:, None])
    return mixed.transpose(1, 2).flatten(2)


torch.manual_seed(0)  # the table draws its inputs when it is imported, whatever was imported before
LAYERS = {
    "linear": (mlp(), torch.randn(2, 5), "4"),
    "a layer that returns more than its product": (
        Fn(lambda m, x: m.head(m.b(m.a(x)[0].relu()).relu()), a=Quantised(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
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
    "softmax over channels": (
        Fn(lambda m, x: m.head(m.b(torch.softmax(m.a(x), -1))), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
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
    "a statistic under two names": (AliasedStatistic(), torch.randn(4, 5), "head"),
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
    "attention with one head of values": (
        Fn(lambda m, x: m.head(m.b(attend(m.q(x), m.k(x), m.v(x))).relu().mean(1)), q=nn.Linear(5, 8),
           k=nn.Linear(5, 4), v=nn.Linear(5, 4), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "two steps of a gru": (
        Fn(lambda m, x: m.head(m.b(m.l(m.c(x), m.l(m.c(x), m.a(x)))).relu()), a=nn.Linear(5, 6),
           c=nn.Linear(5, 4), l=nn.GRUCell(4, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "two steps of a recurrent layer": (
        Fn(lambda m, x: m.head(m.b(m.l(m.c(x), m.l(m.c(x)))).relu()),
           c=nn.Linear(5, 4), l=nn.RNNCell(4, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "two steps of an lstm": (
        Fn(lambda m, x: m.head(m.b(m.l(m.c(x), m.l(m.c(x)))[0]).relu()),
           c=nn.Linear(5, 4), l=nn.LSTMCell(4, 6, bias=False), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a step of a gru from an open state": (
        Fn(lambda m, x: m.head(m.b(m.l(m.c(x), m.a(x).cos())).relu()), a=nn.Linear(5, 6),
           c=nn.Linear(5, 4), l=nn.GRUCell(4, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "einsum into, in and out of heads": (
        Fn(lambda m, x: m.head(torch.einsum("nhe,ohe->no", torch.einsum("nhd,hde->nhe", torch.einsum(
               "nc,chd->nhd", m.a(x), m.w).relu(), m.v).relu(), m.u).relu()), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(8, 2, 3)), v=nn.Parameter(torch.randn(2, 3, 4)),
           u=nn.Parameter(torch.randn(6, 2, 4)), head=nn.Linear(6, 3)),
        torch.randn(2, 5), "head",
    ),
    "a matrix on the left of units": (
        Fn(lambda m, x: m.head(m.b((m.w @ m.a(x).mT).mT.relu()).mean(1)), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(6, 8)), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "a matrix that is repeated for each sample": (
        Fn(lambda m, x: m.head(m.b(torch.baddbmm(m.c(x), m.a(x), m.w.expand(len(x), 8, 6)).relu()).mean(1)),
           a=nn.Linear(5, 8), c=nn.Linear(5, 6), w=nn.Parameter(torch.randn(8, 6)), b=nn.Linear(6, 6),
           head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "a spectrum and back": (
        Fn(lambda m, x: m.head(m.b(torch.fft.irfft(torch.fft.rfft(m.a(x), dim=1), dim=1)).relu().mean(1)),
           a=nn.Linear(5, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        torch.randn(2, 4, 5), "head",
    ),
    "patches of the input": (
        Fn(lambda m, x: m.head(m.b(m.a(F.unfold(x, 3).mT).relu()).mean(1)), a=nn.Linear(18, 8),
           b=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        image(), "head",
    ),
}  # fmt: skip
"""{what is tried: (module, inputs, head)}"""
