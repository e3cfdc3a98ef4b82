"""Calling the module with gated parameters: the only ``functional_call`` of the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import optree
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from hatfn.batching import UNBATCHED, batchable, batched
from hatfn.checks import explained
from hatfn.kinds import read
from hatfn.modules import (
    BACK,
    COLUMNS,
    GATE,
    first_names,
    keeping,
    measuring,
    recompute,
    recomputes,
    skeleton,
    twin,
)
from hatfn.skipping import NOTHING, Skippable, Skips, find_skippable, skipped
from hatfn.state import HATState, take
from hatfn.wiring import Units, Wiring

Output = Any
"""What a module returns: a tensor, or a tuple or dict of tensors."""


class Network(NamedTuple):
    """The static half of a learner: what no task changes.

    Attributes:
        train: the module's structure in train mode, without numbers.
        evaluate: the same in eval mode.
        calibrate: the same in eval mode, but batch norms take the statistics of each batch.
        wiring: which units gate which parameters.
        outputs: {path of a layer: units that can gate what it returns in the place of its parameters}.
        skippable: {path of a layer: where units lie along its weight}, in eval mode.
        initial: {name: tensor}, the module's own parameters and buffers.
        constants: {name: tensor}, the buffers that training does not change.
        classes: classes of each task; None: the module's output as it is.
        heads: names of the heads' parameters, which lead with the classes.
        added: whether the head is a linear layer put behind the module.
        frozen: names of the parameters that the module does not train (``requires_grad=False``).
        precision: of the module's arithmetic under ``torch.autocast``; None: that of its numbers.
        recomputes: whether the module checkpoints activations in train mode.
        tied: whether a parameter or buffer has several names; looking for them costs each call.
    """

    train: nn.Module
    evaluate: nn.Module
    calibrate: nn.Module
    wiring: Wiring
    outputs: dict[str, Units]
    skippable: dict[str, Skippable]
    initial: dict[str, Tensor]
    constants: dict[str, Tensor]
    classes: tuple[int, ...] | None
    heads: tuple[str, ...]
    added: bool
    frozen: frozenset[str]
    precision: torch.dtype | None
    recomputes: bool
    tied: bool


def make_network(
    module: nn.Module,
    wiring: Wiring,
    classes: Sequence[int] | None,
    precision: torch.dtype | None = None,
    grad_checkpointing: bool = False,
) -> Network:
    """Take from a module what calling it needs; the module itself is neither changed nor kept."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    initial = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    buffers = [name for name, _ in module.named_buffers()]
    device = next((tensor.device for tensor in initial.values()), torch.device("cpu"))
    own = tuple(name for head in wiring.heads for name in head if name is not None)
    train = skeleton(module, True, wiring.outputs)
    skippable = find_skippable(module, wiring, device)
    if grad_checkpointing:
        recompute(train)
    return Network(
        train,
        skeleton(module, False, wiring.outputs, skippable),
        measuring(skeleton(module, False, wiring.outputs)),
        wiring.to(device),
        {path: units.to(device) for path, units in wiring.outputs.items()},
        skippable,
        initial,
        {name: initial[name] for name in buffers if name not in wiring.buffers},
        None if classes is None else tuple(classes),
        own or ("head.weight", "head.bias"),
        added=not own,
        frozen=frozenset(n for n, p in module.named_parameters() if not p.requires_grad) - {*own},
        precision=precision,
        recomputes=grad_checkpointing or recomputes(train),
        tied=any(name != first for name, first in first_names(module).items()),
    )


