"""Where every unit goes: what an operator that moves, sums or pools makes of known units."""

from __future__ import annotations

import pytest
import torch
from nets import Fn
from told import traced
from torch import Tensor, nn
from torch.nn import functional as F


def said(function, x: Tensor, **more: nn.Module | nn.Parameter) -> dict[str, str]:
    """What is said of a function of three layers' outputs: a and c have four units, d has six."""

    def layer(units: int) -> nn.Module:
        return nn.Conv2d(1, units, 1) if x.dim() == 4 else nn.Linear(3, units)

    layers = {"a": layer(4), "c": layer(4), "d": layer(6)}
    return traced(Fn(lambda m, x: function(m, m.a(x), m.c(x), m.d(x)), **layers, **more), x)


ROWS, TOKENS, IMAGES = torch.randn(2, 3), torch.randn(2, 3, 3), torch.randn(2, 1, 4, 4)

# To add d shows what is zero whatever is gated: there d's unit stays, and beside an open element it is lost.
MOVED = {
    "roll": (ROWS, lambda m, a, c, d: a.roll(1, 1), "a3 a0 a1 a2"),
    "slice": (ROWS, lambda m, a, c, d: a[:, 1:3], "a1 a2"),
    "tokens": (TOKENS, lambda m, a, c, d: a, "a@1"),
    "transpose": (TOKENS, lambda m, a, c, d: a.mT, "a"),
    "unbind": (TOKENS, lambda m, a, c, d: a.mT.unbind(1)[2], "a2"),
    "split": (ROWS, lambda m, a, c, d: torch.cat(a.split([1, 3], 1)[::-1], 1), "a1 a2 a3 a0"),
    "reshape": (ROWS, lambda m, a, c, d: a.reshape(-1, 2, 2), "[[a0 a1] [a2 a3]]"),
    "reshape what repeats": (TOKENS, lambda m, a, c, d: a.mT.reshape(-1, 2, 6), "[[a0 a0 a0 a1 a1 a1] [a2 a2 a2 a3 a3 a3]]"),
    "chosen by constants": (ROWS, lambda m, a, c, d: a[:, torch.tensor([3, 1, 1])], "a3 a1 a1"),
    "chosen by the input": (ROWS, lambda m, a, c, d: a.gather(1, c.argsort(1)), "."),
    "chosen of one unit by the input": (ROWS, lambda m, a, c, d: a[:, 1:2].expand(-1, 4).gather(1, c.argsort(1)), "a1"),
    "expanded to what depends on the input": (ROWS, lambda m, a, c, d: a[:, :1].expand_as(c), "a0"),
    "dropout": (ROWS, lambda m, a, c, d: F.dropout(a, 0.5, m.training), "a"),
    "another type": (ROWS, lambda m, a, c, d: a.double(), "a"),
    "copied onto": (ROWS, lambda m, a, c, d: c.clone().copy_(a), "a"),
    "copied onto more": (TOKENS, lambda m, a, c, d: c.clone().copy_(a[:, :1]), "a@1"),
    "written into a part": (ROWS, lambda m, a, c, d: torch.slice_scatter(d, a, 1, 1, 5), "d0 a0 a1 a2 a3 d5"),
    "written into a place": (TOKENS, lambda m, a, c, d: torch.select_scatter(a.mT, c[:, 0, :3], 1, 2)[..., 1], "a0 a1 c1 a3"),
    "cat": (ROWS, lambda m, a, c, d: torch.cat([c, a], 1), "c0 c1 c2 c3 a0 a1 a2 a3"),
    "cat along the last": (ROWS, lambda m, a, c, d: torch.cat([c[:, 1:], a], -1), "c1 c2 c3 a0 a1 a2 a3"),
    "cat of tokens": (TOKENS, lambda m, a, c, d: torch.cat([a[:, :1], c[:, :1]], 1), "[[a0 a1 a2 a3] [c0 c1 c2 c3]]"),
    "cat of samples": (ROWS, lambda m, a, c, d: torch.cat([a, a]), "a"),
    "cat of unlike samples": (ROWS, lambda m, a, c, d: torch.cat([a, c]), "."),
    "cat with nothing": (ROWS, lambda m, a, c, d: torch.cat([a.new_zeros(0), a], 1), "a"),
    "zeros": (ROWS, lambda m, a, c, d: torch.cat([torch.zeros_like(c[:, :2]), a], 1) + d, "d0 d1 a0 a1 a2 a3"),
    "new zeros": (ROWS, lambda m, a, c, d: torch.cat([c.new_zeros(len(c), 2), a], 1) + d, "d0 d1 a0 a1 a2 a3"),
    "full of zeros": (ROWS, lambda m, a, c, d: torch.cat([torch.full_like(c[:, :2], 0.0), a], 1) + d, "d0 d1 a0 a1 a2 a3"),
    "new and full of zeros": (ROWS, lambda m, a, c, d: torch.cat([c.new_full((len(c), 2), 0.0), a], 1) + d, "d0 d1 a0 a1 a2 a3"),
    "ones": (ROWS, lambda m, a, c, d: torch.cat([torch.ones_like(c[:, :2]), a], 1) + d, ". . a0 a1 a2 a3"),
    "full of twos": (ROWS, lambda m, a, c, d: torch.cat([torch.full_like(c[:, :2], 2.0), a], 1) + d, ". . a0 a1 a2 a3"),
    "new and full of twos": (ROWS, lambda m, a, c, d: torch.cat([c.new_full((len(c), 2), 2.0), a], 1) + d, ". . a0 a1 a2 a3"),
    "padding": (ROWS, lambda m, a, c, d: F.pad(a, (1, 1)) + d, "d0 a0 a1 a2 a3 d1"),
    "padding with a number": (ROWS, lambda m, a, c, d: F.pad(a, (1, 1), value=1.0) + d, ". a0 a1 a2 a3 ."),
    "padding, as it is computed": (ROWS, lambda m, a, c, d: torch.constant_pad_nd(a, (1, 1)) + d, "d0 a0 a1 a2 a3 d1"),
    "padding with a number, as it is computed": (ROWS, lambda m, a, c, d: torch.constant_pad_nd(a, (1, 1), 1.0) + d, ". a0 a1 a2 a3 ."),
    "padding with zero, as it is computed": (ROWS, lambda m, a, c, d: torch.constant_pad_nd(a, (1, 1), 0.0) + d, "d0 a0 a1 a2 a3 d1"),
    "padding by reflection": (ROWS, lambda m, a, c, d: F.pad(a, (1, 1), mode="reflect"), "a1 a0 a1 a2 a3 a2"),
    "padding for a maximum": (IMAGES, lambda m, a, c, d: F.max_pool2d(F.pad(a, (1, 1), value=-torch.inf), 2), "a"),
    "padding for more than a maximum": (
        IMAGES, lambda m, a, c, d: (lambda p: F.max_pool2d(p, 2) + p.exp().mean())(F.pad(a, (1, 1), value=-torch.inf)), ".",
    ),
}  # fmt: skip


