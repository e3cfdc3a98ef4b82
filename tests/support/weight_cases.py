"""Modules of a few lines whose weights are computed before use, and modules of graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nets import Fn, image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize


class MaxNorm(nn.Module):
    """Rows of a weight that are no longer than one, by arithmetic."""

    def forward(self, weight: Tensor) -> Tensor:
        length = weight.norm(dim=0, keepdim=True)
        return weight * (length.clamp(0.5, 1.0) / (length.clamp(min=0.5) + 1e-5))


class Renorm(nn.Module):
    """The same by PyTorch's operator, as EEG networks have it."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.renorm(2, 0, 1.0)


def parametrized(layer: nn.Module, by: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", by)
    return layer


class Combined(nn.Module):
    """A convolution in time and one in space, made one before use, as ShallowFBCSPNet has them."""

    def __init__(
        self, by: Callable[[Tensor, Tensor], Tensor], bias: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.time, self.space = nn.Conv2d(1, 6, (5, 1)), nn.Conv2d(6, 7, (1, 4), bias=False)
        self.by, self.bias = by, bias

    def forward(self, x: Tensor) -> Tensor:
        time, space = self.time.weight, self.space.weight
        return F.conv2d(x, self.by(time, space), self.bias(space.squeeze(2), self.time.bias))


COMBINED = {
    "sums of products": Combined(
        lambda time, space: (time * space.permute(1, 0, 2, 3)).sum(0).unsqueeze(1),
        lambda space, bias: space.sum(-1).mm(bias[:, None]).squeeze(),
    ),
    "einsum": Combined(
        lambda time, space: torch.einsum("ikt,oiks->ots", time[..., 0], space)[:, None],
        lambda space, bias: torch.einsum("ois,i->o", space, bias),
    ),
    "tensordot": Combined(
        lambda time, space: torch.tensordot(space[:, :, 0], time[:, 0, :, 0], ([1], [0])).mT[:, None],
        lambda space, bias: space.sum(2) @ bias,
    ),
}


class Graph(nn.Module):
    """Two layers that send messages along edges, which all nodes share."""

    def __init__(self, send: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.send = send

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(self.send(self.b(self.send(self.a(x).relu(), edges)), edges).relu())


def rows(index: Tensor, h: Tensor) -> Tensor:
    return index[:, None].expand(-1, h.shape[1])


GRAPHS = {
    "index and add": lambda h, e: torch.zeros_like(h).index_add(0, e[1], h[e[0]]),
    "select and scatter": lambda h, e: h + torch.zeros_like(h).scatter_add(0, rows(e[1], h), h.index_select(0, e[0])),
    "gather and the largest": lambda h, e: h.scatter_reduce(0, rows(e[1], h), h.gather(0, rows(e[0], h)), "amax"),
    "a mean": lambda h, e: torch.zeros_like(h).index_reduce(0, e[1], h[e[0]], "mean"),
    "written": lambda h, e: h.index_copy(0, e[0], h[e[0]] * 2),
}  # fmt: skip
EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])


def between(layer: nn.Module) -> nn.Module:
    """A layer that reads the units of another one."""
    return Fn(
        lambda m, x: m.head(m.b(m.a(x).relu()).relu()), a=nn.Linear(5, 8), b=layer, head=nn.Linear(6, 3)
    )


def convolved(layer: nn.Module) -> nn.Module:
    """The same for images."""
    return Fn(lambda m, x: m.head(m.b(m.a(x).relu()).relu().mean((2, 3))), a=nn.Conv2d(2, 8, 3), b=layer,
              head=nn.Linear(6, 3))  # fmt: skip


torch.manual_seed(0)  # the table draws its inputs when it is imported, whatever was imported before
norm, ROW = parametrizations.weight_norm, torch.randn(2, 5)
WEIGHTS = {
    "weight norm": (between(norm(nn.Linear(8, 6))), ROW, "head"),
    "weight norm of a convolution": (convolved(norm(nn.Conv2d(8, 6, 3))), image(), "head"),
    "weight norm of blocks": (convolved(norm(nn.Conv2d(8, 6, 3, groups=2))), image(), "head"),
    "weight norm of columns": (between(norm(nn.Linear(8, 6), dim=1)), ROW, "head"),
    "weight norm of the whole": (between(norm(nn.Linear(8, 6), dim=None)), ROW, "head"),
    "weight norm of a transposed convolution": (convolved(norm(nn.ConvTranspose2d(8, 6, 3))), image(), "head"),
    "weight norm of a layer used twice": (
        Fn(lambda m, x: m.head(m.b(m.b(m.a(x)).relu()).relu()), a=nn.Linear(5, 8), b=norm(nn.Linear(8, 8)),
           head=nn.Linear(8, 3)),
        ROW, "head",
    ),
    "spectral norm": (between(parametrizations.spectral_norm(nn.Linear(8, 6))), ROW, "head"),
    "renorm": (convolved(parametrized(nn.Conv2d(8, 6, 3), Renorm())), image(), "head"),
    "renorm of blocks": (convolved(parametrized(nn.Conv2d(8, 6, 3, groups=2), Renorm())), image(), "head"),
    "renorm of an activation": (
        Fn(lambda m, x: m.head(m.b(m.a(x).renorm(2, 0, 1.0)).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 6),
           head=nn.Linear(6, 3)),
        ROW, "head",
    ),
    "max norm by arithmetic": (between(parametrized(nn.Linear(8, 6), MaxNorm())), ROW, "head"),
    "a standardised weight, turned": (  # of a row that is off in part, less its mean, nothing is zero
        Fn(lambda m, x: m.head(m.b(F.linear(m.a(x), F.batch_norm(m.w[None], None, None, training=True)[0].T))),
           a=nn.Linear(5, 8), w=nn.Parameter(torch.randn(8, 7)), b=nn.Linear(7, 6), head=nn.Linear(6, 3)),
        ROW, "head",
    ),
    "low rank": (
        Fn(lambda m, x: m.head(m.c(F.linear(m.a(x), m.w + 0.5 * (m.u @ m.v)).relu())), a=nn.Linear(5, 8),
           w=nn.Parameter(torch.randn(6, 8)), u=nn.Parameter(torch.randn(6, 3)),
           v=nn.Parameter(torch.randn(3, 8)), c=nn.Linear(6, 6), head=nn.Linear(6, 3)),
        ROW, "head",
    ),
    "low rank, and read apart": (
        Fn(lambda m, x: m.head(F.linear(m.a(x), m.u @ m.v) + F.linear(m.c(x), m.u).exp()), a=nn.Linear(5, 8),
           c=nn.Linear(5, 3), u=nn.Parameter(torch.randn(6, 3)), v=nn.Parameter(torch.randn(3, 8)),
           head=nn.Linear(6, 3)),
        ROW, "head",
    ),
    "a bag of words": (
        Fn(lambda m, x: m.head(m.b(m.e(x)).relu()), e=nn.EmbeddingBag(7, 6), b=nn.Linear(6, 8),
           head=nn.Linear(8, 3)),
        torch.randint(7, (3, 4)), "head",
    ),
    **{
        f"combined by {name}": (
            Fn(lambda m, x: m.head(m.b(m.c(x).square()).mean((2, 3))), c=layer, b=nn.Conv2d(7, 6, (2, 1)),
               head=nn.Linear(6, 3)),
            torch.randn(2, 1, 12, 4), "head",
        )
        for name, layer in COMBINED.items()
    },
    **{f"a graph: {name}": (Graph(send), (torch.randn(4, 5), EDGES), "head") for name, send in GRAPHS.items()},
}  # fmt: skip
