"""Make a learner and its data from the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
import torchopt
from torch import Tensor, nn

from hatfn.builder import build
from hatfn.engine.optimizer import Optimizer
from hatfn.engine.ranks import ALONE, Ranks
from hatfn.engine.torch_optim import from_torch
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.streams import Part, Task
from hatfn.learner import HAT
from hatfn.method import schedule
from hatfn.method.sparsity import sparsity
from hatfn.models import MLP
from hatfn.numerics.seeds import seeded
from hatfn.tracing import trace


def make_module(config: RunConfig, task: Task) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The module, with weights from the seed, and the function that resizes images for it."""
    with seeded(config.device, config.seed):
        if config.model == "mlp":
            features = task.train.x[0].numel()
            return MLP(features, task.classes, config.width, config.depth, config.dropout), _same
        known = timm.list_models(config.model) or timm.list_models(f"*{config.model}*")
        if not timm.is_model(config.model):
            raise ValueError(
                f"run: model={config.model!r}. Expected mlp or a timm model"
                + (f", such as {', '.join(known[:5])}." if known else ": see timm.list_models().")
            )
        try:
            module = timm.create_model(config.model, num_classes=task.classes)
        except RuntimeError as error:  # the name has a tag of weights that do not exist
            bare = config.model.partition(".")[0]
            raise ValueError(
                f"run: model={config.model!r}: {error} Expected {bare!r}: weights are drawn from the "
                f"seed."
            ) from error
    channels, height, width = module.pretrained_cfg["input_size"]  # type: ignore[index]
    side = config.image_size
    size = (height, width) if side is None else (side, side)
    return module, partial(_resize, channels=channels, size=size)


def _same(x: Tensor) -> Tensor:
    return x


def _resize(x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    x = nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    return x.expand(-1, channels, -1, -1)


def make_optimizer(config: RunConfig) -> Optimizer:
    """torch's optimizer of that name, with its fastest kernels; torchopt's if steps are compiled."""
    momentum = {"momentum": config.momentum}
    if config.compile != "none":
        options = momentum if config.optimizer in ("sgd", "rmsprop") else {}
        make = getattr(torchopt, config.optimizer)
        pure: Optimizer = make(config.lr, weight_decay=config.weight_decay, **options)
        return pure
    makers: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {**momentum, "fused": True}),
        "adam": (torch.optim.Adam, {"fused": True}),
        "adamw": (torch.optim.AdamW, {"fused": True}),
        "rmsprop": (torch.optim.RMSprop, momentum),
    }
    kind, options = makers[config.optimizer]
    return from_torch(kind, lr=config.lr, weight_decay=config.weight_decay, **options)


def make_learner(
    config: RunConfig, module: nn.Module, example: Tensor, stream: list[Task], ranks: Ranks = ALONE
) -> HAT:
    """The learner; for methods other than HAT, it has open gates and no penalty."""
    wiring = trace(module, example)
    if config.method == "isolated":  # nothing is shared: every task has its own copy of all parameters
        wiring = replace(
            wiring,
            params={
                name: role._replace(kind="task") if role.kind == "shared" else role
                for name, role in wiring.params.items()
            },
        )
    make = partial(
        build,
        module,
        wiring,
        classes=[task.classes for task in stream],
        optimizer=make_optimizer(config),
        s_max=config.s_max,
        max_norm=config.max_norm,
        ranks=ranks,
        accumulate=config.accumulate,
        grad_checkpointing=config.grad_checkpointing,
        compile=None if config.compile == "none" else config.compile,
        precision=None if config.precision == "float32" else torch.bfloat16,
    )
    if config.method != "hat":
        return make(init="dense", sparsity=0.0, compensation=None)
    first = config.sparsity if config.first_sparsity is None else config.first_sparsity
    return make(
        init=config.init,
        sparsity=[first, *[config.sparsity] * (len(stream) - 1)],
        quota=config.quota,
        regularizer=partial(sparsity, over=config.sparsity_over),
        compensation=config.compensation,
        protection=config.protection,
    )


def make_schedule(config: RunConfig) -> schedule.Schedule:
    """The function from progress to the mask scale; for methods other than HAT it keeps gates at 1."""
    if config.method != "hat":
        return schedule.constant(config.s_max)
    makers = {
        "linear": schedule.linear,
        "exponential": schedule.exponential,
        "cosine": schedule.cosine,
        "constant": schedule.constant,
    }
    return makers[config.schedule](config.s_max)


def training_part(config: RunConfig, task: Task) -> Part:
    """The images that train a task; validation images are among them unless they measure it."""
    if config.evaluate_on == "validation":
        return task.train
    return Part(*(torch.cat(pair) for pair in zip(task.train, task.validation, strict=True)))


def batches(
    data: Part, size: int, generator: torch.Generator, count: int | None = None
) -> Iterator[Part]:
    """One epoch in random order, in batches of nearly equal size, so that none has a single image.

    Args:
        data: the images of a task.
        size: the most images per batch.
        generator: draws the order.
        count: number of images in the epoch; after the last image it begins again with the first.
            None: all images once.
    """
    order = torch.randperm(len(data.y), generator=generator)
    order = order[torch.arange(len(order) if count is None else count) % len(order)]
    for rows in order.tensor_split(-(-len(order) // size)):
        yield Part(data.x[rows], data.y[rows])
