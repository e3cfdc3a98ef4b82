"""A step that is not finite, or that is broken off in the middle, costs nothing: the state before it is intact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
import torchopt
from ledger import fingerprint
from nets import ConvNet, equal, learn, learner, moved
from torch import Tensor, nn

import hatfn

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X, Y = torch.randn(8, 1, 6, 6), torch.randint(2, (8,))
HAT = learner(ConvNet(), X, optimizer=torchopt.adam(1e-2))
OPEN = HAT.begin(learn(HAT, HAT.init(0), X, 0), 1)


class Slope(torch.autograd.Function):
    """The loss as it is, with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, slope: Any) -> Tensor:
        ctx.slope = slope
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope * (ctx.slope() if callable(ctx.slope) else ctx.slope), None


class Calls(nn.Module):
    """A network that calls something when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.act = Act()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


class Act(nn.Module):
    fault: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Act.fault is not None:
            raise Act.fault("in the module")
        return x.relu()


def with_slope(slope: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: Slope.apply(HAT.loss(logits, y), slope)


def adam_of(change: Callable[[Tensor], Tensor]) -> Any:
    def update(*args: Any, **kwargs: Any) -> Any:
        steps, moments = HAT.optimizer.update(*args, **kwargs)
        return optree.tree_map(change, steps), moments

    return HAT.optimizer._replace(update=update)


# Not finite, wherever it comes from.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("scale", [20.0, None], ids=["soft", "binary"])
@pytest.mark.parametrize("where", ["data", "one pixel", "loss", "gradient", "update"])
def test_what_is_not_finite_is_refused(where: str, scale: float | None, bad: float) -> None:
    hat, x = HAT, X
    match where:
        case "data":
            x = torch.full_like(X, bad)
        case "one pixel":
            x = X.index_put((torch.tensor([3]), *[torch.tensor([0])] * 3), torch.tensor(bad))
        case "loss":
            hat = replace(hat, loss=lambda logits, y: HAT.loss(logits, y) + bad)
        case "gradient":
            hat = replace(hat, loss=with_slope(bad))
        case "update":
            hat = replace(hat, optimizer=adam_of(lambda step: step + bad))
    before = fingerprint(OPEN)
    after, info = hat.update(OPEN, (x, Y), 1, scale)
    assert not info.ok
    assert equal(after, OPEN)
    assert fingerprint(OPEN) == before
    good, info = HAT.update(after, (X, Y), 1, scale)
    assert info.ok
    assert equal(good, HAT.update(OPEN, (X, Y), 1, scale)[0])
    assert not equal(good.params, OPEN.params)


def test_targets_that_are_not_finite_are_refused() -> None:
    module, x = nn.Linear(5, 3), torch.randn(8, 5)
    hat = hatfn.build(
        module, hatfn.trace(module, x), None, torchopt.adam(1e-2), num_tasks=1, loss=nn.functional.mse_loss
    )  # fmt: skip
    state = hat.begin(hat.init(0), 0)
    for bad in (torch.nan, torch.inf):
        after, info = hat.update(state, (x, torch.full((8, 3), bad)), 0, None)
        assert not info.ok
        assert equal(after, state)
    after, info = hat.update(state, (x, torch.zeros(8, 3)), 0, None)
    assert info.ok
    assert moved(state, after)


def test_one_replica_is_refused_and_the_others_go_on() -> None:
    many, states = hatfn.Replicas(HAT), hatfn.replicate(HAT, [0, 1, 2])
    states = many.begin(states, 1)
    x = torch.stack([X, X * torch.nan, X])
    after, info = many.update(states, (x, Y.expand(3, 8)), 1, 20.0)
    assert info.ok.tolist() == [True, False, True]
    for index, ok in enumerate([True, False, True]):
        pair = (hatfn.replica(both, index) for both in (after, states))
        assert equal(*pair) != ok


def test_statistics_that_are_not_finite_are_not_taken() -> None:
    assert equal(HAT.recalibrate(OPEN, [X, X * torch.nan], 1), OPEN)
    assert not equal(HAT.recalibrate(OPEN, [X], 1), OPEN)


# Broken off in the middle.

FAULTS = [torch.OutOfMemoryError, RuntimeError, MemoryError, KeyboardInterrupt]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "where", ["loss", "backward", "regularizer", "optimizer", "after the optimizer"]
)
def test_an_update_is_broken_off(where: str, fault: type[BaseException]) -> None:
    """The error comes through as it is; state, random numbers and modes are as before."""

    def broken(*_: Any, **__: Any) -> Any:
        raise fault("in the middle")

    hat = {
        "loss": lambda: replace(HAT, loss=broken),
        "backward": lambda: replace(HAT, loss=with_slope(broken)),
        "regularizer": lambda: replace(HAT, regularizer=broken),
        "optimizer": lambda: replace(HAT, optimizer=HAT.optimizer._replace(update=broken)),
        "after the optimizer": lambda: replace(HAT, optimizer=adam_of(broken)),
    }[where]()
    state, _ = HAT.update(OPEN, (X, Y), 1, 10.0)
    before, random = fingerprint(state), torch.get_rng_state()
    with pytest.raises(fault, match="in the middle"):
        hat.update(state, (X, Y), 1, 20.0)
    if where != "backward":  # vmap takes no autograd.Function of this kind
        with pytest.raises(fault, match="in the middle"):
            hatfn.Replicas(hat).update(hatfn.stack([state]), (X, Y), 1, 20.0, shared=True)
    assert fingerprint(state) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    after, info = HAT.update(state, (X, Y), 1, 20.0)
    assert info.ok
    assert moved(state, after), "and it goes on"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_module_breaks_off(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch raises is explained, and only that."""
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    hat = learner(Calls(), x)
    state = hat.begin(hat.init(0), 1)
    before, expected = fingerprint(state), hat.update(state, (x, y), 1, 5.0)[0]
    assert moved(state, expected)
    with monkeypatch.context() as patch:
        patch.setattr(Act, "fault", fault)
        with pytest.raises(ValueError if fault is RuntimeError else fault, match="in the module"):
            hat.update(state, (x, y), 1, 5.0)
    assert fingerprint(state) == before
    assert equal(hat.update(state, (x, y), 1, 5.0)[0], expected)
