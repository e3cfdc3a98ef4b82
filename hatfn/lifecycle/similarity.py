"""Similarity of tasks: how well the subnetwork of a learned task serves the data of a new one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hatfn.checks.batches import Batch, check_class_batch
from hatfn.checks.calls import check_chosen, check_owned
from hatfn.network.call import call
from hatfn.network.network import Network
from hatfn.network.outputs import forward
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.trees import output_leaves, take
from hatfn.spec import Spec
from hatfn.state import HATState

_RIDGE = 0.1
"""The weight decay of the fitted classifier, relative to the mean square of a feature vector."""


def similarity(
    hat: Spec, state: HATState, batch: tuple[Tensor, Tensor], tasks: Sequence[int] | None = None
) -> Float[Tensor, " K"]:
    """The error of each learned task's subnetwork on one batch of a new task; lower is more similar.

    A learned head cannot predict new classes. So, if tasks have classes, a new linear head is fitted to
    the features F of the subnetwork by least squares with a ridge. Its error is measured on each sample
    when the fit leaves this sample out:

        K = F F^T + 1,  G = (K + ridge)^-1,  error = mean_i |(G Y)_i / G_ii|^2

    This is the squared leave-one-out error in closed form; Y is the one-hot matrix of classes, or the
    targets themselves if they are real numbers. Without classes the error is the learner's loss for the
    output of the subnetwork.

    Args:
        hat: the learner.
        state: any state.
        batch: x (B, ...) and y of the new task. If tasks have classes, y is (B,) int64, counted within
            the task, or (B, ...) real numbers.
        tasks: the learned tasks to compare; None: all of them, in order.

    Returns:
        (K,), the error of each task, in the given order.

    Raises:
        TypeError, ValueError: a task that is not learned; a batch that is no pair of inputs and class
            labels, or has a single sample; a head that is a convolution over several positions.

    Example:
        >>> import hatfn, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
        >>> hat = hatfn.build(net, hatfn.trace(net, x, head="2"), [2, 2], torchopt.adam(1e-3))
        >>> similarity(hat, hat.consolidate(hat.init(0), 0), (x, y)).shape
        torch.Size([1])

    Source:
        Leave-one-out residuals of ridge regression: Allen 1974 (PRESS).
    """
    check_owned("similarity", hat, state)
    rows = check_chosen("similarity", state, tasks, hat.tasks)
    pair = check_class_batch("similarity", batch, hat.classes, hat.wiring, hat.has_real_targets)
    return errors(hat, state, pair, rows)


def errors(spec: Spec, state: HATState, batch: Batch, rows: Sequence[int]) -> Float[Tensor, " K"]:
    """The body of :func:`similarity`."""
    x, y = batch
    if spec.classes is None:
        outputs = (forward(spec.network, state, x, row, take(state.masks, row)) for row in rows)
        losses = map(spec.loss_of, rows)
        return torch.stack([loss(output, y) for loss, output in zip(losses, outputs, strict=True)])
    return torch.stack([_left_out(_features(spec.network, state, x, row), y) for row in rows])


def _features(network: Network, state: HATState, x: Inputs, task: int) -> Tensor:
    """The features that a task's subnetwork passes to its head, (B, D).

    They are the output of the module if the head is replaced by the identity.
    """
    task_params = take(state.task_params, task)
    for weight, bias in network.wiring.heads:
        _, size, *kernel = task_params[weight].shape
        if any(side > 1 for side in kernel):
            raise ValueError(
                f"similarity: the head {weight} is a convolution over {kernel}. Expected heads that "
                f"read one position: choose the task yourself, begin(..., init_from=0)."
            )
        task_params[weight] = torch.eye(size).to(task_params[weight]).reshape(size, size, *kernel)
        if bias is not None:
            task_params[bias] = task_params[bias].new_zeros(size)
    params, buffers = {**state.params, **task_params}, take(state.task_buffers, task)
    output, _ = call(network, network.evaluate, params, buffers, take(state.masks, task), x)
    return output_leaves(output)[0].flatten(1)


def _left_out(features: Tensor, y: Tensor) -> Tensor:
    """(), the mean squared error of a linear classifier on each sample when fitted to the others."""
    f = features.double()
    f = f - f.mean(0)
    kernel = f @ f.T
    kernel = kernel / kernel.diagonal().mean().clamp(min=torch.finfo(f.dtype).tiny)
    inverse = torch.linalg.inv(kernel + 1 + _RIDGE * torch.eye(len(f)).to(f))
    targets = (y.flatten(1) if y.is_floating_point() else torch.nn.functional.one_hot(y)).to(f)
    residuals: Tensor = (inverse @ targets) / inverse.diagonal()[:, None]
    return residuals.square().sum(1).mean()
