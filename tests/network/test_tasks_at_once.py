"""How many tasks are computed at a time follows from sizes alone; every way gives the same outputs."""

from __future__ import annotations

import pytest
import timm
import torch
from architectures import ARCHITECTURES, build
from nets import Recurrent, learner
from torch import nn

import hatfn
from hatfn.experiments.bench.cases import with_density
from hatfn.models import MLP
from hatfn.network import outputs
from hatfn.network.together import Work, tasks_at_once

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def small(layers: int = 3, numbers: int = 10**5, widest: int = 0, looped: bool = False) -> Work:
    """The work of a small MLP, or what it is instead."""
    return Work(layers, numbers, widest, looped)


def test_many_small_calls_are_made_together() -> None:
    assert [tasks_at_once(small(), 16, tasks, CPU) for tasks in (1, 3, 10, 50)] == [1, 3, 10, 50]
    assert tasks_at_once(small(), 16, 2, CPU) == 1, "a vmap has a start of its own"
    assert tasks_at_once(small(layers=50), 16, 2, CPU) == 2, "and many calls pay for it"


def test_what_overflows_the_caches_is_cut_into_chunks() -> None:
    images = small(layers=20, widest=2**15)
    sizes = [tasks_at_once(images, samples, 10, CPU) for samples in (1, 4, 8, 16, 64)]
    assert sizes == [10, 10, 5, 3, 1]


def test_what_skips_units_is_looped_over_sooner() -> None:
    images = small(layers=20, widest=2**10)
    assert tasks_at_once(images, 16, 10, CPU, narrowed=10**7) == 10
    assert tasks_at_once(images, 16, 10, CPU, narrowed=10**8) == 1


def test_what_vmap_cannot_batch_is_looped_over_everywhere() -> None:
    assert tasks_at_once(small(looped=True), 16, 50, CPU) == 1
    assert tasks_at_once(small(looped=True), 16, 50, GPU) == 1


def test_a_gpu_gets_as_many_tasks_as_fill_it() -> None:
    image = small(layers=20, numbers=5 * 10**8, widest=2**16)
    assert tasks_at_once(small(), 256, 2, GPU) == 2
    assert tasks_at_once(small(), 256, 50, GPU) == 50
    assert tasks_at_once(image, 64, 50, GPU) == 3
    assert tasks_at_once(image, 512, 50, GPU) == 1


class Standardised(nn.Conv2d):
    """A convolution that computes with its weight before it uses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_the_work_of_modules() -> None:
    x = torch.randn(1, 784)
    assert learner(MLP(784, 10, width=100), x).network.work == (
        3,
        784 * 100 + 100 * 100 + 1000,
        0,
        False,
    )
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    )
    image = torch.randn(1, 1, 6, 6)
    work = learner(net, image, head="4").network.work
    assert work == (3, 16 * 36 + 4 * 72 + 24, 64, False)
    assert learner(Recurrent(), torch.randn(1, 6, 5)).network.work.looped
    net[2] = Standardised(4, 2, 3)  # its weight is one for each task
    assert learner(net, image, head="4").network.work.looped


@pytest.mark.parametrize(
    ("kind", "tasks", "samples", "size"),
    [("mlp", 10, 64, 10), ("resnet", 10, 1, 10), ("resnet", 10, 16, 1), ("vit", 2, 1, 2), ("vit", 3, 64, 3)],
)  # fmt: skip
def test_what_was_measured(kind: str, tasks: int, samples: int, size: int) -> None:
    """The fastest way of real modules, with a fifth of their units on."""
    make = {
        "mlp": lambda: MLP(784, 10),
        "resnet": lambda: timm.create_model("resnet18s"),
        "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32),
    }[kind]
    module, x = (
        make(),
        torch.randn(samples, *{"mlp": (784,), "resnet": (3, 32, 32), "vit": (3, 32, 32)}[kind]),
    )
    hat = hatfn.build(
        module, hatfn.trace(module, x[:1]), [2] * tasks, hatfn.from_torch(torch.optim.SGD, lr=0.1)
    )
    state = with_density(hat, 0.2, seed=0)
    inputs = hatfn.numerics.arguments.Inputs((x,))
    assert outputs.chosen(hat.network, state, inputs, range(tasks))[0] == size


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_number_at_a_time_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hat, x = build(kind, [4, 3, 4, 2], torch.float64)
    state = with_density(hat, 0.6, seed=0)
    tasks = [2, 0, 1, 3, 0]
    loop = [hat.forward(state, x, task) for task in tasks]
    for size in (1, 2, 5):
        chunked = hat.predict(state, x, tasks, chunk_size=size)
        monkeypatch.setattr(outputs, "tasks_at_once", lambda *_, size=size: size)
        chosen = hat.predict(state, x, tasks)
        assert torch.equal(chosen, chunked)
        for row, task, alone in zip(chosen, tasks, loop, strict=True):
            own, rest = row[:, : hat.classes[task]], row[:, hat.classes[task] :]
            torch.testing.assert_close(own, alone, rtol=1e-9, atol=1e-9)
            assert rest.eq(-torch.inf).all()
            if size == 1:
                assert torch.equal(own, alone)
