"""Learners with two learned tasks for export, and calls of an exported module."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import optree
import timm
import torch
import torchopt
from nets import ConvNet, Recurrent, Transformer, learn, mlp
from timm.models.densenet import DenseNet
from timm.models.levit import Levit
from torch import Tensor, nn

import hatfn
from hatfn.models import MLP, AlexNet
from hatfn.state import HATState


def small(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=3, **settings)


def encoder() -> nn.Module:
    """PyTorch's encoder layer, which has a fused path in eval mode."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.Linear(5, 16), layer, nn.Flatten(), nn.Linear(64, 3))


def features(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), *last)


VECTORS, IMAGES = (4, 5), (4, 3, 64, 64)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    # name: module, input, what trace is told
    "mlp": (mlp, VECTORS, {"head": "4"}),
    "of ours": (partial(MLP, 5, 3, width=16, dropout=0.2), VECTORS, {}),
    "of ours, inside": (lambda: nn.Sequential(AlexNet(8, width=0.1), nn.ReLU(), nn.Linear(8, 3)),
                        (4, 3, 32, 32), {"head": "2"}),
    "conv net": (ConvNet, (4, 1, 6, 6), {}),
    "block": (Transformer, (4, 4, 5), {}),
    "encoder": (encoder, (4, 4, 5), {"head": "3"}),
    "lstm": (Recurrent, (4, 6, 5), {}),
    "resnet18s": (small("resnet18s", channels=(16, 24, 32, 48)), (4, 3, 8, 8), {}),
    "dense": (partial(DenseNet, growth_rate=8, block_config=(2, 2), num_classes=3, bn_size=2), IMAGES, {}),
    "depthwise": (small("test_convnext"), IMAGES, {}),
    "squeeze-excite": (small("test_efficientnet"), IMAGES, {}),
    "standardised weights": (small("test_nfnet"), IMAGES, {}),
    "vit": (small("test_vit", img_size=64), IMAGES, {}),
    "two heads": (
        small("deit_tiny_distilled_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2),
        IMAGES, {}),
    "remembers": (
        partial(Levit, img_size=32, num_classes=3, embed_dim=(16, 24), num_heads=(2, 2), depth=(1, 1),
                key_dim=8),
        (4, 3, 32, 32), {}),
    "input gate": (mlp, VECTORS, {"head": "4", "input_gate": True}),
    "a head behind": (partial(features, nn.ReLU()), VECTORS, {"output_gate": True}),
    "a head and an input gate": (features, VECTORS, {"input_gate": True, "head": False}),
    "no classes": (features, VECTORS, {}),
}  # fmt: skip


@cache
def setting(name: str) -> tuple[hatfn.HAT, HATState, Tensor]:
    """A learner with two of three tasks learned, with different masks, and an input."""
    torch.manual_seed(0)
    make, shape, told = NETS[name]
    module, x = make(), torch.randn(shape)
    tasks: dict[str, Any] = {"classes": [3, 2, 5]}
    if name == "no classes":
        tasks = {"classes": None, "num_tasks": 3, "loss": lambda output, _: output.square().mean()}
    settings = {"optimizer": torchopt.adam(1e-2), "s_max": 80.0, "sparsity": 0.0} | tasks
    hat = hatfn.build(module, hatfn.trace(module, x[:1], **told), **settings)
    state = learn(hat, learn(hat, hat.init(0), x, 0, steps=2), x, 1, steps=2)
    assert any(not torch.equal(*mask[:2]) for mask in state.masks.values())
    return hat, state, x


def called(module: nn.Module, x: Tensor) -> Tensor:
    """The output of an exported module as a user serves it, without gradients.

    With gradients, or with weights that require them, PyTorch uses other kernels for attention and
    products, which agree only up to rounding.
    """
    flags = [param.requires_grad for param in module.parameters()]
    with torch.no_grad():
        output = module.requires_grad_(False)(x)
    for param, flag in zip(module.parameters(), flags, strict=True):
        param.requires_grad_(flag)
    return output


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves(tree)} - {0}
