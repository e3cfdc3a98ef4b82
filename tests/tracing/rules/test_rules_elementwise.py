"""Sums, products and activations: what is zero where their operands are, and whose units become one."""

from __future__ import annotations

import pytest
import torch
from nets import Fn
from told import traced
from torch import Tensor, nn
from torch.nn import functional as F

import hatfn

X = torch.randn(2, 3)
NUMBER, VECTOR, MATRIX = torch.rand(1), torch.rand(4), torch.rand(2, 4)


def said(function, x: Tensor = X, **params: Tensor) -> dict[str, str]:
    """What is said of a function of the outputs of two layers of four units, and of some parameters."""
    own = {name: nn.Parameter(value) for name, value in params.items()}
    layers = {"a": nn.Linear(3, 4), "c": nn.Linear(3, 4)}
    module = Fn(lambda m, x: function(m, m.a(x), m.c(x)), **layers, **own)
    module.register_buffer("fixed", torch.tensor([1.0, 0.0, 2.0, 3.0]))
    module.register_buffer("zeros", torch.zeros(4))
    return traced(module, x)


# The units of the result, and those of the layers a and c.
MET = {
    "a sum": (lambda m, a, c: a + c, "a", "a", "a"),
    "a sum, one turned": (lambda m, a, c: a + c.roll(1, 1), "a", "a", "a1 a2 a3 a0"),
    "a sum with what is turned": (lambda m, a, c: a + a.roll(1, 1), ".", "a", "c"),
    "a sum with one unit": (lambda m, a, c: a + c[:, :1], ".", "a", "c"),
    "a sum with something open": (lambda m, a, c: a + c.exp(), ".", "a", "c"),
    "a sum with a number": (lambda m, a, c: a + 1, ".", "a", "c"),
    "a sum with zero": (lambda m, a, c: a + 0, "a", "a", "c"),
    "a sum with a constant": (lambda m, a, c: a + m.fixed, ".", "a", "c"),
    "a constant with a sum": (lambda m, a, c: m.fixed + a, ".", "a", "c"),
    "a sum with a constant of zeros": (lambda m, a, c: a + m.zeros, "a", "a", "c"),
    "a constant of zeros with a sum": (lambda m, a, c: m.zeros + a, "a", "a", "c"),
    "a difference": (lambda m, a, c: a - 2 * c, "a", "a", "a"),
    "a sum of multiples": (lambda m, a, c: torch.add(a, c, alpha=3), "a", "a", "a"),
    "a sum of three": (lambda m, a, c: torch.addcmul(a, c, c), "a", "a", "a"),
    "the smaller of two": (lambda m, a, c: torch.minimum(a, c), "a", "a", "a"),
    "a comparison that zeros fail": (lambda m, a, c: (a > c).float(), "a", "a", "a"),
    "a comparison that zeros pass": (lambda m, a, c: (a >= c).float(), ".", "a", "c"),
    "a logarithm of a sum": (lambda m, a, c: torch.logaddexp(a, c), ".", "a", "c"),
    "a multiple": (lambda m, a, c: a * 2, "a", "a", "c"),
    "a square": (lambda m, a, c: a**2, "a", "a", "c"),
    "a power of nothing": (lambda m, a, c: a**0, ".", "a", "c"),
    "an inverse": (lambda m, a, c: a.reciprocal(), ".", "a", "c"),
    "a clamp": (lambda m, a, c: a.clamp(-1, 1), "a", "a", "c"),
    "a clamp away from zero": (lambda m, a, c: a.clamp(min=1), ".", "a", "c"),
    "random numbers": (lambda m, a, c: torch.rand_like(a) + c, ".", "a", "c"),
    "a product": (lambda m, a, c: a * c, "a", "a", "a"),
    "a product, one turned": (lambda m, a, c: a * c.roll(1, 1), "a", "a", "a1 a2 a3 a0"),
    "a product with what is turned": (lambda m, a, c: a * a.roll(1, 1), "a", "a", "c"),
    "a product with something open": (lambda m, a, c: a * c.exp(), "a", "a", "c"),
    "a product of something open": (lambda m, a, c: a.exp() * c, "c", "a", "c"),
    "a product with a constant": (lambda m, a, c: a * m.fixed, "a", "a", "c"),
    "a product of a constant and something open": (lambda m, a, c: m.fixed * a.exp(), ".", "a", "c"),
    "a product with a constant of zeros": (lambda m, a, c: a.exp() * m.zeros + c, "c", "a", "c"),
    "a product of a constant of zeros": (lambda m, a, c: m.zeros * a.exp() + c, "c", "a", "c"),
    "a quotient": (lambda m, a, c: a / c.exp(), "a", "a", "c"),
    "a quotient of a number": (lambda m, a, c: 1 / c.exp(), ".", "a", "c"),
    "a quotient of something open": (lambda m, a, c: a.exp() / c, ".", "a", "c"),
    "a choice": (lambda m, a, c: torch.where(a > 1, a, c), "a", "a", "a"),
    "a choice, one turned": (lambda m, a, c: torch.where(a > 1, a, c.roll(1, 1)), "a", "a", "a1 a2 a3 a0"),
    "a choice with what is turned": (lambda m, a, c: torch.where(a > 1, a, a.roll(1, 1)), ".", "a", "c"),
    "a choice with zero": (lambda m, a, c: torch.where(a > 1, a, 0.0), "a", "a", "c"),
    "a choice with a number": (lambda m, a, c: torch.where(a > 1, 1.0, a), ".", "a", "c"),
    "filled with zero": (lambda m, a, c: a.masked_fill(c > 1, 0.0), "a", "a", "c"),
    "filled with a number": (lambda m, a, c: a.masked_fill(c > 1, 1.0), ".", "a", "c"),
    "half of it, weighed": (lambda m, a, c: F.glu(torch.cat([a, c], 1), 1), "a", "a", "c"),
    "half of it, along a middle": (lambda m, a, c: F.glu(a[:, :, None], 1)[..., 0], "a0 a1", "a", "c"),
    "half of it, along the last": (lambda m, a, c: F.glu(torch.stack([a, c.exp()], 2))[..., 0], "a", "a", "c"),
    "a learnable slope": (lambda m, a, c: F.prelu(a, m.v), "a", "a", "c"),
    "hardswish": (lambda m, a, c: F.hardswish(a), "a", "a", "c"),
    "softmax": (lambda m, a, c: a.softmax(-1), ".", "a", "c"),
    "log sigmoid": (lambda m, a, c: F.logsigmoid(a), ".", "a", "c"),
    "the place of a maximum": (lambda m, a, c: a[:, :2].argmax(1), ".", "a", "c"),
}  # fmt: skip


