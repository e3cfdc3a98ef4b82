"""How the cost of a step and of opening a task grows with the number of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle

import torch

from hatfn.builder import build
from hatfn.experiments.bench.comparison import OPTIMIZERS, SCALE, Comparison, Target
from hatfn.experiments.bench.timing import Contender
from hatfn.learner import HAT
from hatfn.models import MLP
from hatfn.numerics.seeds import seeded
from hatfn.numerics.trees import tree_map
from hatfn.state import HATState
from hatfn.tracing import trace


@dataclass(frozen=True)
class ManyTasks:
    """A small MLP that has learned all tasks but one, for several numbers of tasks.

    Attributes:
        name: its name in the table and in ``--only``.
        counts: the numbers of tasks; the first is the reference.
        features: numbers per input.
        width: units of each hidden layer.
        batch: inputs per step.
        targets: {name of a contender: the target of its ratio}.
    """

    name: str
    counts: tuple[int, ...]
    features: int = 64
    width: int = 100
    batch: int = 32
    targets: Mapping[str, Target] = field(default_factory=dict)

    def comparisons(self, device: torch.device, compiled: bool = True) -> Iterator[Comparison]:
        """A comparison of steps, of donated ones, and of opening a task; nothing is compiled."""
        name = "torch.optim.SGD, momentum 0.9, fused"
        with seeded(device, 0):
            module = MLP(self.features, 2, self.width).to(device)
            batches = [
                (
                    torch.randn(self.batch, self.features, device=device),
                    torch.randint(2, (self.batch,), device=device),
                )
                for _ in range(2)
            ]
        wiring = trace(module, batches[0][0][:1])
        pairs = []
        for count in self.counts:
            hat = build(module, wiring, [2] * count, OPTIMIZERS[name].pure())
            pairs.append((hat, all_but_one(hat)))
        for what, donate in (("train step", False), ("train step, donated", True)):
            contenders = [
                steps(hat, hat.begin(state, hat.tasks - 1), batches, donate) for hat, state in pairs
            ]
            yield Comparison(self.name, what, name, contenders, self.targets if donate else {})
        contenders = [opening(hat, state) for hat, state in pairs]
        goals = {name: Target(20.0) for name in self.targets}
        yield Comparison(self.name, "begin, all others learned", "", contenders, goals)


def all_but_one(hat: HAT) -> HATState:
    """A state in which all tasks but the last are learned and protected, with few units each."""
    state, last = hat.init(0), hat.tasks - 1
    generator = torch.Generator().manual_seed(0)
    masks = {
        group: (torch.rand(mask.shape, generator=generator) < 0.1).to(mask.device)
        for group, mask in state.masks.items()
    }
    learned = torch.arange(hat.tasks, device=state.learned.device) < last
    for mask in masks.values():  # half of the units stay free
        mask[:, mask.shape[1] // 2 :] = False
    masks = {group: mask & learned[:, None] for group, mask in masks.items()}
    full = state._replace(masks=masks, learned=learned)
    # Opened once, so that what is timed is one more task and not all of them.
    return hat.begin(full, last)._replace(active=torch.zeros_like(learned))


def steps(
    hat: HAT, state: HATState, batches: list[tuple[torch.Tensor, torch.Tensor]], donate: bool
) -> Contender:
    """Steps of the last task, in a loop that carries its state."""
    state, data = tree_map(torch.clone, state), cycle(batches)

    def step() -> None:
        nonlocal state
        state, _ = hat.update(state, next(data), hat.tasks - 1, SCALE, donate=donate)

    return Contender(f"T = {hat.tasks}", step)


def opening(hat: HAT, state: HATState) -> Contender:
    """Opening the last task, after the one before it was learned."""
    one = state._replace(
        locked=state.locked.index_fill(
            0, torch.tensor([hat.tasks - 2], device=state.locked.device), False
        )
    )
    return Contender(f"T = {hat.tasks}", lambda: hat.begin(one, hat.tasks - 1))
