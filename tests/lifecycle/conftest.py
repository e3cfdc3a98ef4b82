"""Learners in every stage of life."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchopt
from nets import learn, learner
from torch import Tensor, nn

import hatfn
import hatfn.models
from hatfn.models import MLP

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp": (lambda: MLP(5, 3, width=16), (8, 5), "head"),
    "resnet18s": (lambda: timm.create_model("resnet18s", num_classes=3), (4, 3, 16, 16), "fc"),
    "vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32),
        (4, 3, 32, 32),
        "head",
    ),
}


@pytest.fixture(scope="session", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[hatfn.HAT, Tensor, dict[str, hatfn.HATState]]:
    """A learner of three tasks with momentum and decay, and states with none to three learned."""
    make, shape, head = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = make(), torch.randn(shape)
        optimizer = torchopt.sgd(0.05, momentum=0.9, weight_decay=1e-3)
        hat = learner(module, x, head, optimizer=optimizer)
        states = {"none": hat.init(0)}
        for task, name in enumerate(("one", "two", "three")):
            states[name] = learn(hat, [*states.values()][-1], x, task)
    return hat, x, states
