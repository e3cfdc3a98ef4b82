"""Infer the task of a sample from the outputs of all tasks, and then its class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.func import grad, jacfwd
from torch.nn.attention import SDPBackend, sdpa_kernel

from hatfn.checks.batches import check_input
from hatfn.checks.calls import check_chosen, check_owned
from hatfn.checks.values import check_list
from hatfn.method.loss import logits_of
from hatfn.network.outputs import forward_mixed
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.concrete import integer, read
from hatfn.numerics.vmap import batchable, is_unbatchable
from hatfn.spec import Spec
from hatfn.state import HATState

Method = Literal["max", "softmax", "entropy", "energy"]


def _log_odds(logits: Tensor) -> Tensor:
    """The log odds of the largest softmax probability p.

    They have the same order as p, but p close to 1 would be rounded to 1.
    """
    top = logits.argmax(-1, keepdim=True)
    others = logits.scatter(-1, top, -torch.inf)
    return logits.amax(-1) - others.logsumexp(-1)


def entropy(logits: Float[Tensor, "*B C"]) -> Float[Tensor, "*B"]:
    """The entropy of the softmax, in nats: -sum_c p_c log p_c; a logit of -inf adds nothing."""
    terms: Tensor = torch.special.entr(logits.softmax(-1))
    return terms.sum(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda logits: logits.amax(-1),
    "softmax": _log_odds,
    "entropy": lambda logits: -entropy(logits),
    "energy": lambda logits: logits.logsumexp(-1),
}
"""Functions from logits (..., C) to a score (...,), which is highest for the most likely task."""


def infer_task(logits: Float[Tensor, "T B C"], method: Method = "max") -> Int64[Tensor, " B"]:
    """For each sample, the task whose output is the most confident.

    task = argmax_t score(z_t), with z_t the logits of task t and p = softmax(z_t):

        max      max_c z_c
        softmax  max_c p_c
        entropy  -H(p) = sum_c p_c log p_c
        energy   log sum_c exp(z_c)

    If every task has two classes, softmax and entropy choose the same task.

    Args:
        logits: (T, B, C), as :meth:`HAT.predict` gives them; -inf for classes that a task lacks.
        method: the name of the score.

    Returns:
        (B,) int64, rows of the logits, from 0 to T - 1: positions in the list of tasks that predict
        received. If scores are equal, the first row is chosen.

    Raises:
        TypeError, ValueError: logits of another type or shape; a sample without a finite largest
            logit in some task; an unknown method.

    Example:
        >>> logits = torch.tensor([[[3.0, 2.9]], [[1.0, -4.0]]])
        >>> infer_task(logits, "max"), infer_task(logits, "entropy")
        (tensor([0]), tensor([1]))

    Source:
        max: HAT-CL (arXiv 2307.09653); softmax: Hendrycks and Gimpel 2017 (arXiv 1610.02136); energy:
        Liu et al. 2020 (arXiv 2010.03759), equation 4, at temperature 1.
    """
    check_logits("infer_task", logits)
    if method not in [*SCORES]:
        raise ValueError(
            f"infer_task: method={method!r}. Expected one of {', '.join(map(repr, SCORES))}."
        )
    return SCORES[method](logits).argmax(0)


def infer_task_by_gradient(
    hat: Spec,
    state: HATState,
    x: Any,
    tasks: Sequence[int] | None = None,
    per: Literal["sample", "batch"] = "sample",
) -> Int64[Tensor, " B"]:
    """The task whose mask, given more weight in a mixture of all masks, lowers the entropy fastest.

    task = argmax_t -dH(p(alpha)) / dalpha_t at alpha = 1/T. Here p(alpha) is the softmax of the output
    under the gates sum_t alpha_t mask_t, and H is its entropy.
    :func:`~hatfn.network.outputs.forward_mixed` describes how heads, norms and statistics are mixed. An
    operator without a forward derivative, such as an LSTM, costs a backward pass for each sample.

    Args:
        hat: the learner.
        state: any state.
        x: (B, ...).
        tasks: the tasks to choose from, in this order; None: all learned tasks, in order.
        per: "sample" chooses a task for each sample, with T forward derivatives for the whole batch;
            "batch" chooses one task for all samples by their mean entropy, with a backward derivative.

    Returns:
        (B,) int64, rows from 0 to T - 1: positions in the list of tasks, as in :func:`infer_task`.

    Raises:
        TypeError, ValueError: a wrong task or input; a task that was never learned; an output that
            is not (B, C); an unknown ``per``.

    Source:
        Wortsman et al. 2020 (SupSup, arXiv 2006.14769), for the superposition p(alpha) and the One-Shot
        rule. SupSup has masks of weights and one head; here are gates of units and a head per task.
    """
    where = "infer_task_by_gradient"
    if per not in ("sample", "batch"):
        raise ValueError(f"{where}: per={per!r}. Expected 'sample' or 'batch'.")
    check_owned(where, hat, state)
    inputs = check_input(where, x, hat.wiring)
    rows = check_chosen(where, state, tasks, hat.tasks)
    real = next((v.dtype for v in inputs.batched if v.is_floating_point()), torch.get_default_dtype())
    alpha = torch.full((len(rows),), 1 / len(rows), dtype=real, device=inputs.device)

    def entropies(alpha: Tensor, x: Inputs = inputs) -> Tensor:
        output = logits_of(forward_mixed(hat.network, state, x, rows, alpha))
        if not isinstance(output, Tensor) or output.dim() != 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f"{where}: the output is {got}. Expected an output of shape (B, classes); for other "
                f"outputs choose the logits yourself: infer_task(logits)."
            )
        return entropy(output)

    def slopes(alpha: Tensor, x: Inputs) -> Tensor:
        return grad(lambda alpha: entropies(alpha, x).mean())(alpha)  # type: ignore[no-any-return]

    # Fused attention has no forward derivative.
    with batchable(inputs.device), sdpa_kernel(SDPBackend.MATH):
        if per == "batch":
            return slopes(alpha, inputs).argmin().expand(inputs.samples)
        try:
            with warnings.catch_warnings():
                # PyTorch's first forward derivative calls a function that PyTorch itself deprecates.
                warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)
                each: Tensor = jacfwd(entropies)(alpha)
        except ValueError as error:
            if not is_unbatchable(error):
                raise
            parts = zip(*(value.split(1) for value in inputs.batched), strict=True)
            alone = (inputs._replace(batched=part) for part in parts)
            each = torch.stack([slopes(alpha, one) for one in alone])
        return each.argmin(-1)


def classify(
    logits: Float[Tensor, "T B C"],
    rows: Int64[Tensor, " B"],
    offsets: Sequence[int] | None = None,
) -> Int64[Tensor, " B"]:
    """The class of each sample, by the logits of the task that was inferred for it.

    Args:
        logits: (T, B, C), as :meth:`HAT.predict` gives them.
        rows: (B,) int64 in [0, T), as :func:`infer_task` gives them.
        offsets: for each row, the number of its task's first class among the classes of all tasks.
            None: classes are counted within the task.

    Returns:
        (B,) int64.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.

    Example:
        >>> logits = torch.tensor([[[3.0, 4.0]], [[9.0, 2.0]]])
        >>> rows = infer_task(logits)
        >>> classify(logits, rows), classify(logits, rows, offsets=[0, 2])
        (tensor([0]), tensor([2]))
    """
    check_logits("classify", logits)
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"classify: rows is {got}. Expected an int64 tensor: infer_task(logits).")
    tasks, samples, _ = logits.shape
    ends = read(torch.stack(rows.aminmax())) if rows.numel() else None
    if rows.shape != (samples,) or (ends is not None and not 0 <= ends[0] <= ends[1] < tasks):
        raise ValueError(
            f"classify: rows has shape {tuple(rows.shape)} and numbers from {ends}. Expected shape "
            f"({samples},) and numbers from 0 to {tasks - 1}, as infer_task(logits) gives them."
        )
    if offsets is not None:
        check_list("classify", "offsets", offsets, "one for each row of the logits, such as [0, 2]")
    if offsets is not None and (len(offsets) < tasks or None in map(integer, offsets)):
        raise ValueError(
            f"classify: {len(offsets)} offsets for {tasks} rows: {offsets}. Expected an int for each "
            f"row of the logits, such as [0, 2, 4] for tasks of two classes."
        )
    classes = logits[rows, torch.arange(samples, device=logits.device)].argmax(-1)
    return classes if offsets is None else classes + torch.as_tensor(offsets, device=rows.device)[rows]


def check_logits(where: str, logits: Any) -> None:
    """Check that logits are (T, B, C), and that each sample's largest logit is finite in every task."""
    right = "Expected a tensor (T, B, C), as hat.predict(state, x) gives it"
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{where}: logits is a {type(logits).__name__}. {right}; if the module has several "
            f"outputs, choose one: logits[0]."
        )
    if not logits.is_floating_point():
        raise TypeError(
            f"{where}: logits are {logits.dtype}. Expected floating-point numbers: logits.float()."
        )
    if logits.dim() != 3 or not len(logits) or not logits.shape[-1]:
        raise ValueError(
            f"{where}: logits has shape {tuple(logits.shape)}. {right}, with at least one task and "
            f"class: logits[None] for one task."
        )
    if read(logits.amax(-1).isfinite().all()) is False:
        raise ValueError(
            f"{where}: a sample's logits of one task are all -inf, or contain nan or inf. Expected a "
            f"finite largest logit: -inf only marks classes that a task does not have."
        )
