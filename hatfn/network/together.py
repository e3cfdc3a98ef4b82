"""How many tasks to compute at a time: one, some or all, from the sizes of the work alone.

A loop over tasks calls each operator once for each task. One ``vmap`` over tasks calls it once for all,
but each call costs more, its results are larger than the caches, and layers that skip dead units have
another weight for each task, with which a product takes longer than those of the loop together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hatfn.network.skipping import Plan
from hatfn.wiring import Wiring

# The constants for a CPU were fitted to 106 measurements on one core of an AMD EPYC that other work
# shared, and 40 of them were repeated: MLPs, convolutional networks, a ViT and a BERT, with 2 to 50
# tasks and 1 to 256 samples. By these times the choice takes 1.6 % longer than the best way in the
# mean, and 28 % at most; always one vmap takes up to 4 times as long, and always a loop 17 times.

CALL = 2**20
"""The number of multiplications that take as long as a loop takes to call one layer, about 0.1 ms."""

BATCHED = 1.3
"""How many calls of a layer in a loop take as long as one under ``vmap``."""

START = 4.0
"""How many calls of a layer in a loop take as long as starting a ``vmap``."""

SLOWER = 0.375
"""By what share of their time layers with several positions that skip units are slower under ``vmap``.

Convolutions have a group for each task then, and features are picked by one index for each task.
"""

CACHED = 3 * 2**19
"""How many numbers one layer may return for all tasks together, before it leaves the caches: 6 MB."""

FULL = 2**32
"""The multiplications of a layer that keep a GPU busy for longer than the CPU takes to call it.

Large GPUs do 2**45 a second in single precision, so that is 0.1 ms. This is computed, not measured.
"""


class Work(NamedTuple):
    """The work of a module for one sample under one task.

    Attributes:
        layers: the number of weights with two or more axes.
        numbers: the multiplications by these weights.
        widest: the most numbers that a layer with several positions returns, such as a convolution or
            a linear layer on tokens; 0 without such a layer.
        looped: whether a loop is faster in any case. ``vmap`` cannot batch recurrent layers, and a
            convolution whose weight differs between tasks has a group for each task. It differs if the
            module computes with it first, as weight standardisation does, or if no gate fits it.
    """

    layers: int
    numbers: int
    widest: int
    looped: bool


def measured(module: nn.Module, wiring: Wiring, names: Mapping[str, str]) -> Work:
    """The work of a module, counted from its layers.

    Args:
        module: any module.
        wiring: its wiring.
        names: {name of a parameter: its name in the module}, if the two differ.
    """
    weights = {name: role for name, role in wiring.params.items() if len(role.shape) > 1}
    layers = [(wiring.params[layer.params[0]].shape[0], layer) for layer in wiring.layers.values()]
    places = {layer.params[0]: layer.size // rows for rows, layer in layers}
    recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())
    convolutions = tuple(
        f"{path}." for path, child in module.named_modules() if isinstance(child, _ConvNd)
    )
    differs = any(
        (role.folded or role.kind == "task") and names.get(name, name).startswith(convolutions)
        for name, role in weights.items()
    )
    return Work(
        len(weights),
        sum(math.prod(role.shape) * places.get(name, 1) for name, role in weights.items()),
        max((layer.size for rows, layer in layers if layer.size > rows), default=0),
        recurrent or differs,
    )


def tasks_at_once(work: Work, samples: int, tasks: int, device: torch.device, narrowed: int = 0) -> int:
    """The number of tasks to compute at a time, from 1 to ``tasks``; 1 stands for a loop.

    The number depends on the arguments alone. Nothing is timed.

    Args:
        work: the work of the module.
        samples: the number of samples in the batch.
        tasks: the number of tasks.
        device: where they are computed.
        narrowed: the multiplications for one task of the layers with several positions that skip dead
            units, for the whole batch; see :func:`narrowed_work`.
    """
    if work.looped or tasks == 1:
        return 1
    if device.type != "cpu":
        # Calls cost more than arithmetic until a layer fills the GPU, and nothing is skipped there.
        fills = math.ceil(FULL * work.layers / max(samples * work.numbers, 1))
        return min(tasks, fills)
    most = max(1, CACHED // max(samples * work.widest, 1))
    size = math.ceil(tasks / math.ceil(tasks / most))  # chunks of about the same size
    looped = size * work.layers * CALL
    together = (START + BATCHED * work.layers) * CALL + SLOWER * size * narrowed
    return size if together < looped else 1


def narrowed_work(wiring: Wiring, plan: Plan, samples: int) -> int:
    """The multiplications for one task of narrowed layers with several positions.

    Args:
        wiring: the wiring of the module.
        plan: the layers that are narrowed.
        samples: the number of samples in the batch.
    """
    total = 0.0
    for path, cut in plan.cuts.items():
        layer = wiring.layers[path]
        shape = wiring.params[layer.params[0]].shape
        places = layer.size // shape[0]
        sides = [side.share for side in cut if side is not None]
        if places > 1 and sides:
            total += samples * places * math.prod(shape) * math.prod(sides)
    return round(total)