def call(
    network: Network,
    module: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    gates: Mapping[str, Tensor] | None,
    x: Tensor,
    one_weight: bool = False,
    skips: Skips = NOTHING,
) -> tuple[Output, dict[str, Tensor]]:
    """The module's output under gates, and the running statistics that it leaves.

    A unit is gated by multiplying what a layer returns, or the weights and the bias that produce it,
    or the affine of the norm behind them: a (W x + b) = (a W) x + a b. Of the first two, whichever
    has fewer numbers.

    Args:
        network: the static half.
        module: its structure in the mode that is wanted: one of the network's three.
        params: {name: tensor}, all of the module's parameters and the heads' that were added.
        buffers: {name: tensor}, the running statistics.
        gates: {group: (U,)}, soft or bool; None: no gates.
        x: (B, ...).
        one_weight: gate what layers return however large: under ``vmap`` many gates share one weight.
        skips: for the network's ``evaluate`` under the same gates: what :func:`~hatfn.skipping.skipped`
            gives for this task.

    Returns:
        output (B, ...), and the new running statistics.
    """
    wiring, handed = network.wiring, skips.values
    values, outputs = dict(params), dict[str, Tensor]()
    if gates is not None:
        look = wiring.lookup(gates)
        outputs = _gated_outputs(network, params, look, x, one_weight, skips)
        ungated = {*outputs, *skips.bare}
        done = {*handed, *(name for path in ungated for name in wiring.layers[path].params)}
        for name, role in wiring.params.items():
            out = role.out if role.gated and name not in done else None
            for units in (out, role.into if role.folded else None):
                if units is not None:
                    values[name] = values[name] * look(units).to(values[name].dtype)
        if wiring.input is not None:
            x = x * look(wiring.input).to(x.dtype)
    head = (
        {name: values.pop(name) for name in network.heads} if network.added and network.classes else {}
    )
    # A module may write into the very tensors it is given: running statistics, an in-place ReLU.
    x, given = x.clone(), {**buffers, **network.constants}
    values |= {name: buffer.clone() for name, buffer in given.items()}
    none = x.new_empty(0)
    values |= {f"{path}.{GATE}": outputs.get(path, none) for path in network.outputs}
    if module is network.evaluate:
        every = x.new_empty(0, dtype=torch.int64)
        values |= {f"{path}.{end}": every for path in network.skippable for end in (COLUMNS, BACK)}
    values |= handed
    if network.recomputes and module is network.train:
        module = keeping(module, values)
    elif wiring.remembers:
        module = twin(module, None)
    # Casts are not kept from one call to the next: the weights are other tensors every time.
    lower = torch.autocast(x.device.type, network.precision, network.precision is not None, False)
    with explained(x, wiring), lower:
        output = functional_call(module, values, (x,), strict=True, tie_weights=network.tied)
    if head:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the module returns a {type(output).__name__}, behind which no classifier can be put. "
                f"Name those it has: trace(module, x, head=(...)), or build with classes=None."
            )
        with lower:
            output = nn.functional.linear(output, head["head.weight"], head["head.bias"])
    if network.precision is not None:
        output = optree.tree_map(_full, output)
    return output, {name: values[name] for name in buffers}


def _gated_outputs(
    network: Network,
    params: Mapping[str, Tensor],
    look: Callable[[Units], Tensor],
    x: Tensor,
    one_weight: bool,
    skips: Skips,
) -> dict[str, Tensor]:
    """{path: gate} of the layers that are gated by what they return.

    Arguments as in :func:`call`; ``look`` goes from units to their gates.
    """
    chosen = {}
    for path, rows in network.outputs.items():
        layer = network.wiring.layers[path]
        fewer = len(x) * layer.size <= sum(params[name].numel() for name in layer.params)
        narrow = path in skips.bare or f"{path}.{BACK}" in skips.values
        if not narrow and (fewer or one_weight or layer.params[0] in skips.values):
            chosen[path] = look(rows)
    return chosen


def _full(output: Any) -> Any:
    """What autocast made small as a float32: losses and drift are measured in full."""
    small = isinstance(output, Tensor) and output.is_floating_point() and output.itemsize < 4
    return output.float() if small else output


