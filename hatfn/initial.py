"""Initial values: a pure function of the module and the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hatfn.forward import Network
from hatfn.gates import Init, initial_embeddings
from hatfn.modules import twin
from hatfn.seeds import seeded
from hatfn.state import HATState
from hatfn.transforms import Protection


def initial_state(
    network: Network,
    tasks: int,
    init: Init,
    protection: Protection,
    hyper: Mapping[str, float],
    seed: int,
    fresh: bool,
) -> HATState:
    """The state before any task, without an optimiser state."""
    generator = torch.Generator().manual_seed(seed)
    values = _fresh_values(network, seed) if fresh else network.initial
    some = next(iter(network.initial.values()))
    real = torch.promote_types(some.dtype, torch.float32) if some.is_floating_point() else torch.float32
    roles = network.wiring.params
    params = {name: values[name].clone() for name, role in roles.items() if role.kind == "shared"}
    own = {
        name: values[name].expand(tasks, *role.shape).clone()
        for name, role in roles.items()
        if role.kind == "task"
    }
    buffers = {
        name: values[name].expand(tasks, *values[name].shape).clone() for name in network.wiring.buffers
    }
    embeddings = {
        group: initial_embeddings(init, tasks, units, generator).to(some.device, real)
        for group, units in network.wiring.groups.items()
    }
    held = torch.bool if protection == "exact" else real
    no_task = torch.zeros(tasks, dtype=torch.bool, device=some.device)
    return HATState(
        params=params,
        task_params=own | _heads(network, values, generator, some, fresh),
        task_buffers=buffers,
        embeddings=embeddings,
        masks={group: torch.zeros_like(e, dtype=torch.bool) for group, e in embeddings.items()},
        learned=no_task,
        locked=no_task.clone(),
        active=no_task.clone(),
        protection={name: torch.zeros_like(p, dtype=held) for name, p in params.items()},
        hyper={
            name: torch.tensor(value, dtype=torch.float64, device=some.device)
            for name, value in hyper.items()
        },
        seed=torch.tensor(seed, device=some.device),
        opt_state=(),
    )


def _fresh_values(network: Network, seed: int) -> dict[str, Tensor]:
    """The module's parameters and buffers, drawn anew by its own ``reset_parameters`` and, as timm's
    models have it, ``init_weights``. What neither of them sets keeps its value.
    """
    start = dict(network.initial)
    names = {
        id(tensor): name
        for name, tensor in (
            *network.evaluate.named_parameters(),
            *network.evaluate.named_buffers(),
        )
    }

    def real(hollow: Tensor) -> Tensor:
        value = start.get(names[id(hollow)], hollow).clone()  # a gate's buffer holds nothing
        return torch.nn.Parameter(value) if isinstance(hollow, torch.nn.Parameter) else value

    module = twin(network.evaluate, False, real)
    device = next((value.device for value in start.values()), torch.device("cpu"))
    with seeded(device, seed), torch.no_grad():
        for child in module.modules():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
        if callable(weights := getattr(module, "init_weights", None)):
            weights()
    drawn = dict((*module.named_parameters(), *module.named_buffers()))
    return {name: drawn[name].detach() for name in start}


def _heads(
    network: Network,
    values: Mapping[str, Tensor],
    generator: torch.Generator,
    some: Tensor,
    fresh: bool,
) -> dict[str, Tensor]:
    """Heads of all tasks, (T, widest, features, ...), drawn as ``nn.Linear`` draws its own.

    A task as wide as the module's own head starts as a copy of that.
    """
    if network.classes is None:
        return {}
    widest = max(network.classes)
    heads = {}
    for name in network.heads:
        shape = _head_shape(network, name)
        fan_in = math.prod(_head_shape(network, network.heads[0])[1:])
        bound = 1 / math.sqrt(max(fan_in, 1))
        draw = torch.rand(len(network.classes), widest, *shape[1:], generator=generator)
        rows = (draw * 2 - 1) * bound
        for task, classes in enumerate(network.classes):
            if not fresh and shape[:1] == (classes,):
                rows[task, :classes] = values[name].cpu()
        dtype = some.dtype if network.added else values[name].dtype
        heads[name] = rows.to(some.device, dtype)
    return heads


def _head_shape(network: Network, name: str) -> tuple[int, ...]:
    """A head parameter's shape in the module; of one that is put behind it, without classes."""
    if not network.added:
        return network.wiring.params[name].shape
    return (0,) if name == "head.bias" else (0, *network.wiring.output_shape)


def lively(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Values under which every layer passes signal when half of its inputs are off.

    Matrices keep the variance; scales are near 1; biases and means are small; no layer starts at zero
    or at 1e-6, as trained-from-scratch recipes have it, because nothing behind it could be tested.

    Args:
        values: {name: tensor}, parameters and running statistics; integers stay as they are.
        generator: a CPU generator.
    """

    def draw(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        if value.dim() > 1:
            fan_in = max(value.numel() // max(len(value), 1), 1)
            return torch.randn(value.shape, generator=generator).to(value) * math.sqrt(4 / fan_in)
        positive = name.rpartition(".")[2] in ("weight", "gamma", "running_var", "scale")
        spread = torch.rand(value.shape, generator=generator).to(value)
        return spread + 0.5 if positive else (spread - 0.5) / 2

    return {name: draw(name, value) for name, value in values.items()}
