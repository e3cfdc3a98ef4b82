"""Calling the module with gated parameters: the only ``functional_call`` of the library."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hatfn.checks import explained
from hatfn.modules import GATE, measuring, skeleton
from hatfn.state import HATState, take
from hatfn.wiring import Wiring

Output = Any
"""What a module returns: a tensor, or a tuple or dict of tensors."""


class Network(NamedTuple):
    """The static half of a learner: what no task changes.

    Attributes:
        train: the module's structure in train mode, without numbers.
        evaluate: the same in eval mode.
        calibrate: the same in eval mode, but batch norms take the statistics of each batch.
        wiring: which units gate which parameters.
        initial: {name: tensor}, the module's own parameters and buffers.
        constants: {name: tensor}, the buffers that training does not change.
        classes: classes of each task; None: the module's output as it is.
        heads: names of the heads' parameters, which lead with the classes.
        added: whether the head is a linear layer put behind the module.
        frozen: names of the parameters that the module does not train (``requires_grad=False``).
    """

    train: nn.Module
    evaluate: nn.Module
    calibrate: nn.Module
    wiring: Wiring
    initial: dict[str, Tensor]
    constants: dict[str, Tensor]
    classes: tuple[int, ...] | None
    heads: tuple[str, ...]
    added: bool
    frozen: frozenset[str]


def make_network(module: nn.Module, wiring: Wiring, classes: Sequence[int] | None) -> Network:
    """Take from a module what calling it needs; the module itself is neither changed nor kept."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    initial = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    buffers = [name for name, _ in module.named_buffers()]
    device = next((tensor.device for tensor in initial.values()), torch.device("cpu"))
    own = tuple(name for head in wiring.heads for name in head if name is not None)
    return Network(
        skeleton(module, True, wiring.layers),
        skeleton(module, False, wiring.layers),
        measuring(skeleton(module, False, wiring.layers)),
        wiring.to(device),
        initial,
        {name: initial[name] for name in buffers if name not in wiring.buffers},
        None if classes is None else tuple(classes),
        own or ("head.weight", "head.bias"),
        added=not own,
        frozen=frozenset(n for n, p in module.named_parameters() if not p.requires_grad) - {*own},
    )


def call(
    network: Network,
    module: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    gates: Mapping[str, Tensor] | None,
    x: Tensor,
    one_weight: bool = False,
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

    Returns:
        output (B, ...), and the new running statistics.
    """
    wiring = network.wiring
    values, outputs = dict(params), {path: x.new_empty(0) for path in wiring.layers}
    if gates is not None:
        look, done = wiring.lookup(gates), set[str]()
        for path, layer in wiring.layers.items():
            if one_weight or len(x) * layer.size <= sum(values[n].numel() for n in layer.params):
                outputs[path] = look(layer.units)
                done |= {*layer.params}
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
    values |= {f"{path}.{GATE}": gate for path, gate in outputs.items()}
    with explained(x, wiring):
        output = functional_call(module, values, (x,), strict=True)
    if head:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the module returns a {type(output).__name__}, behind which no classifier can be put. "
                f"Name those it has: trace(module, x, head=(...)), or build with classes=None."
            )
        output = nn.functional.linear(output, head["head.weight"], head["head.bias"])
    return output, {name: values[name] for name in buffers}


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
    buffers = take(state.task_buffers, task)
    return call(network, network.evaluate, {**state.params, **own}, buffers, gates, x)[0]


def forward_plain(network: Network, state: HATState, x: Tensor) -> Output:
    """The module as it was, ungated, with the shared weights of the state."""
    params = {name: network.initial[name] for name in network.wiring.params} | state.params
    buffers = {name: network.initial[name] for name in network.wiring.buffers}
    plain = network._replace(added=False)  # its own output, no head behind it
    return call(plain, network.evaluate, params, buffers, None, x)[0]


@contextmanager
def batchable(device: torch.device) -> Iterator[None]:
    """Keep modules off the kernels that vmap cannot batch: fused attention, for want of a rule.

    Other operators without a rule are run slice by slice, which is not worth a warning at every call.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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

    def one(own: dict[str, Tensor], buffers: dict[str, Tensor], masks: dict[str, Tensor]) -> Output:
        params = {**state.params, **own}
        return call(network, network.evaluate, params, buffers, masks, x, one_weight=True)[0]

    with batchable(x.device):
        try:
            outputs = torch.vmap(one, chunk_size=chunk_size)(own, buffers, masks)
        except ValueError as error:
            if "atching rule not implemented" not in str(error):
                raise
            # A module with an operator that vmap cannot batch, a recurrent layer: task by task.
            slices = ([take(tree, i) for tree in (own, buffers, masks)] for i in range(len(rows)))
            outputs = optree.tree_map(lambda *parts: torch.stack(parts), *(one(*s) for s in slices))
    if network.classes is None:
        return outputs
    # In a map of classes over places, which a convolution gives, classes come first.
    head = network.wiring.params.get(network.heads[0])
    first = head is not None and len(head.shape) > 2
    classes = torch.tensor([network.classes[task] for task in tasks], device=x.device)

    def pad(logits: Tensor) -> Tensor:
        dim = 2 if first else logits.dim() - 1
        valid = torch.arange(logits.shape[dim], device=x.device) < classes[:, None]
        shape = [size if d in (0, dim) else 1 for d, size in enumerate(logits.shape)]
        return torch.where(valid.reshape(shape), logits, -torch.inf)

    return optree.tree_map(pad, outputs)
