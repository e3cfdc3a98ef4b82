"""Initial values: a pure function of the module and the seed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hatfn.method.gates import Init, initial_embeddings
from hatfn.method.protection import Lock
from hatfn.network.copies import filled
from hatfn.network.network import Network
from hatfn.numerics.seeds import mixed, seeded
from hatfn.numerics.trees import tree_map
from hatfn.state import HATState

if TYPE_CHECKING:
    from hatfn.learner import HAT


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


def initial_state(
    network: Network,
    tasks: int,
    init: Init,
    lock: Lock,
    hyper: Mapping[str, float | tuple[float, ...]],
    seed: int,
    fresh: bool,
) -> HATState:
    """The state before any task, without an optimiser state."""
    values = initial_values(network, seed, fresh)
    owns = [initial_own(network, values, tasks, task, init, seed, fresh) for task in range(tasks)]
    own: Own = tree_map(lambda *slices: torch.stack(slices), *owns)
    params = {name: values[name].clone() for name in network.wiring.shared}
    some = _some(network)
    held = _real(network) if lock.soft else torch.bool
    no_task = torch.zeros(tasks, dtype=torch.bool, device=some.device)
    return HATState(
        params=params,
        task_params=own.params,
        task_buffers=own.buffers,
        embeddings=own.embeddings,
        masks={group: torch.zeros_like(e, dtype=torch.bool) for group, e in own.embeddings.items()},
        learned=no_task,
        locked=no_task.clone(),
        active=no_task.clone(),
        protection={name: torch.zeros_like(p, dtype=held) for name, p in params.items()},
        hyper={
            name: torch.tensor(value, dtype=torch.float64, device=some.device)
            for name, value in hyper.items()
        },
        seed=torch.tensor(seed, device=some.device),
        fresh=torch.tensor(fresh, device=some.device),
        opt_state=(),
    )


def initial_values(network: Network, seed: int, fresh: bool) -> dict[str, Tensor]:
    """The module's parameters and buffers as it brought them, or drawn anew from the seed."""
    return _fresh_values(network, seed) if fresh else network.initial


def initial_own(
    network: Network,
    values: Mapping[str, Tensor],
    tasks: int,
    task: int,
    init: Init,
    seed: int,
    fresh: bool,
) -> Own:
    """What one task starts with: a function of the seed and the task, whatever the other tasks are.

    Args:
        network: the static half; its classes give the width of the heads.
        values: from :func:`initial_values`.
        tasks: T, which only the "sparse" embeddings depend on.
        task: which.
        init: of the embeddings.
        seed: of the state.
        fresh: whether heads are drawn even where the module's own would fit.
    """
    some, generator = _some(network), torch.Generator().manual_seed(mixed(seed, task))
    embeddings = {
        group: initial_embeddings(init, tasks, units, generator).to(some.device, _real(network))
        for group, units in network.wiring.groups.items()
    }
    own = {name: values[name] for name, role in network.wiring.params.items() if role.kind == "task"}
    buffers = {name: values[name] for name in network.wiring.buffers}
    return Own(own | _heads(network, values, generator, task, fresh), buffers, embeddings)


def _some(network: Network) -> Tensor:
    """A tensor on the device, and of the type, that the module's numbers are."""
    return next(iter(network.initial.values()))


def _real(network: Network) -> torch.dtype:
    """The type of embeddings."""
    some = _some(network).dtype
    return torch.promote_types(some, torch.float32) if some.is_floating_point else torch.float32


def _fresh_values(network: Network, seed: int) -> dict[str, Tensor]:
    """The module's parameters and buffers, drawn anew by its own ``reset_parameters`` and, as timm's
    models have it, ``init_weights``. What neither of them sets keeps its value.
    """
    start, module = network.initial, filled(network.evaluate, network.initial)
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
    return {name: drawn[name].detach() for name in start}


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
        shape = _head_shape(network, name)
        fan_in = math.prod(_head_shape(network, network.heads[0])[1:])
        bound = 1 / math.sqrt(max(fan_in, 1))
        rows = (torch.rand(classes, *shape[1:], generator=generator) * 2 - 1) * bound
        if not fresh and shape[:1] == (classes,):
            rows = values[name]
        dtype = _some(network).dtype if network.added else values[name].dtype
        heads[name] = widened(rows.to(_some(network).device, dtype), max(network.classes))
    return heads


def widened(rows: Tensor, widest: int) -> Tensor:
    """A head (classes, ...) with rows of zeros behind, (widest, ...)."""
    return nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, widest - len(rows)])


def _head_shape(network: Network, name: str) -> tuple[int, ...]:
    """A head parameter's shape in the module; of one that is put behind it, without classes."""
    if not network.added:
        return network.wiring.params[name].shape
    return (0,) if name == "head.bias" else (0, *network.wiring.output_shape)


def _initial(
    hat: HAT, state: HATState, tasks: Sequence[int]
) -> tuple[dict[str, Tensor], dict[int, Own]]:
    """What the shared weights of a state, and some of its tasks, started with."""
    seed, fresh = int(state.seed), bool(state.fresh)
    values = initial_values(hat.network, seed, fresh)
    owns = {
        task: initial_own(hat.network, values, hat.tasks, task, hat.embedding_init, seed, fresh)
        for task in tasks
    }
    return values, owns
