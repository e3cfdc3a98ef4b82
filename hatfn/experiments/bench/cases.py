"""The comparisons of ``hatfn bench``: models, their states, and several ways to do the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import cast

import timm
import torch
from torch import Tensor, nn

from hatfn.builder import build
from hatfn.engine.compiled import Part
from hatfn.engine.optimizer import Optimizer
from hatfn.experiments.bench.comparison import BATCHES, OPTIMIZERS, SCALE, Comparison, Pair, Target
from hatfn.experiments.bench.many_tasks import ManyTasks
from hatfn.experiments.bench.timing import Contender
from hatfn.learner import HAT
from hatfn.models import MLP
from hatfn.numerics.seeds import seeded
from hatfn.replicas import Replicas, stack
from hatfn.state import HATState
from hatfn.tracing import trace
from hatfn.wiring import Wiring


@dataclass(frozen=True)
class Case:
    """A model that learns several tasks, against the same module in plain torch.

    Attributes:
        name: its name in the table and in ``--only``.
        make: makes the module.
        shape: the shape of one input.
        batch: inputs per step.
        tasks: T, the number of tasks.
        classes: the number of classes of each task, and of the module.
        density: the share of each group's units that a task has on.
        targets: {name of a contender: the target of its ratio}.
        parts: the parts of a step that some contenders compile.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    tasks: int
    classes: int = 10
    density: float = 0.2
    targets: Mapping[str, Target] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    def comparisons(self, device: torch.device, compiled: bool = True) -> Iterator[Comparison]:
        """The comparisons for this model, one after another; with ``compiled``, also compiled ways."""
        module, wiring = self.traced(device)
        with seeded(device, 1):
            data = random_batches(BATCHES, (self.batch,), self.shape, self.classes, device)
        for name, pair in OPTIMIZERS.items():
            hat, state = self.learned(module, wiring, pair.pure())
            plain = deepcopy(module)
            contenders = [plain_training(plain, pair, data)]
            contenders += [hat_training(hat, state, data, donate) for donate in (False, True)]
            for part in self.parts if compiled and pair.compiles else ():
                again = replace(hat, compile=part)
                contenders.append(_compiled(hat_training(again, state, data), part))
            if "step" in self.parts and len(contenders) > 3:
                graph = cast(nn.Module, torch.compile(deepcopy(module)))
                contenders.append(_compiled(plain_training(graph, pair, data), "module"))
            targets = _also_compiled(self.targets, self.parts)
            yield Comparison(
                self.name, "train step", name, contenders, targets, state=state, plain=pair.name
            )
            del plain, contenders
        x, plain = data[0][0], module.eval()
        one = [
            Contender("plain torch", torch.no_grad()(lambda: plain(x))),
            Contender("hat.forward", lambda: hat.forward(state, x, 0)),
        ]
        yield Comparison(self.name, "evaluate one task", "", one, self.targets)
        yield Comparison(
            self.name, "evaluate all tasks", "", all_tasks(hat, state, plain, x), self.targets
        )

    def traced(self, device: torch.device) -> tuple[nn.Module, Wiring]:
        """The module on its device, and its wiring."""
        with seeded(device, 0):
            module = self.make().to(device)
            return module, trace(module, torch.randn(1, *self.shape, device=device))

    def learned(self, module: nn.Module, wiring: Wiring, optimizer: Optimizer) -> tuple[HAT, HATState]:
        """A learner and a state in which every task is learned."""
        hat = build(module, wiring, [self.classes] * self.tasks, optimizer)
        return hat, with_density(hat, self.density, seed=0)


@dataclass(frozen=True)
class Seeds:
    """Replicas of a small MLP, trained one after another and all at once.

    Attributes:
        name: its name in the table and in ``--only``.
        widths: the widths of the MLP; each has a row.
        features: numbers per input.
        batch: inputs per step and replica.
        replicas: S, the number of replicas.
        targets: {name of a contender: the target of its ratio}.
        parts: the parts of a step that some contenders compile.
    """

    name: str
    widths: tuple[int, ...]
    features: int = 64
    batch: int = 32
    replicas: int = 8
    targets: Mapping[str, Target] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    def comparisons(self, device: torch.device, compiled: bool = True) -> Iterator[Comparison]:
        """A comparison for each width and optimizer; with ``compiled``, also of compiled ways."""
        shape = (self.replicas, self.batch)
        with seeded(device, 1):
            data = random_batches(BATCHES, shape, (self.features,), 2, device)
        for width in self.widths:
            with seeded(device, 0):
                module = MLP(self.features, 2, width).to(device)
            wiring = trace(module, data[0][0][0, :1])
            for name, pair in OPTIMIZERS.items():
                hat = build(module, wiring, [2] * 5, pair.pure())
                replicas = [hat.begin(hat.init(seed, fresh=True), 0) for seed in range(self.replicas)]
                contenders = [one_by_one(hat, replicas, data), batched(hat, replicas, data)]
                for part in self.parts if compiled and pair.compiles else ():
                    again = replace(hat, compile=part)
                    contenders.append(_compiled(one_by_one(again, replicas, data), part))
                    contenders.append(_compiled(batched(again, replicas, data), part))
                targets = _also_compiled(self.targets, self.parts)
                what = f"throughput of {self.replicas} seeds, width {width}"
                yield Comparison(
                    self.name, what, name, contenders, targets, throughput=True, plain=pair.name
                )


def resnet18() -> nn.Module:
    """The ResNet-18 of ImageNet with a stem for small images: its max-pool keeps layers cheap."""
    module: nn.Module = timm.create_model("resnet18", num_classes=10)
    module.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return module


