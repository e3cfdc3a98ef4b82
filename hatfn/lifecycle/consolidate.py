"""Closing a task: its running statistics under binary gates, what serving it costs, its mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hatfn.checks.batches import Batch, check_batch
from hatfn.checks.calls import check_owned, check_scale, check_task
from hatfn.checks.values import check_list, check_real
from hatfn.method import transforms
from hatfn.method.masks import binary_gates
from hatfn.network.call import call
from hatfn.network.outputs import forward
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.trees import over_groups, put, take
from hatfn.spec import Spec
from hatfn.state import HATState


class Readiness(NamedTuple):
    """How far a task, as it is trained, is from the task that will be served.

    Attributes:
        undecided: {group: (U,) bool}, units whose soft gate is not yet binary.
        soft: (), the mean loss in eval mode under the soft gates.
        binary: (), the same under the binary gates that the task will be served with.
    """

    undecided: dict[str, Tensor]
    soft: Tensor
    binary: Tensor

    def __repr__(self) -> str:
        """One line: undecided units, and the loss as trained and as served."""
        undecided = sum(int(units.sum()) for units in self.undecided.values())
        return (
            f"Readiness({undecided} units undecided, loss {float(self.soft):.4f} under soft gates, "
            f"{float(self.binary):.4f} as served)"
        )

    @property
    def gap(self) -> Tensor:
        """(), ``binary - soft``: what serving costs; about 0 for a task that is ready."""
        return self.binary - self.soft


def readiness(
    hat: Spec,
    state: HATState,
    batches: Iterable[tuple[Tensor, Tensor]],
    task: int,
    scale: float | Tensor | None = None,
    tolerance: float = 0.01,
) -> Readiness:
    """Whether a task can be consolidated: what differs between training and serving it.

    A unit is undecided where min(a, 1 - a) > tolerance, a = sigmoid(s e): at s = 100 and 0.01 where
    |e| < 0.046. Such a unit is served fully on or fully off, which is not what the weights around it
    were tuned for.

    Args:
        hat: the learner.
        state: in the middle of the task's training, or at its end.
        batches: x (B, ...) and y of the task, as many as represent it; of processes that train
            together, each one's share of them, or all.
        task: which.
        scale: of the soft gates; None: the state's s_max.
        tolerance: in (0, 0.5).

    Raises:
        TypeError, ValueError: a wrong task, batch or scale; no batch; a tolerance out of its range.

    Example:
        >>> import hatfn, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
        >>> hat = hatfn.build(net, hatfn.trace(net, x, head="2"), [2, 2], torchopt.adam(1e-3))
        >>> seen = readiness(hat, hat.begin(hat.init(0), 0), [(x, y)], task=0)
        >>> int(seen.undecided["0"].sum())
        0
    """
    check_owned("readiness", hat, state)
    t = check_task("readiness", task, hat.tasks)
    check_real("readiness", "tolerance", tolerance, lambda t: 0 < t < 0.5, "between 0 and 0.5")
    check_list("readiness", "batches", batches, "a list of pairs [(x, y)], or a loader")
    top = state.hyper["s_max"] if scale is None else scale
    check_scale("readiness", top, state.hyper["s_max"])
    classes = hat.classes[t] if hat.classes else None

    def checked() -> Iterator[Batch]:
        for batch in batches:
            yield check_batch("readiness", batch, hat.wiring, classes)

    return measure(hat, state, checked(), t, top, tolerance)


def measure(
    spec: Spec,
    state: HATState,
    batches: Iterable[Batch],
    task: int,
    scale: float | Tensor,
    tolerance: float = 0.01,
) -> Readiness:
    """The body of :func:`readiness`."""
    soft = spec.gates(take(state.embeddings, task), scale)
    ways = (soft, take(binary_gates(state), task))
    totals, count = [torch.zeros((), dtype=torch.float64) for _ in ways], 0
    for x, y in batches:
        for i, gates in enumerate(ways):
            with torch.no_grad():
                loss = spec.loss(forward(spec.network, state, x, task, gates), y)
            totals[i] = totals[i] + loss.double().cpu() * x.samples
        count += x.samples
    sums = torch.stack([*totals, torch.tensor(float(count), dtype=torch.float64)])
    *losses, everything = spec.ranks.total(sums.to(state.learned.device)).cpu()
    if not everything:
        raise ValueError("readiness: no batch. Expected at least one: a list of pairs (x, y).")
    trained, served = (loss / everything for loss in losses)
    undecided = over_groups(lambda a: torch.minimum(a, 1 - a) > tolerance, soft)
    return Readiness(undecided, trained, served)


def recalibrate(spec: Spec, state: HATState, inputs: Iterable[Inputs], task: int) -> HATState:
    """The state with a task's statistics re-estimated; see :meth:`hatfn.HAT.recalibrate`."""
    before, gates = take(state.task_buffers, task), take(binary_gates(state), task)
    params = {**state.params, **take(state.task_params, task)}
    network = spec.network
    seen = [call(network, network.calibrate, params, before, gates, x)[1] for x in inputs]
    if not seen:
        raise ValueError(
            "recalibrate: no batch. Expected at least one: a list of inputs; a generator can be read "
            "only once."
        )
    mean = {
        name: torch.stack([of_batch[name] for of_batch in seen]).mean(0)
        for name, old in before.items()
        if old.is_floating_point()
    }
    mean = spec.ranks.mean(mean, weight=len(seen))
    counts = {name: torch.zeros_like(old) for name, old in before.items() if is_count(name)}
    new = transforms.choose(transforms.finite(mean), before | mean | counts, before)
    return state._replace(task_buffers=put(state.task_buffers, task, new))


def settle(
    spec: Spec,
    state: HATState,
    batches: list[Batch],
    task: int,
) -> tuple[HATState, Readiness, bool]:
    """The state with the running statistics that serve a task better: re-estimated, or as trained.

    Args:
        spec: of the learner.
        state: with the task open.
        batches: x and y of the task.
        task: which.

    Returns:
        The state; how ready its task is; whether its statistics are re-estimated.
    """
    top = state.hyper["s_max"]
    seen = measure(spec, state, batches, task, top)
    if not state.task_buffers:
        return state, seen, False
    new = recalibrate(spec, state, [x for x, _ in batches], task)
    then = measure(spec, new, batches, task, top)
    return (new, then, True) if bool(then.binary < seen.binary) else (state, seen, False)


def is_count(name: str) -> bool:
    """Whether a buffer counts the batches since a norm's statistics were re-estimated."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def consolidate(spec: Spec, state: HATState, task: int) -> HATState:
    """The state with a task closed; see :meth:`hatfn.HAT.consolidate`."""
    here = spec.flags(state, [task])
    gates = take(binary_gates(state), task)
    statistics = spec.ranks.mean(take(state.task_buffers, task), weight=1)
    return state._replace(
        task_buffers=put(state.task_buffers, task, statistics),
        masks=put(state.masks, task, gates),
        learned=state.learned | here,
        active=state.active & ~here,
    )
