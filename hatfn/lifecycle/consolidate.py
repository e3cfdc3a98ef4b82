"""Closing a task: re-estimate its running statistics, measure its readiness, store its mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hatfn.checks.batches import Batch, check_batch
from hatfn.checks.calls import check_owned, check_scale, check_task
from hatfn.checks.values import check_list, check_real
from hatfn.method import transforms
from hatfn.method.losses import explained
from hatfn.method.masks import binary_gates
from hatfn.network.call import call
from hatfn.network.outputs import forward
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.ownership import aliased
from hatfn.numerics.trees import over_groups, put, take
from hatfn.spec import Spec
from hatfn.state import HATState


class Readiness(NamedTuple):
    """How much a task changes between training, with soft gates, and serving, with binary gates.

    Attributes:
        undecided: {group: (U,) bool}, units whose soft gate is not yet binary.
        soft: (), the mean loss in eval mode with the soft gates.
        binary: (), the same loss with the binary gates that serve the task.
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
        """(), ``binary - soft``: how much binary gates raise the loss; about 0 if a task is ready."""
        return self.binary - self.soft


def readiness(
    hat: Spec,
    state: HATState,
    batches: Iterable[tuple[Tensor, Tensor]],
    task: int,
    scale: float | Tensor | None = None,
    tolerance: float = 0.01,
) -> Readiness:
    """Measure whether a task is ready to be consolidated: how it differs in training and in serving.

    A unit is undecided if min(a, 1 - a) > tolerance, where a = sigmoid(s e). At s = 100 and a tolerance
    of 0.01 that means |e| < 0.046. Serving turns such a unit fully on or fully off, but the weights
    around it were trained with a gate in between.

    Args:
        hat: the learner.
        state: a state during the task's training, or at its end.
        batches: x (B, ...) and y of the task, enough to represent it. If processes train together,
            each passes its share of the batches, or all of them.
        task: the task.
        scale: the scale of the soft gates; None: s_max of the state.
        tolerance: in (0, 0.5).

    Raises:
        TypeError, ValueError: a wrong task, batch or scale; no batch; a tolerance out of its range.

    Example:
        >>> import hatfn, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
        >>> hat = hatfn.build(net, hatfn.trace(net, x, head="2"), [2, 2], torchopt.adam(1e-3))
        >>> measured = readiness(hat, hat.begin(hat.init(0), 0), [(x, y)], task=0)
        >>> int(measured.undecided["0"].sum())
        0
    """
    check_owned("readiness", hat, state)
    t = check_task("readiness", task, hat.tasks)
    check_real("readiness", "tolerance", tolerance, lambda t: 0 < t < 0.5, "between 0 and 0.5")
    check_list("readiness", "batches", batches, "a list of pairs [(x, y)], or a loader")
    top = state.hyper["s_max"] if scale is None else scale
    check_scale("readiness", top, state.hyper["s_max"])

    def checked() -> Iterator[Batch]:
        for batch in batches:
            yield check_batch("readiness", batch, hat.wiring, hat.labels(t))

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
    both = (soft, take(binary_gates(state), task))
    totals, count = [torch.zeros((), dtype=torch.float64) for _ in both], 0
    for x, y in batches:
        for i, gates in enumerate(both):
            with torch.no_grad():
                output = forward(spec.network, state, x, task, gates)
                loss = explained(spec.loss_of(task), task, output, y)
            totals[i] = totals[i] + loss.double().cpu() * x.samples
        count += x.samples
    sums = torch.stack([*totals, torch.tensor(float(count), dtype=torch.float64)])
    *losses, samples = spec.ranks.total(sums.to(state.learned.device)).cpu()
    if not samples:
        raise ValueError("readiness: no batch. Expected at least one: a list of pairs (x, y).")
    trained, served = (loss / samples for loss in losses)
    undecided = over_groups(lambda a: torch.minimum(a, 1 - a) > tolerance, soft)
    return Readiness(undecided, trained, served)


def recalibrate(spec: Spec, state: HATState, inputs: Iterable[Inputs], task: int) -> HATState:
    """The state with a task's statistics re-estimated; see :meth:`hatfn.HAT.recalibrate`."""
    before, gates = take(state.task_buffers, task), take(binary_gates(state), task)
    params = {**state.params, **take(state.task_params, task)}
    network = spec.network
    statistics = [call(network, network.calibrate, params, before, gates, x)[1] for x in inputs]
    if not statistics:
        raise ValueError(
            "recalibrate: no batch. Expected at least one: a list of inputs; a generator can be read "
            "only once."
        )
    mean = {
        name: torch.stack([of_batch[name] for of_batch in statistics]).mean(0)
        for name, old in before.items()
        if old.is_floating_point()
    }
    mean = spec.ranks.mean(mean, weight=len(statistics))
    counts = {name: torch.zeros_like(old) for name, old in before.items() if is_count(name)}
    new = transforms.choose(transforms.finite(mean), before | mean | counts, before)
    return aliased(state._replace(task_buffers=put(state.task_buffers, task, new)))


def settle(
    spec: Spec,
    state: HATState,
    batches: list[Batch],
    task: int,
) -> tuple[HATState, Readiness, bool]:
    """The state with the better running statistics of a task: re-estimated, or those of training.

    The better ones give the lower loss with binary gates.

    Args:
        spec: the settings of the learner.
        state: a state in which the task is open.
        batches: x and y of the task.
        task: the task.

    Returns:
        The state; the readiness of its task; whether its statistics are re-estimated.
    """
    s_max = state.hyper["s_max"]
    before = measure(spec, state, batches, task, s_max)
    if not state.task_buffers:
        return state, before, False
    new = recalibrate(spec, state, [x for x, _ in batches], task)
    after = measure(spec, new, batches, task, s_max)
    return (new, after, True) if bool(after.binary < before.binary) else (state, before, False)


def is_count(name: str) -> bool:
    """Whether a buffer counts the batches since a norm's statistics were re-estimated."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def consolidate(spec: Spec, state: HATState, task: int) -> HATState:
    """The state with a task closed; see :meth:`hatfn.HAT.consolidate`."""
    spec.memory.clear()
    closed = spec.flags(state, [task])
    gates = take(binary_gates(state, [task]), 0)
    statistics = spec.ranks.mean(take(state.task_buffers, task), weight=1)
    closed_state = state._replace(
        task_buffers=put(state.task_buffers, task, statistics),
        masks=put(state.masks, task, gates),
        learned=state.learned | closed,
        active=state.active & ~closed,
    )
    return aliased(closed_state)