@pytest.mark.parametrize("name", MET)
def test_what_is_zero_where_operands_are(name: str) -> None:
    function, expected, left, right = MET[name]
    found = said(function, v=VECTOR)
    assert (found["y"], found["a.weight"], found["c.weight"]) == (expected, left, right)


# The units of the result and of the parameter p.
LEARNED = {
    "a number added": (lambda m, a, c: a + m.p, NUMBER, "a", "task a"),
    "a number added to": (lambda m, a, c: m.p + a, NUMBER, "a", "task a"),
    "a number added to some channels": (lambda m, a, c: a[:, 1:3] + m.p, NUMBER, "a1 a2", "task a1 a2"),
    "a number added to one channel": (lambda m, a, c: a[:, :1] + m.p, NUMBER, "a0", "task a0"),
    "a number added twice": (lambda m, a, c: a + m.p + c + m.p, NUMBER, ".", "task"),
    "a number added to something open": (lambda m, a, c: a.exp() + m.p, NUMBER, ".", "task"),
    "a number added to what is partly open": (
        lambda m, a, c: torch.cat([a[:, :1].exp(), a], 1) + m.p, NUMBER, ".", "task",
    ),
    "a number added to samples that differ": (
        lambda m, a, c: torch.cat([a, c])[..., None] + m.p, NUMBER, ".", "task",
    ),
    "a number without a dimension": (lambda m, a, c: a + m.p, torch.tensor(0.5), "a", "task a"),
    "a number that is moved first": (lambda m, a, c: a + m.p.expand(4), NUMBER, ".", "task"),
    "a vector added": (lambda m, a, c: a + m.p, VECTOR, "a", "task a"),
    "a vector added to another order": (lambda m, a, c: a.roll(1, 1) + m.p, VECTOR, "a3 a0 a1 a2", "task a3 a0 a1 a2"),
    "a vector added to something open": (lambda m, a, c: a.exp() + m.p, VECTOR, ".", "task"),
    "a vector subtracted": (lambda m, a, c: a - m.p, VECTOR, "a", "task a"),
    "a vector that scales": (lambda m, a, c: a * m.p, VECTOR, "a", "task"),
    "a vector that scales something open": (lambda m, a, c: a.exp() * m.p, VECTOR, "mul", "task mul"),
    "a vector that something open scales": (lambda m, a, c: m.p * a.exp(), VECTOR, "mul", "task mul"),
    "a vector that scales what is partly open": (
        lambda m, a, c: torch.cat([a[:, :1].exp(), a[:, 1:]], 1) * m.p, VECTOR, ". a1 a2 a3", "task",
    ),
    "a vector that scales a constant": (lambda m, a, c: m.fixed * m.p + a, VECTOR, "a", "task a"),
    "a vector that scales zeros": (lambda m, a, c: m.zeros * m.p + a, VECTOR, "a", "task"),
    "a number that scales something open": (lambda m, a, c: a.exp() * m.p, NUMBER, ".", "task"),
    "a matrix that scales something open": (lambda m, a, c: a[:, None].exp() * m.p, MATRIX, ".", "task"),
    "a vector in a choice": (lambda m, a, c: torch.where(a > 1, m.p, a), VECTOR, "a", "task a"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_a_parameter_meets_an_activation(name: str) -> None:
    function, value, expected, own = LEARNED[name]
    found = said(function, p=value)
    assert (found["y"], found["p"]) == (expected, own)


def test_units_of_a_scale_are_named_after_the_module_that_scales() -> None:
    scaling = Fn(lambda m, x: x * m.p, p=nn.Parameter(VECTOR))
    net = Fn(
        lambda m, x: m.b(m.scale(m.a(x).exp())), a=nn.Linear(3, 4), scale=scaling, b=nn.Linear(4, 2)
    )
    found = traced(net, X)
    assert (found["scale.p"], found["b.weight"]) == ("task scale", "b < scale")


@pytest.mark.parametrize(
    "function",
    [lambda a, c: torch.signbit(a), lambda a, c: torch.copysign(a, c), lambda a, c: torch.atan2(a, c)],
)
def test_the_sign_of_a_zero_is_nothing_that_labels_know(function) -> None:
    with pytest.raises(hatfn.TraceError, match="reads the sign of a zero"):
        said(lambda m, a, c: function(a, c))
