"""The outputs of a module for one task, for a task of each sample, or for several or mixed tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hatfn.network.call import call, run
from hatfn.network.network import Network, Output
from hatfn.network.skipping import NOTHING, Plan, Skips, planned, skipped
from hatfn.network.together import narrowed_work, tasks_at_once
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.concrete import is_at_hand, is_concrete, reads_freely
from hatfn.numerics.trees import flatten, map_output, take, unflatten
from hatfn.numerics.vmap import batchable, batched, is_unbatchable
from hatfn.state import HATState


def cut_heads(network: Network, own: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """The parameters of a task, with heads cut to the classes of the task.

    Cutting logits instead would change their bits, because the bits of a matrix product depend on its
    shape.
    """
    if network.classes is None:
        return dict(own)
    return {**own, **{name: own[name][: network.classes[task]] for name in network.heads}}


def forward(
    network: Network, state: HATState, x: Inputs, task: int, gates: Mapping[str, Tensor]
) -> Output:
    """The output of one task in eval mode."""
    own = cut_heads(network, take(state.task_params, task), task)
    buffers, params = take(state.task_buffers, task), {**state.params, **own}
    skips = NOTHING
    if next((gate.dtype for gate in gates.values()), None) == torch.bool:
        masks = {group: gate[None] for group, gate in gates.items()}
        every = {name: leaf[None] for name, leaf in own.items()}
        many = _skipped(network, {**state.params, **every}, masks, x)
        skips = many._replace(params=take(many.params, 0), hooks=take(many.hooks, 0))
    return call(network, network.evaluate, params, buffers, gates, x, skips=skips)[0]


def _skipped(
    network: Network,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    x: Inputs,
    plan: Plan | None = None,
) -> Skips:
    """The parts that layers skip under the masks of some tasks; NOTHING if masks are not at hand."""
    if not _can_skip(network, masks):
        return NOTHING
    plan = plan or planned(network.skippable, network.wiring, masks, x.samples)
    return skipped(network.skippable, network.wiring, {**network.untrained, **params}, plan)


def _can_skip(network: Network, masks: Mapping[str, Tensor]) -> bool:
    """Whether layers can skip units, and the masks are at hand."""
    return bool(network.skippable.layers) and all(map(is_at_hand, masks.values()))


def forward_plain(network: Network, state: HATState, x: Inputs) -> Output:
    """The output of the module without gates, with the shared weights of the state."""
    values = {**network.initial, **state.params}
    params = {name: values[name] for name, _ in network.plain.named_parameters()}
    buffers = {name: values[name] for name in network.wiring.buffers}
    return run(network, network.plain, params, buffers, x)[0]


def forward_mixed(
    network: Network, state: HATState, x: Inputs, tasks: Sequence[int], alpha: Float[Tensor, " T"]
) -> Output:
    """The output of a mixture of N tasks in eval mode, differentiable in the weights of the mixture.

    The binary gates, norms and running statistics v_t of the tasks are mixed:

        v = sum_t alpha_t v_t

    Batch norms have no derivative by their statistics, so these are mixed as constants. Heads are not
    mixed: each computes logits from the mixture's features, times N alpha_t, and the logits of all
    heads are concatenated.

    Mixing the heads too finds a few more tasks on split digits (38 % against 31 % of single images)
    and far fewer on permuted ones (25 % against 45 %), measured with
    :func:`hatfn.infer_task_by_gradient` and five seeds.

    Args:
        network: the static half of the learner.
        state: any state.
        x: (B, ...).
        tasks: the N tasks.
        alpha: (N,), their weights; 1/N each is the even mixture.

    Returns:
        (B, sum of the classes of the tasks), or the mixed output if there are no heads.
    """
    rows = torch.as_tensor(tasks, device=x.device)

    def mix(leaf: Tensor, alpha: Tensor) -> Tensor:
        mixed: Tensor = torch.tensordot(alpha.to(leaf.dtype), leaf[rows], 1)
        return mixed

    gates = {group: mix(mask.to(alpha.dtype), alpha) for group, mask in state.masks.items()}
    params = {name: mix(leaf, alpha) for name, leaf in state.task_params.items()}
    buffers = {  # counts of batches play no part in eval mode
        name: mix(leaf, alpha.detach()) if leaf.is_floating_point() else leaf[tasks[0]]
        for name, leaf in state.task_buffers.items()
    }
    if network.classes is not None:
        cut = [cut_heads(network, take(state.task_params, task), task) for task in tasks]
        for name in network.heads:
            shares = (len(tasks) * alpha).to(params[name].dtype)
            parts = [share * own[name] for share, own in zip(shares, cut, strict=True)]
            params[name] = torch.cat(parts)
    return call(network, network.evaluate, {**state.params, **params}, buffers, gates, x)[0]


def forward_each(
    network: Network, x: Inputs, tasks: Tensor, output: Callable[[Inputs, int], Output]
) -> Output:
    """The output of each sample under its own task.

    A loop computes the output of each task once, on all samples of the task.

    Args:
        network: the static half of the learner.
        x: (B, ...).
        tasks: (B,) int64, the task of each sample, on the CPU.
        output: a function from inputs and a task to the output of the task.

    Returns:
        (B, classes of the widest task), -inf for classes that the sample's task lacks.
    """
    order = tasks.argsort(stable=True)
    # One message to the device, which the CPU does not wait for.
    order, back = torch.stack([order, order.argsort()]).to(x.device, non_blocking=True)
    found, counts = (ends.tolist() for ends in tasks.unique(return_counts=True))
    outputs = []
    # Without samples, any task gives the right shape.
    for task, rows in zip(found or [0], order.split(counts or [0]), strict=True):
        inputs = x.map(partial(torch.Tensor.index_select, dim=0, index=rows))
        outputs.append(widen(network, output(inputs, task), task))
    return map_output(lambda *parts: torch.cat(parts)[back], *outputs)


def only_learned(learned: Tensor, output: Output) -> Output:
    """The output; on a GPU it is nan where its task is not learned.

    On a CPU a check has refused such tasks before. A GPU is not asked, because the CPU would have to
    wait for the answer.

    Args:
        learned: bool, () or (N,), whether the task is learned.
        output: (...) or (N, ...).
    """
    if reads_freely(learned.device):
        return output

    def shown(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        flags = learned.reshape(*learned.shape, *(1,) * (value.dim() - learned.dim()))
        return torch.where(flags, value, torch.nan)

    return map_output(shown, output)


def widen(network: Network, output: Output, task: int) -> Output:
    """Pad the output of a task (B, ...) to the classes of the widest task with -inf."""
    if network.classes is None or network.classes[task] == max(network.classes):
        return output
    classes, widest = network.classes[task], max(network.classes)
    leaves, structure = flatten(output)

    def pad(logits: Tensor, dim: int) -> Tensor:
        missing = [0, 0] * (logits.dim() - 1 - dim) + [0, widest - classes]
        return nn.functional.pad(logits.narrow(dim, 0, classes), missing, value=-torch.inf)

    dims = _class_dims(network, leaves)
    padded = (leaf if dim is None else pad(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True))
    return unflatten(structure, [*padded])


def narrow(network: Network, output: Output, task: int) -> Output:
    """One task's output (B, ...) of a row of predict(), with the classes of the task alone."""
    if network.classes is None:
        return output
    count = network.classes[task]
    leaves, structure = flatten(output)
    dims = _class_dims(network, leaves)
    cut = (v if dim is None else v.narrow(dim, 0, count) for v, dim in zip(leaves, dims, strict=True))
    return unflatten(structure, [*cut])