def cut_heads(network: Network, own: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """A task's own parameters, its heads cut to its classes.

    Before the product, not after: a wider head changes the shape of the matrix product, and with it
    the bits of the logits.
    """
    if network.classes is None:
        return dict(own)
    return {**own, **{name: own[name][: network.classes[task]] for name in network.heads}}


def forward(
    network: Network, state: HATState, x: Tensor, task: int, gates: Mapping[str, Tensor]
) -> Output:
    """One task's output in eval mode."""
    own = cut_heads(network, take(state.task_params, task), task)
    buffers, params = take(state.task_buffers, task), {**state.params, **own}
    skips = NOTHING
    if next(iter(gates.values()), x).dtype == torch.bool:
        masks = {group: gate[None] for group, gate in gates.items()}
        every = {**state.params, **{name: leaf[None] for name, leaf in own.items()}}
        skips = _skipped(network, every, masks, x)
        skips = skips._replace(values=take(skips.values, 0))
    return call(network, network.evaluate, params, buffers, gates, x, skips=skips)[0]


def _skipped(
    network: Network, params: Mapping[str, Tensor], masks: Mapping[str, Tensor], x: Tensor
) -> Skips:
    """What layers are handed under the masks of some tasks; nothing where masks cannot be read."""
    if not network.skippable or not masks or read(next(iter(masks.values()))[0, 0]) is None:
        return NOTHING
    return skipped(network.skippable, network.wiring, params, masks, len(x))


def forward_plain(network: Network, state: HATState, x: Tensor) -> Output:
    """The module as it was, ungated, with the shared weights of the state."""
    params = {name: network.initial[name] for name in network.wiring.params} | state.params
    buffers = {name: network.initial[name] for name in network.wiring.buffers}
    plain = network._replace(added=False)  # its own output, no head behind it
    return call(plain, network.evaluate, params, buffers, None, x)[0]


def forward_mixed(
    network: Network, state: HATState, x: Tensor, tasks: Sequence[int], alpha: Float[Tensor, " T"]
) -> Output:
    """The output of a mixture of tasks in eval mode, differentiable in its weights.

    What a task has of its own, binary gates, norms, running statistics, is mixed: sum_t alpha_t v_t;
    the statistics as constants, for no batch norm has a derivative by them. Heads are not mixed: all
    give their logits of the mixture's features, one behind the other, each head's times T alpha_t.

    Heads that are mixed as well were tried, with five tasks of split and ten of permuted digits, five
    seeds each, heads that start alike, and the rule of
    :func:`~hatfn.inference.infer_task_by_gradient`. Of single images they find the task of 38 % and
    25 %, of batches of 32 of 48 % and 35 %; heads side by side of 31 % and 45 %, and of 32 % and
    82 %: they gain more where all tasks have the same classes than they lose.

    Args:
        network: the static half.
        state: any state.
        x: (B, ...).
        tasks: which T tasks.
        alpha: their weights; 1/T each is the even mixture.

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
    network: Network,
    state: HATState,
    x: Tensor,
    tasks: Tensor,
    gates: Callable[[int], Mapping[str, Tensor]],
) -> Output:
    """Each sample's output under its own task in eval mode, as wide as the widest task's.

    The loop over the tasks that occur, each on its own samples: bits depend on the shape of a batch,
    and so each sample's are those of :func:`forward` on these samples.

    Args:
        network: the static half.
        state: any state.
        x: (B, ...).
        tasks: (B,) int64, on the device of x.
        gates: of a task, {group: (U,)}.
    """
    outputs, places = [], []
    for task in tasks.unique().tolist() or [0]:  # of no samples at all, any task has the right shape
        rows = (tasks == task).nonzero().flatten()
        outputs.append(widen(network, forward(network, state, x[rows], task, gates(task)), task))
        places.append(rows)
    order = torch.cat(places).argsort()
    return optree.tree_map(lambda *parts: torch.cat(parts)[order], *outputs)


def widen(network: Network, output: Output, task: int) -> Output:
    """One task's output (B, ...) as wide as the widest's: -inf for classes it does not have."""
    if network.classes is None:
        return output
    own, widest = network.classes[task], max(network.classes)
    # In a map of classes over places, which a convolution gives, classes come first.
    heads = [network.wiring.params[name] for name in network.heads if not network.added]
    first = any(len(head.shape) > 2 for head in heads)

    def pad(logits: Tensor) -> Tensor:
        dim = 1 if first else logits.dim() - 1
        missing = [0, 0] * (logits.dim() - 1 - dim) + [0, widest - own]
        return nn.functional.pad(logits.narrow(dim, 0, own), missing, value=-torch.inf)

    return optree.tree_map(pad, output)


def predict(
    network: Network, state: HATState, x: Tensor, tasks: Sequence[int], chunk_size: int | None
) -> Output:
    """The outputs of many tasks under binary gates, (T, B, ...), in one ``vmap``.

    Classes that a task does not have are -inf.
    """
    rows = torch.as_tensor(tasks, device=x.device)
    own, buffers, masks = (
        {name: leaf[rows] for name, leaf in tree.items()}
        for tree in (state.task_params, state.task_buffers, state.masks)
    )

    skips = _skipped(network, {**state.params, **own}, masks, x)

    def one(own: dict[str, Tensor], buffers: Any, masks: Any, handed: Any) -> Output:
        params, narrow = {**state.params, **own}, skips._replace(values=handed)
        return call(network, network.evaluate, params, buffers, masks, x, True, narrow)[0]

    with batchable(x.device):
        try:
            outputs = batched(one, (0, 0, 0, 0), chunk_size)(own, buffers, masks, skips.values)
        except ValueError as error:
            if not any(words in str(error) for words in UNBATCHED):
                raise
            trees = (own, buffers, masks, skips.values)
            slices = ([take(tree, i) for tree in trees] for i in range(len(rows)))
            outputs = optree.tree_map(lambda *parts: torch.stack(parts), *(one(*s) for s in slices))
    if network.classes is None or len({*network.classes}) == 1:
        return outputs
    parts = [optree.tree_map(itemgetter(i), outputs) for i in range(len(tasks))]
    parts = [widen(network, part, task) for part, task in zip(parts, tasks, strict=True)]
    return optree.tree_map(lambda *parts: torch.stack(parts), *parts)
