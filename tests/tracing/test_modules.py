"""Modules that are not timm's, in one file each as their users write them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchopt
import torchvision
from nets import learn, moved
from torch import Tensor, nn
from torch.nn import functional as F

import hatfn
from hatfn.testing import verify_no_forgetting, verify_wiring


class UNet(nn.Module):
    """Transposed convolutions and a skip; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join, self.norm = nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x).relu()
        x = self.middle(self.down2(skip).relu()).relu()
        x = self.norm(self.join(torch.cat([skip, self.up(x)], 1))).relu()
        return self.head(x)


class Signal(nn.Module):
    """A 1-D convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 8, 5, padding="same"), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, groups=2), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Volume(nn.Module):
    """A 3-D convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv3d(1, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8)
        self.b, self.head = nn.Conv3d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(self.norm(self.a(x)).relu(), 2)
        return self.head(self.b(x).relu().mean((2, 3, 4)))


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` with its weights returned and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over tokens with learned positions."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(5, 16), nn.Parameter(torch.randn(1, 6, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **settings)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.position).mean(1))


class Queries(nn.Module):
    """``nn.TransformerDecoderLayer``: learned queries attend to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.queries = nn.Linear(5, 16), nn.Parameter(torch.randn(1, 3, 16))
        self.body = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.queries.expand(len(x), -1, -1), self.embed(x)).mean(1))


class Sequence(nn.Module):
    """A recurrent classifier."""

    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embed, self.cell = nn.Linear(5, 12), cell(12, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(x).relu())[0].mean(1))


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(self.embed(x).relu()).relu()).relu().mean(1))


def vision(name: str, **settings: object) -> nn.Module:
    return torchvision.models.get_model(name, num_classes=4, **settings)


tokens, image = (4, 6, 5), (4, 3, 64, 64)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, float]] = {
    "u-net": (UNet, (4, 1, 8, 8), "head", 0.95),
    "1-d": (Signal, (4, 2, 16), "head", 0.8),
    "3-d": (Volume, (4, 1, 6, 6, 6), "head", 0.95),
    "multi-head attention": (SelfAttention, tokens, "head", 0.95),
    "transformer encoder": (Encoder, tokens, "head", 0.9),
    "pre-norm encoder": (partial(Encoder, norm_first=True, activation="gelu"), tokens, "head", 0.9),
    "transformer decoder": (Queries, tokens, "head", 0.9),
    "lstm": (partial(Sequence, nn.LSTM), tokens, "head", 0.95),
    "gru": (partial(Sequence, nn.GRU), tokens, "head", 0.95),
    "a layer used twice": (Twice, tokens, "head", 0.95),
    "torchvision's resnet18": (partial(vision, "resnet18"), image, "fc", 0.99),
    "torchvision's mobilenet": (partial(vision, "mobilenet_v3_small"), image, "classifier.3", 0.98),
    "torchvision's vit": (
        partial(torchvision.models.VisionTransformer, 64, 16, 2, 2, 32, 64, num_classes=4), image,
        "heads.head", 0.9,
    ),
    "torchvision's swin": (
        partial(torchvision.models.SwinTransformer, [4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=4),
        image, "head", 0.9,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")  # small groups are soon used up
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of pooling under vmap
@pytest.mark.parametrize("name", MODULES)
def test_it_is_traced_and_does_not_forget(name: str) -> None:
    make, shape, head, shared = MODULES[name]
    module, x = make(), torch.randn(shape)
    wiring = hatfn.trace(module, x, head=head)
    assert not wiring.fallbacks
    assert wiring.measures.shared >= shared
    assert not verify_wiring(module, wiring, x[:2], draws=2).untested
    settings = {"s_max": 60.0, "sparsity": 0.0}
    hat = hatfn.build(module, wiring, [4, 4], torchopt.adamw(1e-2, weight_decay=0.1), **settings)
    if name == "u-net":
        state = hat.consolidate(hat.init(seed=0), 0)
        target = torch.randint(4, (4, 8, 8))
        begun = hat.begin(state, 1)
        state, info = hat.update(begun, (x, target), 1, 5.0)
        assert info.ok
        assert moved(begun, state)
        assert hat.predict(hat.consolidate(state, 1, []), x).shape == (2, 4, 4, 8, 8)
        return
    state = learn(hat, hat.init(seed=0), x, 0, steps=3)
    before = hat.forward(state, x, 0)
    state = learn(hat, state, x, 1, steps=3, carry=True)
    assert torch.equal(hat.forward(state, x, 0), before)
    if name in ("u-net", "transformer decoder", "lstm"):
        verify_no_forgetting(hat, state, x)
    assert hat.predict(state, x).shape == (2, 4, 4)


def test_auxiliary_heads_in_train_mode() -> None:
    """GoogLeNet returns a named tuple in train mode only, with two auxiliary heads."""
    module = vision("googlenet", aux_logits=True, init_weights=False)
    x = torch.randn(4, 3, 64, 64)
    heads = ("fc", "aux1.fc2", "aux2.fc2")
    hat = hatfn.build(module, hatfn.trace(module, x, head=heads), [4, 3], torchopt.sgd(1e-3))
    begun = hat.begin(hat.init(seed=0), 0)
    state, info = hat.update(begun, (x, torch.randint(4, (4,))), 0, 5.0)
    assert info.ok
    assert moved(begun, state)
    assert [tuple(logits.shape) for logits in info.logits] == [(4, 4)] * 3
    assert hat.forward(hat.consolidate(state, 0, []), x, 0).shape == (4, 4)
