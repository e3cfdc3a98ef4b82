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


class Own(NamedTuple):
    """What one task has for itself.

    Attributes:
        params: {name: tensor}, norms, heads and whatever else cannot be gated.
        buffers: {name: tensor}, running statistics.
        embeddings: {group: (U,)}.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    embeddings: dict[str, Tensor]


def init(spec: Spec, seed: int, fresh: bool) -> HATState:
    """The state before the first task; arguments as in :meth:`hatfn.HAT.init`."""
    network = spec.network
    values, owns = initial_values(spec, range(spec.tasks), seed, fresh)
    own: Own = tree_map(lambda *slices: torch.stack(slices), *owns.values())
    every = [*network.wiring.shared, *network.wiring.unread]
    params = {name: values[name].clone() for name in every}
    some = _some(network)
    kind = _real(network) if spec.protection.soft else torch.bool
    no_task = torch.zeros(spec.tasks, dtype=torch.bool, device=some.device)
    state = HATState(
        params=params,
        task_params=own.params,
        task_buffers=own.buffers,
        embeddings=own.embeddings,
        masks={group: torch.zeros_like(e, dtype=torch.bool) for group, e in own.embeddings.items()},
        learned=no_task,
        locked=no_task.clone(),
        active=no_task.clone(),
        protection={name: torch.zeros_like(p, dtype=kind) for name, p in params.items()},
        hyper={
            name: torch.tensor(value, dtype=torch.float64, device=some.device)
            for name, value in spec.hyper.items()
        },
        seed=torch.tensor(seed, device=some.device),
        fresh=torch.tensor(fresh, device=some.device),
        opt_state=(),
    )
    return state._replace(opt_state=spec.optimizer.init(trainable(state, [0])))


def initial_values(
    spec: Spec, tasks: Sequence[int], seed: int, fresh: bool
) -> tuple[dict[str, Tensor], dict[int, Own]]:
    """What the module's parameters and buffers, and some tasks, start with.

    The values of a task depend on the seed and the task alone, not on the other tasks; but "sparse"
    embeddings depend on the number of tasks.

    Args:
        spec: of the learner.
        tasks: which.
        seed: of the state.
        fresh: whether weights, and heads even where the module's own would fit, are drawn.

    Returns:
        {name: tensor}, of the module; {task: its own values}.
    """
    values = _fresh_values(spec.network, seed) if fresh else spec.network.initial
    return values, {task: _initial_own(spec, values, task, seed, fresh) for task in tasks}


def _initial_own(spec: Spec, values: Mapping[str, Tensor], task: int, seed: int, fresh: bool) -> Own:
    network = spec.network
    some, generator = _some(network), torch.Generator().manual_seed(mixed(seed, task))
    embeddings = {
        group: initial_embeddings(spec.embedding_init, spec.tasks, units, generator).to(
            some.device, _real(network)
        )
        for group, units in network.wiring.groups.items()
    }
    own = {name: values[name] for name, role in network.wiring.params.items() if role.kind == "task"}
    buffers = {name: values[name] for name in network.wiring.buffers}
    return Own(own | _heads(network, values, generator, task, fresh), buffers, embeddings)


def _some(network: Network) -> Tensor:
    """A tensor on the device, and of the type, of the module's numbers."""
    return next(iter(network.initial.values()))


def _real(network: Network) -> torch.dtype:
    """The type of embeddings."""
    some = _some(network).dtype
    return torch.promote_types(some, torch.float32) if some.is_floating_point else torch.float32


def _fresh_values(network: Network, seed: int) -> dict[str, Tensor]:
    """The module's parameters and buffers, drawn anew by its own ``reset_parameters`` and, as timm's
    models have it, ``init_weights``. What neither of them sets keeps its value.
    """
    start, module = network.initial, filled(network.plain, network.initial)
    device = next((value.device for value in start.values()), torch.device("cpu"))
    with seeded(device, seed), torch.no_grad():
        for child in module.modules():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
        if callable(weights := getattr(module, "init_weights", None)):
            # Every task begins with norms as they are here: scales of zero, with which timm's ResNets
            # start the last norm of each branch, would have to grow in each one anew.
            told = {"zero_init_last"} & inspect.signature(weights).parameters.keys()
            weights(**dict.fromkeys(told, False))
    drawn = dict((*module.named_parameters(), *module.named_buffers()))
    return start | {n: v.detach() for n, v in drawn.items() if n not in network.untrained}


def _heads(
    network: Network,
    values: Mapping[str, Tensor],
    generator: torch.Generator,
    task: int,
    fresh: bool,
) -> dict[str, Tensor]:
    """A task's heads, drawn as ``nn.Linear`` draws its own, or the module's where those are as wide.

    They are padded by zeros to (widest task, features, ...), so that heads of all tasks stack.
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
    """A head (classes, ...) with rows of zeros behind, (widest, ...)."""
    return nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, widest - len(rows)])