def _class_dims(network: Network, leaves: Sequence[Tensor]) -> Sequence[int | None]:
    """For each tensor that the module returns, the dimension that counts classes."""
    if len(network.wiring.class_dims) == len(leaves):
        return network.wiring.class_dims
    # The output of a convolution has classes first, then positions.
    heads = [network.wiring.params[name] for name in network.heads]
    first = any(len(head.shape) > 2 for head in heads)
    return [1 if first else leaf.dim() - 1 for leaf in leaves]


def predict(
    network: Network, state: HATState, x: Inputs, tasks: Sequence[int], chunk_size: int | None
) -> Output:
    """The outputs of N tasks under binary gates, some tasks at a time.

    One task at a time is a loop over :func:`forward`, equal to it to the bit. Several are one ``vmap``,
    equal to rounding.

    Args:
        network: the static half of the learner.
        state: any state.
        x: (B, ...).
        tasks: the N tasks.
        chunk_size: the number of tasks to compute at a time; None:
            :func:`~hatfn.network.together.tasks_at_once` chooses it.

    Returns:
        (N, B, classes of the widest task), -inf for classes that a task lacks. On a GPU, nan for tasks
        that are not learned.
    """
    size, plan = (chunk_size, None) if chunk_size else chosen(network, state, x, tasks)
    if size == 1:
        return _looped(network, state, x, tasks)
    if size >= len(tasks):
        return _together(network, state, x, tasks, plan)
    chunks = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    parts = [_together(network, state, x, chunk) for chunk in chunks]
    return map_output(lambda *leaves: torch.cat(leaves), *parts)


