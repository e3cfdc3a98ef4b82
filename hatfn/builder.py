"""build(): from a module and its wiring to a learner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hatfn.checks.capacity import check_groups, check_shared
from hatfn.checks.settings import check_choice, check_classes, check_each, check_number, check_wiring
from hatfn.checks.values import check_callable, check_count, check_kind
from hatfn.engine.compiled import Part, check_compile
from hatfn.engine.optimizer import Optimizer, check_optimizer
from hatfn.engine.ranks import ALONE, Ranks
from hatfn.learner import HAT
from hatfn.method import sparsity as regularizers
from hatfn.method.loss import cross_entropy
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
    loss: Callable[[Any, Tensor], Tensor] = cross_entropy,
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
    """A continual learner for a module and its wiring.

    Args:
        module: the one that was traced; it is copied, neither changed nor called. Parameters with
            ``requires_grad=False`` are gated and never trained.
        wiring: from :func:`hatfn.trace`.
        classes: number of classes of each task; every task has a head of its own, in the place of the
            module's classifier or, where the wiring has no heads, behind the module. None: the
            module's output as it is, for regression or feature masks.
        optimizer: an optax-style (init, update) pair, such as ``torchopt.adam(1e-3)``; it trains the
            shared weights, the task's own parameters and its embeddings together.
        num_tasks: T, where ``classes`` is None; default 1.
        loss: (what the module returns, logits (B, C) as a rule, y) -> ().
        s_max: the largest mask scale, > 1.
        sparsity: weight of the penalty on using free units, >= 0; a list: of each task, as for a
            first task that would else take everything.
        quota: budget: the share of units, in [0, 1], that a task may take without penalty; a list: of
            each task. HAT-CL's is 1/T.
        regularizer: (gates, cumulative mask, the task's quota), the first two {group: (U,)} -> (); see
            :func:`hatfn.sparsity`, and ``functools.partial(hatfn.sparsity, over="groups")``.
        init: "normal", "dense" or "sparse" task embeddings.
        gate: the function that takes s * e to a gate.
        protection: the lock rule, by name or one of :mod:`hatfn.protection`. "exact": a weight is
            held if a locked task uses both its ends; "paper": by min(post, pre) of the soft cumulative
            masks, as published. Under the first no old task's output moves; under the second it does as
            far as gates were not binary when a task was closed. "adaptive" lets weights in use move a
            little, "magnitude" holds only the largest of them.
        compensation: the factor of the embeddings' gradients: "s_max" (first paper), a number
            (HAT-CL: 100), or None to leave the gradients as they are.
        max_norm: gradients are scaled down to this 2-norm, all together; None: not.
        clamp: embeddings stay in [-clamp, clamp].
        decay_embeddings: let the optimiser's weight decay act on embeddings as well; it draws them to
            0, where training and serving differ.
        precision: torch.bfloat16: the module computes under ``torch.autocast``, in training and
            when served; weights, moments and outputs stay as they are. Where ``vmap`` has no batch
            norm of two precisions, predict() goes task by task. None: no autocast.
        ranks: the processes that train together, :func:`hatfn.ranks.joined` under torchrun; each
            calls the same functions in the same order, with its own share of every batch.
        accumulate: number of parts, >= 1, that every batch is split into (at most one for each
            sample): a step takes the mean of their gradients, by their numbers of samples, and holds
            the activations of one. With a loss that is a mean over samples that is the step of the
            whole batch, but for batch norms, for which each part is a batch, and for random numbers.
        grad_checkpointing: switch on the module's own checkpointing of activations, as timm's and
            transformers' modules offer it, in training: its blocks are computed again in the backward
            pass instead of kept, for the same step to the bit. False: as the module has it. One that
            calls ``torch.utils.checkpoint`` by itself says so: ``module.grad_checkpointing = True``.
        compile: what of a step PyTorch's Inductor compiles, at its first call and for every shape
            anew. "update": all that follows the gradient, protection, clip, optimiser, as one pass
            over memory; whatever the batch, whichever the task. "step": the gradient as well, for every
            shape of batch and number of classes; for a small module, whose Python it leaves out, the
            fastest. Losses and weights are the same to rounding, old tasks' outputs to the bit. Needs
            functions made of operators alone, such as TorchOpt's, and on a CPU a C++ compiler.

    Returns:
        The learner.

    Raises:
        TypeError, ValueError: a wiring of another module, wrong classes or settings, an optimiser
            that is not pure, checkpointing that the module does not offer.

    Warns:
        HATWarning: a group with fewer units than there are tasks; tasks share less than half of the
            parameters.

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
    tasks = check_classes(classes, num_tasks, wiring)
    if classes is not None and not wiring.heads:  # a head is put behind: its features have gates
        wiring = wiring.gated or wiring
    check_groups(wiring, tasks)
    check_shared(wiring)
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
        ("loss", loss, "of (output, y), such as torch.nn.functional.mse_loss"),
        ("regularizer", regularizer, "of (gates, cumulative, quota), such as hatfn.sparsity"),
        ("gate", gate, "of s * e, such as torch.sigmoid"),
    ):
        check_callable("build", name, function, right)
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
    check_compile(compile, pure, ranks, network.recomputes)
    device = next((value.device for value in network.initial.values()), "cpu")
    return HAT(
        network=network,
        wiring=wiring.to(device),
        tasks=tasks,
        optimizer=pure,
        loss=loss,
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
