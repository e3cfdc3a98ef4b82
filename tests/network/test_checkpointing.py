"""Blocks that are computed again in the backward pass: the very step, with less held."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import timm
import torch
from nets import equal, learn, learner, mlp
from optimizers import OPTIMIZERS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hatfn
from hatfn.experiments.bench.timing import Contender, peak_memory
from hatfn.network.checkpointing import recomputes
from hatfn.replicas import replica
from hatfn.state import HATState

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X, Y = torch.randn(14, 5), torch.arange(14) % 2


def step(
    hat: hatfn.HAT, x: Tensor, y: Tensor, task: Any = 0, scale: float = 5.0
) -> tuple[HATState, HATState, Any]:
    """A state, what one step makes of it, and what that reports."""
    state = hat.begin(hat.init(0), task)
    new, info = hat.update(state, (x, y), task, scale)
    assert info.ok
    assert not equal(new.params, state.params)
    return state, new, info


def highest(hat: hatfn.HAT, x: Tensor) -> int:
    """Bytes that a step holds at most."""
    state, y = hat.begin(hat.init(0), 0), torch.zeros(len(x), dtype=torch.int64)
    return peak_memory(Contender("step", lambda: hat.update(state, (x, y), 0, 5.0)))


TIMM = {
    "transformer": ("test_vit", {"img_size": 32, "patch_size": 8}),
    "transformer with dropout": (
        "test_vit", {"img_size": 32, "patch_size": 8, "proj_drop_rate": 0.3, "drop_path_rate": 0.2}),
    "batch norm": ("test_resnet", {"layers": (6, 1, 1, 1)}),
}  # fmt: skip
PICTURES = torch.randn(6, 3, 32, 32)


def picture_learner(case: str, own: bool = False, **settings: Any) -> hatfn.HAT:
    """Of a timm module, always the same one; own: that checkpoints before hatfn gets it."""
    torch.manual_seed(0)
    name, options = TIMM[case]
    module = timm.create_model(name, num_classes=3, **options)
    module.set_grad_checkpointing(own)
    return learner(module, PICTURES, head=None, **settings)


@pytest.mark.parametrize("own", [False, True], ids=["build", "module"])
@pytest.mark.parametrize("task", [0, [0, 2]], ids=["alone", "together"])
@pytest.mark.parametrize("case", TIMM)
def test_checkpointing_takes_the_very_step(case: str, task: Any, own: bool) -> None:
    y = Y[:6]
    x = PICTURES if task == 0 else torch.stack([PICTURES, PICTURES + 1])
    y = y if task == 0 else torch.stack([y, 1 - y])
    settings = {"optimizer": OPTIMIZERS["adam"](), "accumulate": 2}
    results = []
    for hat in (
        picture_learner(case, **settings),
        picture_learner(case, own, grad_checkpointing=not own, **settings),
    ):
        torch.manual_seed(5)  # of dropout
        results.append(step(hat, x, y, task))
    plain, again = results
    assert equal(plain, again)
    assert plain[1].task_buffers or case != "batch norm"
    assert not plain[1].task_buffers or not equal(plain[1].task_buffers, plain[0].task_buffers)


@pytest.mark.parametrize("case", TIMM)
def test_checkpointing_in_bfloat16_takes_the_very_step(case: str) -> None:
    low = {"precision": torch.bfloat16}
    results = []
    for checkpointing in (False, True):
        hat = picture_learner(case, grad_checkpointing=checkpointing, **low)
        torch.manual_seed(5)
        results.append(step(hat, PICTURES, Y[:6]))
    assert equal(*results)


@pytest.mark.parametrize("case", TIMM)
def test_nothing_drifts_with_checkpointing(case: str) -> None:
    hat = picture_learner(case, grad_checkpointing=True)
    first = learn(hat, hat.init(0), PICTURES, 0)
    later = learn(hat, first, PICTURES, 1)
    assert torch.equal(hat.forward(later, PICTURES, 0), hat.forward(first, PICTURES, 0))
    assert not equal(later.params, first.params)


@pytest.mark.parametrize("case", ["transformer", "batch norm"])
def test_checkpointing_holds_less(case: str) -> None:
    x = PICTURES.repeat(16, 1, 1, 1)  # so that activations are most of it
    whole, less = (highest(picture_learner(case, grad_checkpointing=on), x) for on in (False, True))
    assert less < 0.8 * whole


def test_what_is_kept_for_the_backward_pass_goes_with_it() -> None:
    hat = picture_learner("transformer", grad_checkpointing=True)
    state = hat.begin(hat.init(0), 0)

    def alive() -> int:
        return sum(type(thing) is type(hat.network.train) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        hat.update(state, (PICTURES, Y[:6]), 0, 5.0)
        assert alive() == before
    finally:
        gc.enable()


def test_a_module_that_checkpoints_serves_without() -> None:
    plain, own = (picture_learner("transformer", own) for own in (False, True))
    state = plain.consolidate(plain.consolidate(plain.init(0), 0), 1)
    for call in (
        lambda hat: hatfn.infer_task_by_gradient(hat, state, PICTURES),
        lambda hat: hat.predict(state, PICTURES),
        lambda hat: hatfn.export(hat, state, 0)(PICTURES),
    ):
        assert torch.equal(call(own), call(plain))
    assert not recomputes(hatfn.export(own, state, 0))
    assert recomputes(own.network.train)


@pytest.mark.parametrize(
    "call",
    [
        lambda hat, many: hatfn.Replicas(hat).update(many, (PICTURES, Y[:6]), 0, 5.0, shared=True),
        lambda hat, many: torch.vmap(hat.update, (0, None, None, None), randomness="different")(
            many, (PICTURES, Y[:6]), 0, 5.0
        ),
        lambda hat, many: hat.update(
            replica(many, 0), (PICTURES.clone().requires_grad_(), Y[:6]), 0, 5.0
        ),
    ],
    ids=["replicas", "vmap", "differentiated"],
)
def test_checkpointing_is_refused_where_pytorch_has_none(call: Any) -> None:
    hat = picture_learner("transformer", grad_checkpointing=True)
    many = hatfn.Replicas(hat).begin(hatfn.replicate(hat, [0, 1]), 0)
    with pytest.raises(
        ValueError, match=r"update: the module checkpoints.*set_grad_checkpointing\(False"
    ):
        call(hat, many)


class Level(nn.Module):
    """Divides by a running level, the present batch's share included: writes what it then reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level.lerp_(x.detach().abs().mean(), 0.5)
        return x / self.level


class Checkpointed(nn.Module):
    """A module of somebody who calls torch.utils.checkpoint, and offers no switch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*mlp()[:-1], Level()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Refusing(nn.Sequential):
    """As timm's modules that cannot."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"


def test_a_module_that_checkpoints_by_itself_says_so() -> None:
    module = Checkpointed()
    with pytest.raises(ValueError, match=r"module\.grad_checkpointing = True"):
        step(learner(module, X), X, Y)
    module.grad_checkpointing = True
    _, plain, _ = step(learner(nn.Sequential(*module.body, module.head), X, head="5"), X, Y)
    for settings in ({}, {"grad_checkpointing": True}):
        _, found, _ = step(learner(module, X, **settings), X, Y)
        assert equal([*found.params.values()], [*plain.params.values()])
        assert equal([*found.task_buffers.values()], [*plain.task_buffers.values()])
        assert found.task_buffers["body.4.level"][0] != 1


@pytest.mark.parametrize("module", [mlp(), Refusing(*mlp()), nn.Sequential(*Refusing(*mlp()))])
def test_a_module_without_checkpointing_is_told(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"grad_checkpointing=True, but \w+ does not.*accumulate=4"):
        learner(module, X, head="4", grad_checkpointing=True)
