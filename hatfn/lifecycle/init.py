"""Initial values: a pure function of the module and the seed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hatfn.method.gates import initial_embeddings
from hatfn.network.copies import filled
from hatfn.network.network import Network
from hatfn.numerics.seeds import mixed, seeded
from hatfn.numerics.trees import tree_map
from hatfn.spec import Spec
from hatfn.state import HATState, trainable


class TaskValues(NamedTuple):
    """The values that one task does not share with others.

    Attributes:
        params: {name: tensor}, norms, heads and other parameters that cannot be gated.
        buffers: {name: tensor}, running statistics.
        embeddings: {group: (U,)}.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    embeddings: dict[str, Tensor]


def init(spec: Spec, seed: int, fresh: bool) -> HATState:
    """The state before the first task; see :meth:`hatfn.HAT.init`."""
    network = spec.network
    values, of_tasks = initial_values(spec, range(spec.tasks), seed, fresh)
    tasks: TaskValues = tree_map(lambda *slices: torch.stack(slices), *of_tasks.values())
    of_all = [*network.wiring.shared, *network.wiring.unread]
    params = {name: values[name].clone() for name in of_all}
    device = _example(network).device
    kind = _embedding_dtype(network) if spec.protection.soft else torch.bool
    no_task = torch.zeros(spec.tasks, dtype=torch.bool, device=device)
    state = HATState(
        params=params,
        task_params=tasks.params,
        task_buffers=tasks.buffers,
        embeddings=tasks.embeddings,
        masks={group: torch.zeros_like(e, dtype=torch.bool) for group, e in tasks.embeddings.items()},
        learned=no_task,
        locked=no_task.clone(),
        active=no_task.clone(),
        protection={name: torch.zeros_like(p, dtype=kind) for name, p in params.items()},
        used={},
        hyper={
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in spec.hyper.items()
        },
        seed=torch.tensor(seed, device=device),
        fresh=torch.tensor(fresh, device=device),
        opt_state=(),
    )
    return state._replace(used=spec.used(state), opt_state=spec.optimizer.init(trainable(state, [0])))


def initial_values(
    spec: Spec, tasks: Sequence[int], seed: int, fresh: bool
) -> tuple[dict[str, Tensor], dict[int, TaskValues]]:
    """The initial values of the module's parameters and buffers, and those of some tasks.

    The values of a task depend on the seed and the task alone, not on the other tasks. Only "sparse"
    embeddings also depend on the number of tasks.

    Args:
        spec: the settings of the learner.
        tasks: the tasks.
        seed: the seed of the state.
        fresh: whether weights are drawn from the seed, and heads even if the module's own would fit.

    Returns:
        {name: tensor}, of the module; {task: its own values}.
    """
    values = _fresh_values(spec.network, seed) if fresh else spec.network.initial
    return values, {task: _task_values(spec, values, task, seed, fresh) for task in tasks}


def _task_values(
    spec: Spec, values: Mapping[str, Tensor], task: int, seed: int, fresh: bool
) -> TaskValues:
    network = spec.network
    device, generator = _example(network).device, torch.Generator().manual_seed(mixed(seed, task))
    embeddings = {
        group: initial_embeddings(spec.embedding_init, spec.tasks, units, generator).to(
            device, _embedding_dtype(network)
        )
        for group, units in network.wiring.groups.items()
    }
    norms = {name: values[name] for name, role in network.wiring.params.items() if role.kind == "task"}
    buffers = {name: values[name] for name in network.wiring.buffers}
    return TaskValues(norms | _heads(network, values, generator, task, fresh), buffers, embeddings)


def _example(network: Network) -> Tensor:
    """One of the module's tensors, which shows their device and type."""
    return next(iter(network.initial.values()))


def _embedding_dtype(network: Network) -> torch.dtype:
    """The type of embeddings: that of the module's numbers, but at least float32."""
    dtype = _example(network).dtype
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def _fresh_values(network: Network, seed: int) -> dict[str, Tensor]:
    """The module's parameters and buffers, drawn anew.

    The ``reset_parameters`` of each layer draws them, and then the module's ``init_weights`` if it has
    one, as timm's models do. Values that neither sets stay as they are.
    """
    start, module = network.initial, filled(network.plain, network.initial)
    device = next((value.device for value in start.values()), torch.device("cpu"))
    with seeded(device, seed), torch.no_grad():
        for child in module.modules():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
        if callable(weights := getattr(module, "init_weights", None)):
            # timm's ResNets can start the last norm of each branch at zero. Every task starts with
            # these norms, so in every task the zeros would have to grow again.
            options = {"zero_init_last"} & inspect.signature(weights).parameters.keys()
            weights(**dict.fromkeys(options, False))
    drawn = dict((*module.named_parameters(), *module.named_buffers()))
    return start | {n: v.detach() for n, v in drawn.items() if n not in network.untrained}


def _heads(
    network: Network,
    values: Mapping[str, Tensor],
    generator: torch.Generator,
    task: int,
    fresh: bool,
) -> dict[str, Tensor]:
    """The heads of a task, padded by zeros to (classes of the widest task, features, ...).

    They are drawn as ``nn.Linear`` draws its weights. Without ``fresh``, a head of the module that has
    as many classes as the task is copied instead.
    """
    if network.classes is None:
        return {}
    classes, heads = network.classes[task], {}
    for name in network.heads:
        shape = values[name].shape
        fan_in = math.prod(values[network.heads[0]].shape[1:])
        bound = 1 / math.sqrt(max(fan_in, 1))
        rows = (torch.rand(classes, *shape[1:], generator=generator) * 2 - 1) * bound
        if not fresh and shape[:1] == (classes,):
            rows = values[name]
        heads[name] = padded(rows.to(values[name]), max(network.classes))
    return heads


def padded(rows: Tensor, widest: int) -> Tensor:
    """A head (classes, ...) that rows of zeros extend to (widest, ...)."""
    return nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, widest - len(rows)])