def chosen(
    network: Network, state: HATState, x: Inputs, tasks: Sequence[int]
) -> tuple[int, Plan | None]:
    """The number of tasks to compute at a time, and the plan of skipping for all; None: not made."""
    if not is_concrete(state.learned):  # the axes that the transform adds are not seen
        return len(tasks), None
    given = network.work, x.samples, len(tasks), x.device
    rows, size = _rows(tasks, x.device), tasks_at_once(*given)
    masks = {group: mask[rows] for group, mask in state.masks.items()} if size > 1 else {}
    if not masks or not _can_skip(network, masks):
        return size, None
    plan = planned(network.skippable, network.wiring, masks, x.samples)
    return tasks_at_once(*given, narrowed_work(network.wiring, plan, x.samples)), plan


def _looped(network: Network, state: HATState, x: Inputs, tasks: Sequence[int]) -> Output:
    """The outputs of N tasks, (N, B, ...), one by one."""

    def one(task: int) -> Output:
        output = forward(network, state, x, task, take(state.masks, task))
        return widen(network, only_learned(state.learned[task], output), task)

    return map_output(lambda *leaves: torch.stack(leaves), *map(one, tasks))


def _together(
    network: Network, state: HATState, x: Inputs, tasks: Sequence[int], plan: Plan | None = None
) -> Output:
    """The outputs of N tasks in one ``vmap``, (N, B, ...), or in a loop if vmap cannot.

    See :func:`predict` for the arguments; ``plan`` is the plan of skipping, if it is known.
    """
    if len(tasks) == 1:
        return _looped(network, state, x, tasks)
    rows = _rows(tasks, x.device)
    own, buffers, masks = (
        {name: leaf[rows] for name, leaf in tree.items()}
        for tree in (state.task_params, state.task_buffers, state.masks)
    )
    skips = _skipped(network, {**state.params, **own}, masks, x, plan)

    def one(own: dict[str, Tensor], buffers: Any, masks: Any, smaller: Any, hooks: Any) -> Output:
        params, skip = {**state.params, **own}, Skips(smaller, hooks, skips.bare)
        return call(network, network.evaluate, params, buffers, masks, x, True, skip)[0]

    trees = (own, buffers, masks, skips.params, skips.hooks)
    try:
        with batchable(x.device):
            outputs = batched(one, (0,) * len(trees))(*trees)
    except ValueError as error:
        if not is_unbatchable(error):
            raise
        return _looped(network, state, x, tasks)
    outputs = only_learned(state.learned[rows], outputs)
    if network.classes is None or len({*network.classes}) == 1:
        return outputs
    parts = [map_output(itemgetter(i), outputs) for i in range(len(tasks))]
    parts = [widen(network, part, task) for part, task in zip(parts, tasks, strict=True)]
    return map_output(lambda *parts: torch.stack(parts), *parts)


def _rows(tasks: Sequence[int], device: torch.device) -> slice | Tensor:
    """An index of tasks: a slice, which copies nothing, or a tensor whose sending is not waited for."""
    if [*tasks] == [*range(tasks[0], tasks[0] + len(tasks))]:
        return slice(tasks[0], tasks[0] + len(tasks))
    return torch.tensor(tasks).to(device, non_blocking=True)