def wide_mlp() -> nn.Module:
    """An MLP with two weights of 40 MB."""
    layers = (nn.Linear(1024, 10_000), nn.ReLU(), nn.Linear(10_000, 1000), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(1000, 10))


CASES: dict[str, Case | Seeds | ManyTasks] = {
    case.name: case
    for case in (
        Case(
            "mlp", lambda: MLP(784, 10), (784,), 64, 10,
            targets={
                "hat.update": Target(1.5), "hat.update, donated": Target(1.25),
                "hat.forward": Target(1.05), "predict": Target(0.3),
            },
            parts=("update", "step"),
        ),
        Case(
            "resnet18s", lambda: timm.create_model("resnet18s", num_classes=10), (3, 32, 32), 32, 5,
            targets={
                "hat.update": Target(1.1), "hat.forward": Target(1.05), "predict": Target(1.2),
                "compact": Target(0.2),
            },
            parts=("update",),
        ),
        Case(
            "vit", lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10),
            (3, 224, 224), 4, 5,
            targets={
                "hat.update": Target(1.1), "hat.update, donated": Target(1.06),
                "hat.forward": Target(1.05),
            },
            parts=("update",),
        ),
        Case(
            "resnet18", resnet18, (3, 32, 32), 32, 5,
            targets={"hat.update": Target(1.12), "hat.update, donated": Target(1.06)},
        ),
        Case(
            "mlp40", wide_mlp, (1024,), 64, 5,
            targets={"hat.update": Target(1.5), "hat.update, donated": Target(1.15)},
        ),
        ManyTasks("tasks", (5, 500, 20_000), targets={"T = 20000": Target(1.1)}),
        Seeds(
            "seeds", (100, 400, 1000),
            targets={"hatfn.Replicas": Target(4.0, least=True)},
            parts=("step",),
        ),
    )
}  # fmt: skip
"""The cases that the command runs, with their targets."""


def _compiled(contender: Contender, part: str) -> Contender:
    """The contender under a name that says which part of its work is compiled."""
    return contender._replace(name=f"{contender.name}, {part} compiled")


def _also_compiled(targets: Mapping[str, Target], parts: Sequence[str]) -> dict[str, Target]:
    """The targets, and the same targets for contenders that compile a part of their work."""
    return {**targets, **{f"{n}, {part} compiled": t for n, t in targets.items() for part in parts}}


def with_density(hat: HAT, density: float, seed: int) -> HATState:
    """A state in which every task is learned, and has a random share of each group's units on.

    Args:
        hat: any learner.
        density: the share, in (0, 1]; at least one unit is on.
        seed: the seed of the weights and of the choice.
    """
    state, generator = hat.init(seed), torch.Generator().manual_seed(seed)

    def chosen(e: Tensor) -> Tensor:
        ranks = torch.rand(e.shape, generator=generator).argsort(-1).argsort(-1)
        return torch.where(ranks < max(1, round(density * e.shape[1])), 1.0, -1.0).to(e)

    state = state._replace(embeddings={group: chosen(e) for group, e in state.embeddings.items()})
    for task in range(hat.tasks):
        state = hat.consolidate(state, task)
    return state


def random_batches(
    count: int, batch: tuple[int, ...], shape: tuple[int, ...], classes: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Noise with random labels, which a network cannot learn soon, so gradients do not vanish."""
    return [
        (
            torch.randn(*batch, *shape, device=device),
            torch.randint(classes, batch, device=device),
        )
        for _ in range(count)
    ]


def plain_training(module: nn.Module, pair: Pair, data: list[tuple[Tensor, Tensor]]) -> Contender:
    """The training step of plain torch, as it is usually written."""
    optimizer, batches = pair.plain(module.train().parameters()), cycle(data)

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()

    return Contender("plain torch", step, optimizer.zero_grad)


def hat_training(
    hat: HAT, state: HATState, data: list[tuple[Tensor, Tensor]], donate: bool = False
) -> Contender:
    """``hat.update`` on the last task, with all others learned and protected."""
    task, batches = hat.tasks - 1, cycle(data)
    state = hat.begin(state, task)

    def step() -> None:
        nonlocal state
        state, _ = hat.update(state, next(batches), task, SCALE, donate=donate)

    return Contender("hat.update, donated" if donate else "hat.update", step)


def all_tasks(hat: HAT, state: HATState, plain: nn.Module, x: Tensor) -> list[Contender]:
    """All ways to compute the logits of every task on the same inputs."""
    tasks = range(hat.tasks)
    ways = [
        Contender(f"{hat.tasks} plain passes", torch.no_grad()(lambda: [plain(x) for _ in tasks])),
        Contender("loop of hat.forward", lambda: [hat.forward(state, x, task) for task in tasks]),
        Contender("predict", lambda: hat.predict(state, x)),
        Contender("predict, chunk_size 1", lambda: hat.predict(state, x, chunk_size=1)),
    ]
    subnets = [hat.compact(state, task) for task in tasks]
    return [*ways, Contender("compact", lambda: [small(x) for small in subnets])]


def one_by_one(hat: HAT, states: list[HATState], data: list[tuple[Tensor, Tensor]]) -> Contender:
    """A training step of every replica, one replica after another."""
    states, batches = list(states), cycle(data)

    def step() -> None:
        x, y = next(batches)
        for i, state in enumerate(states):
            states[i], _ = hat.update(state, (x[i], y[i]), 0, SCALE)

    return Contender("one after another", step)


def batched(hat: HAT, states: list[HATState], data: list[tuple[Tensor, Tensor]]) -> Contender:
    """A training step of all replicas at once."""
    many, state, batches = Replicas(hat), stack(states), cycle(data)

    def step() -> None:
        nonlocal state
        state, _ = many.update(state, next(batches), 0, SCALE)

    return Contender("hatfn.Replicas", step)
