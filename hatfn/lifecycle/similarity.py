"""Which learned task is most like a new one: how well its subnetwork serves the new task's data."""

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
"""The weight decay of the classifier that is fitted, relative to a feature vector's mean square."""


def similarity(
    hat: Spec, state: HATState, batch: tuple[Tensor, Tensor], tasks: Sequence[int] | None = None
) -> Float[Tensor, " K"]:
    """How badly each learned task's subnetwork serves a new task, judged by one batch; lower is better.

    With classes, a learned head says nothing about new classes. So a linear one is fitted to the
    subnetwork's features F, by least squares with a ridge, and judged on samples that it has not seen:

        K = F F^T + 1,  G = (K + ridge)^-1,  error = mean_i |(G Y)_i / G_ii|^2

    the squared leave-one-out error in closed form, Y being the classes one-hot. Without classes it is
    the learner's loss of the subnetwork's output.

    Args:
        hat: the learner.
        state: any state.
        batch: x (B, ...) and y of the new task: (B,) int64, counted within it, where there are classes.
        tasks: learned tasks to judge; None: all of them, in order.

    Returns:
        (K,), the error of each task, in the given order.

    Raises:
        TypeError, ValueError: a task that is not learned; a batch that is no pair of inputs and class
            labels, or of a single sample; a head that is a convolution over several places.

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
    pair = check_class_batch("similarity", batch, hat.classes, hat.wiring)
    return errors(hat, state, pair, rows)


def errors(spec: Spec, state: HATState, batch: Batch, rows: Sequence[int]) -> Float[Tensor, " K"]:
    """The body of :func:`similarity`."""
    x, y = batch
    if spec.classes is None:
        outputs = (forward(spec.network, state, x, row, take(state.masks, row)) for row in rows)
        return torch.stack([spec.loss(output, y) for output in outputs])
    return torch.stack([_left_out(_features(spec.network, state, x, row), y) for row in rows])


def _features(network: Network, state: HATState, x: Inputs, task: int) -> Tensor:
    """What a task's subnetwork gives to its head, (B, D): the output of a head that changes nothing."""
    own = take(state.task_params, task)
    for weight, bias in network.wiring.heads:
        _, size, *kernel = own[weight].shape
        if any(side > 1 for side in kernel):
            raise ValueError(
                f"similarity: the head {weight} is a convolution over {kernel}. Expected heads that "
                f"see one place: choose the task yourself, begin(..., init_from=0)."
            )
        own[weight] = torch.eye(size).to(own[weight]).reshape(size, size, *kernel)
        if bias is not None:
            own[bias] = own[bias].new_zeros(size)
    params, buffers = {**state.params, **own}, take(state.task_buffers, task)
    output, _ = call(network, network.evaluate, params, buffers, take(state.masks, task), x)
    return output_leaves(output)[0].flatten(1)


def _left_out(features: Tensor, y: Tensor) -> Tensor:
    """() mean squared error of a linear classifier on each sample, fitted to the others."""
    f = features.double()
    f = f - f.mean(0)
    kernel = f @ f.T
    kernel = kernel / kernel.diagonal().mean().clamp(min=torch.finfo(f.dtype).tiny)
    inverse = torch.linalg.inv(kernel + 1 + _RIDGE * torch.eye(len(f)).to(f))
    targets = torch.nn.functional.one_hot(y).to(f)
    residuals: Tensor = (inverse @ targets) / inverse.diagonal()[:, None]
    return residuals.square().sum(1).mean()