POOLED = {
    "one dimension": (TOKENS, lambda m, a, c, d: F.avg_pool1d(a.mT, 2), "a"),
    "two dimensions": (IMAGES, lambda m, a, c, d: F.max_pool2d(a, 2), "a"),
    "two dimensions of images without samples": (IMAGES, lambda m, a, c, d: F.adaptive_avg_pool2d(a[0], 2)[None], "a"),
    "three dimensions": (IMAGES, lambda m, a, c, d: F.avg_pool3d(a[:, :, None], (1, 2, 2)), "a"),
    "unlike places": (IMAGES, lambda m, a, c, d: F.avg_pool2d(torch.cat([a, c], 3), 2), "."),
    "channels": (TOKENS, lambda m, a, c, d: F.avg_pool1d(a, 2), "."),
    "upsampled": (IMAGES, lambda m, a, c, d: F.interpolate(a, scale_factor=2.0, mode="bilinear"), "a"),
    "patches": (IMAGES, lambda m, a, c, d: F.unfold(a[:, 1:], (1, 2)), "a1 a1 a2 a2 a3 a3"),
    "patches of an image without samples": (IMAGES, lambda m, a, c, d: F.unfold(a[0, :3], (1, 2))[None], "a0 a0 a1 a1 a2 a2"),
    "patches of an image that no gate covers": (IMAGES, lambda m, a, c, d: F.unfold(a.exp(), (1, 2)), "."),
    "a spectrum over places": (IMAGES, lambda m, a, c, d: torch.fft.rfft2(a).abs(), "a"),
    "a spectrum over channels": (TOKENS, lambda m, a, c, d: torch.fft.fft(a).real, "."),
    "a spectrum and back": (TOKENS, lambda m, a, c, d: torch.fft.irfft(torch.fft.rfft(a, dim=1), dim=1), "a@1"),
    "complex numbers as pairs": (TOKENS, lambda m, a, c, d: torch.view_as_real(torch.fft.rfft(a, dim=1))[..., 1], "a@1"),
    "pairs as complex numbers": (TOKENS, lambda m, a, c, d: torch.view_as_complex(torch.stack([a, a], -1)).abs(), "a@1"),
    "unlike pairs as complex numbers": (TOKENS, lambda m, a, c, d: torch.view_as_complex(torch.stack([a, c], -1)).abs(), "."),
    "composite operators": (ROWS, lambda m, a, c, d: torch.multiply(torch.divide(a, 2.0), 3.0), "a"),
    "patches of unlike places": (IMAGES, lambda m, a, c, d: F.unfold(torch.cat([a[:, 1:3], c[:, 1:3]], 2), (1, 2)), "."),
    "patches of unlike columns": (IMAGES, lambda m, a, c, d: F.unfold(torch.cat([a[:, 1:3], c[:, 1:3]], 3), (1, 2)), "."),
    "patches put together": (
        IMAGES, lambda m, a, c, d: F.fold(a.flatten(2)[:, [0, 0, 1, 1, 2, 3]], (4, 5), (1, 2)), "a0 a1 .",
    ),
    "patches of unlike samples put together": (
        IMAGES, lambda m, a, c, d: F.fold(torch.cat([a[:, :2], c[:, :2]]).flatten(2), (4, 5), (1, 2)).reshape(2, 2, 1, 4, 5).transpose(0, 1), ".",
    ),
    "a mean over places": (TOKENS, lambda m, a, c, d: a.mean(1), "a"),
    "a mean over places, kept": (TOKENS, lambda m, a, c, d: a.mean(-2, keepdim=True), "a@1"),
    "a mean over channels": (TOKENS, lambda m, a, c, d: a.mean(-1), "."),
    "a mean of everything": (TOKENS, lambda m, a, c, d: a.mean(), "."),
    "a sum of everything of one unit": (TOKENS, lambda m, a, c, d: a[..., 2].sum(), "a2"),
    "a sum over places both ways": (IMAGES, lambda m, a, c, d: a.sum((-1, 2)), "a"),
    "a sum over places and channels": (IMAGES, lambda m, a, c, d: a.sum((1, 3)), "."),
    "a norm over places": (TOKENS, lambda m, a, c, d: a.norm(dim=1), "a"),
    "a maximum over places": (TOKENS, lambda m, a, c, d: a.amax(1), "a"),
    "a maximum and where it is": (TOKENS, lambda m, a, c, d: a.max(1)[0], "a"),
    "a minimum over channels": (TOKENS, lambda m, a, c, d: a.min(-1)[0], "."),
    "where a maximum is": (TOKENS, lambda m, a, c, d: a.max(1)[1], "."),
    "a maximum of everything": (TOKENS, lambda m, a, c, d: a[..., 1].max(), "a1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED | POOLED)
def test_units_are_where_they_are_moved_to(name: str) -> None:
    x, function, expected = (MOVED | POOLED)[name]
    assert said(function, x)["y"] == expected


JOINED = {
    "a sum of two paths": (lambda m, a, c, d: torch.stack([a, c], 1).sum(1), "a", "a"),
    "a sum of two paths, one turned": (lambda m, a, c, d: torch.stack([a, c.roll(1, 1)], 1).sum(1), "a", "a1 a2 a3 a0"),
    "a sum of a path and itself turned": (lambda m, a, c, d: torch.stack([a, a.roll(1, 1)], 1).sum(1), ".", "c"),
    "a sum of eight paths": (lambda m, a, c, d: torch.stack([a, c, *[a] * 6], 1).sum(1), "a", "a"),
    "a sum of nine paths": (lambda m, a, c, d: torch.stack([a, c, *[a] * 7], 1).sum(1), ".", "c"),
    "a sum of paths, one of them open": (lambda m, a, c, d: torch.stack([a, c, c + 1], 1).sum(1), ".", "c"),
    "a sum of two paths of one unit": (lambda m, a, c, d: torch.stack([a[:, :1], c[:, :1]], 1).sum(1), ".", "c"),
    "a sum of two paths of two units": (lambda m, a, c, d: torch.stack([a[:, :2], c[:, :2]], 1).sum(1), "a0 a1", "a0 a1 c0 c1"),
    "a sum of one path": (lambda m, a, c, d: a[:, None].sum(1), "a", "c"),
    "the larger of two": (lambda m, a, c, d: torch.max(a, c), "a", "a"),
    "a mean of two paths": (lambda m, a, c, d: torch.stack([a, c], 2).mean(-1), "a", "a"),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_a_sum_of_paths_joins_their_units(name: str) -> None:
    function, expected, other = JOINED[name]
    found = said(function, ROWS)
    assert (found["y"], found["c.weight"]) == (expected, other)
