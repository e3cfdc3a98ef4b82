"""build(): make a learner from a module and its wiring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hatfn.checks.capacity import check_groups, check_shared
from hatfn.checks.settings import (
    check_choice,
    check_classes,
    check_each,
    check_number,
    check_wiring,
)
from hatfn.checks.values import check_callable, check_count, check_kind
from hatfn.engine.compiled import Part, check_compile
from hatfn.engine.optimizer import Optimizer, check_optimizer
from hatfn.engine.ranks import ALONE, Ranks
from hatfn.learner import HAT
from hatfn.method import sparsity as regularizers
from hatfn.method.loss import cross_entropy
from hatfn.method.losses import Loss, check_losses, warn_one_class
from hatfn.method.names import Init, LockName
from hatfn.method.protection import LOCKS, Lock
from hatfn.network.network import make_network
from hatfn.wiring import Wiring


def build(
    module: nn.Module,
    wiring: Wiring,
    classes: Sequence[int] | None,
    optimizer: Optimizer,
    *,
    num_tasks: int | None = None,
    loss: Callable[..., Tensor] | Sequence[Loss] = cross_entropy,
    s_max: float = 400.0,
    sparsity: float | Sequence[float] = 0.75,
    quota: float | Sequence[float] = 0.0,
    regularizer: Callable[
        [dict[str, Tensor], dict[str, Tensor], Tensor], Tensor
    ] = regularizers.sparsity,
    init: Init = "normal",
    gate: Callable[[Tensor], Tensor] = torch.sigmoid,
    protection: LockName | Lock = "exact",
    compensation: float | Literal["s_max"] | None = "s_max",
    max_norm: float | None = 10_000.0,
    clamp: float = 6.0,
    decay_embeddings: bool = False,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
    accumulate: int = 1,
    grad_checkpointing: bool = False,
    compile: Part | None = None,
) -> HAT:
    """Build a continual learner from a module and its wiring.

    Args:
        module: the traced module. It is copied, and neither changed nor called. Parameters with
            ``requires_grad=False`` are gated, but never trained.
        wiring: the wiring of the module, from :func:`hatfn.trace`.
        classes: the number of classes of each task. Each task has its own head, which replaces the
            module's classifier, or stands behind the module if the wiring has no heads. None: the
            module's output stays as it is, for regression or feature masks.
        optimizer: an optax-style pair (init, update) of pure functions, such as
            ``torchopt.adam(1e-3)``. It trains the shared weights, and the parameters and embeddings
            of each task.
        num_tasks: T, the number of tasks, if ``classes`` is None; default 1.
        loss: (output of the module, y) -> (); the default reads logits (B, C), or the ``logits`` of the
            output. A list has one loss for each task. A function with an argument ``task`` receives
            the task as a keyword argument.
        s_max: the largest mask scale, > 1.
        sparsity: the weight of the sparsity penalty, >= 0, which a task pays for the free units that
            it uses. A list has one weight for each task; a larger one for the first task keeps it
            from taking all units.
        quota: the share of units, in [0, 1], that a task may use without penalty. A list has one share
            for each task. HAT-CL uses 1/T.
        regularizer: the sparsity penalty, a function (gates, cumulative mask, quota) -> (), where the
            first two are {group: (U,)} and the quota is the task's own. Default:
            :func:`hatfn.sparsity`. For HAT-CL's version write
            ``functools.partial(hatfn.sparsity, over="groups")``.
        init: how task embeddings start: "normal" from N(0, 1), so that half of the units start on;
            "dense" at 1, so that all start on; "sparse" from N(Phi^-1(1/T), 1), so that each starts on
            with probability 1/T.
        gate: the function from s * e, the mask scale times the embedding, to the gate.
        protection: the rule that decides which weights stay unchanged, by its name or from
            :mod:`hatfn.protection`. "exact": a weight is protected if a locked task uses its out unit
            and its in unit; outputs of locked tasks do not change at all. "paper": the published rule,
            gradients times 1 - min(out, in) of the soft cumulative masks; outputs change a little if
            gates were not yet binary when their task was closed. "adaptive": weights in use change a
            little. "magnitude": only the largest weights in use are protected.
        compensation: the constant factor in the compensation of the embeddings' gradients: "s_max"
            (first paper), or a number (HAT-CL: 100). None: no compensation.
        max_norm: > 0, the largest 2-norm of the gradient of all that a step trains, taken together. A
            gradient with a larger norm is scaled down to it. None: no limit.
        clamp: > 0; embeddings stay in [-clamp, clamp].
        decay_embeddings: let the optimizer's weight decay act on embeddings as well. It pulls them
            towards 0, where soft and binary gates differ most.
        precision: torch.bfloat16: the module computes under ``torch.autocast``, in training and in
            serving, while weights, optimizer state and outputs keep their type. If ``vmap`` cannot
            mix both types in a batch norm, ``predict`` computes one task after another. None: no
            autocast.
        ranks: the processes that train together, from :func:`hatfn.ranks.joined` under torchrun. Each
            process calls the same functions in the same order, with its own share of every batch.
        accumulate: the number of micro-batches, >= 1, that a batch is split into, but at most one for
            each sample. Only the activations of one are in memory; the step uses the mean of their
            gradients, weighted by their numbers of samples. If the loss is a mean over samples, the
            step equals the full-batch step up to rounding, except that batch norm sees micro-batches
            and that dropout draws other masks.
        grad_checkpointing: switch on the activation checkpointing that the module offers, as modules
            of timm and transformers do. In training its blocks are then computed a second time in the
            backward pass instead of stored; the step is the same to the bit. False: the module's own
            setting. If your module calls ``torch.utils.checkpoint`` directly, set
            ``module.grad_checkpointing = True``.
        compile: the part of a step that PyTorch's Inductor compiles, at the first call and again for
            each new shape. A later process finds it on disk; ``logging`` tells of it at level INFO.
            "update": everything after the gradient (protection, clip, optimizer); one graph serves all
            batches and tasks. "step": the gradient as well, with a graph for each shape of the batch
            and number of classes; the fastest for a small module. Losses and weights are the same up
            to rounding, outputs of locked tasks to the bit. It needs an optimizer made of operators
            alone, such as TorchOpt's, and on a CPU a C++ compiler. None:
            nothing is compiled.

    Returns:
        The learner.

    Raises:
        TypeError, ValueError: a wiring of another module; wrong classes or settings; an optimizer
            that is not pure; checkpointing that the module does not offer.

    Warns:
        HATWarning: a group has fewer units than there are tasks; tasks share less than half of the
            parameters; a task has one class and a cross entropy.

    Example:
        >>> import hatfn, torchopt
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
        >>> wiring = hatfn.trace(net, x, head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2, 2], optimizer=torchopt.adam(1e-3))
        >>> state = hat.begin(hat.init(seed=0), task=0)
        >>> state, info = hat.update(state, (x, y), task=0, scale=100.0)
        >>> state = hat.consolidate(state, task=0)
        >>> hat.forward(state, x, task=0).shape
        torch.Size([16, 2])

    Source:
        Serrà et al. 2018 (arXiv 1801.01423); Duan 2023 (arXiv 2307.09653).
    """
    check_wiring(module, wiring)
    if classes is None and wiring.headless is not None:
        wiring = wiring.headless
    tasks = check_classes(classes, num_tasks, wiring)
    if classes is not None and not wiring.heads:  # the features that a head behind reads have gates
        wiring = wiring.gated or wiring
    check_groups(wiring, tasks)
    check_number("build", "clamp", clamp)
    if max_norm is not None:
        check_number("build", "max_norm", max_norm)
    check_choice("init", init, get_args(Init))
    if not isinstance(protection, Lock):
        check_choice("protection", protection, get_args(LockName))
    if precision not in (None, torch.bfloat16):
        raise ValueError(
            f"build: precision={precision!r}. Expected torch.bfloat16 or None. For another precision "
            f"of all numbers convert the module before it is traced: module.double()."
        )
    for name, function, right in (
        ("regularizer", regularizer, "of (gates, cumulative, quota), such as hatfn.sparsity"),
        ("gate", gate, "of s * e, such as torch.sigmoid"),
    ):
        check_callable("build", name, function, right)
    losses = check_losses("build", loss, tasks)
    warn_one_class("build", classes, losses)
    check_kind("build", "grad_checkpointing", grad_checkpointing, bool, "True or False")
    check_kind("build", "ranks", ranks, Ranks, "hatfn.ranks.joined()")
    pure = check_optimizer(optimizer)
    factor = s_max if compensation in ("s_max", None) else compensation
    hyper: dict[str, float | tuple[float, ...]] = {
        "lr": 1.0,
        "s_max": check_number("build", "s_max", s_max),
        "compensation": check_number("build", "compensation", factor),
        "sparsity": check_each("sparsity", sparsity, tasks),
        "quota": check_each("quota", quota, tasks),
    }
    network = make_network(module, wiring, classes, precision, grad_checkpointing)
    check_shared(network.wiring)
    check_compile(compile, pure, ranks, network.recomputes)
    device = next((value.device for value in network.initial.values()), "cpu")
    return HAT(
        network=network,
        wiring=wiring.to(device),
        tasks=tasks,
        optimizer=pure,
        loss=losses,
        regularizer=regularizer,
        gate=gate,
        embedding_init=init,
        protection=protection if isinstance(protection, Lock) else LOCKS[protection](),
        hyper=hyper,
        compensated=compensation is not None,
        max_norm=max_norm,
        clamp=clamp,
        decay_embeddings=decay_embeddings,
        ranks=ranks,
        accumulate=check_count("build", "accumulate", accumulate),
        compile=compile,
    )
