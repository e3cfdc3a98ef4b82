"""Serrà et al. 2018, line by line, and a learner of the same network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor, nn

import hatfn
from hatfn.state import HATState

CLASSES = (3, 2, 3)
SIZES = (5, 8, 7)


class Paper(NamedTuple):
    """The network of the first paper, in which a layer's gates multiply its output."""

    weights: list[Tensor]
    biases: list[Tensor]
    heads: list[tuple[Tensor, Tensor]]
    embeddings: list[list[Tensor]]  # for each task, an embedding for each layer

    def leaves(self, task: int) -> list[Tensor]:
        return [*self.weights, *self.biases, *self.heads[task], *self.embeddings[task]]

    def forward(self, x: Tensor, task: int, s: float) -> tuple[Tensor, list[Tensor]]:
        gates = [torch.sigmoid(s * e) for e in self.embeddings[task]]
        for weight, bias, gate in zip(self.weights, self.biases, gates, strict=True):
            x = torch.relu(x @ weight.T + bias) * gate
        weight, bias = self.heads[task]
        return x @ weight.T + bias, gates


def paper_training(
    net: Paper,
    data: list[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    batch: int,
    lr: float,
    s_max: float,
    sparsity: float,
    max_norm: float,
    compensation: float,
) -> list[list[Tensor]]:
    """Train task after task in place; return the cumulative masks after each."""
    used = [torch.zeros_like(bias) for bias in net.biases]
    history = []
    for task, (x, y) in enumerate(data):
        held = [used[0][:, None]]  # the input has no gate
        held += [torch.minimum(post[:, None], pre) for pre, post in pairwise(used)]
        for _ in range(epochs):
            for i in range(0, len(x), batch):
                s = (s_max - 1 / s_max) * i / len(x) + 1 / s_max
                leaves = [leaf.requires_grad_() for leaf in net.leaves(task)]
                logits, gates = net.forward(x[i : i + batch], task, s)
                paid = sum((a * (1 - u)).sum() for a, u in zip(gates, used, strict=True))
                free = sum((1 - u).sum() for u in used)
                loss = nn.functional.cross_entropy(logits, y[i : i + batch]) + sparsity * paid / free
                for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                    leaf.grad = slope
                with torch.no_grad():
                    for weight, p in zip(net.weights, held, strict=True):
                        weight.grad *= 1 - p
                    for bias, p in zip(net.biases, used, strict=True):
                        bias.grad *= 1 - p
                    for e in net.embeddings[task]:
                        steep = torch.cosh(torch.clamp(s * e, -50, 50)) + 1
                        e.grad *= compensation / s * steep / (torch.cosh(e) + 1)
                    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
                    for leaf in leaves:
                        leaf.sub_(lr * leaf.grad)
                    for e in net.embeddings[task]:
                        e.clamp_(-6, 6)
        final = [torch.sigmoid(s_max * e).detach() for e in net.embeddings[task]]
        used = [torch.maximum(u, a) for u, a in zip(used, final, strict=True)]
        history.append(used)
    return history


LAYERS = ("0", "2")


def network(sizes: Sequence[int] = SIZES) -> nn.Sequential:
    """A network with hidden layers 0 and 2, and the head 4."""
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 2)).double()


def learner(module: nn.Module, **settings: Any) -> hatfn.HAT:
    x = torch.zeros(1, module[0].in_features).double()
    settings = {"classes": CLASSES, "optimizer": torchopt.sgd(1.0), "protection": "paper"} | settings
    hat = hatfn.build(module, hatfn.trace(module, x, head="4"), **settings)
    assert tuple(hat.wiring.groups) == LAYERS
    return hat


def copied(state: HATState) -> Paper:
    """The numbers of a learner's state in the network of the paper."""
    weights, biases = state.task_params["4.weight"], state.task_params["4.bias"]
    return Paper(
        [state.params[f"{layer}.weight"].clone() for layer in LAYERS],
        [state.params[f"{layer}.bias"].clone() for layer in LAYERS],
        [(weights[t, :c].clone(), biases[t, :c].clone()) for t, c in enumerate(CLASSES)],
        [[state.embeddings[layer][t].clone() for layer in LAYERS] for t in range(len(CLASSES))],
    )
