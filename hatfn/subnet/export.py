"""export(): a learned task as a plain module; adopt(): a learner with another module's numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hatfn.checks.batches import check_input
from hatfn.checks.calls import check_learned, check_owned, check_task
from hatfn.checks.settings import check_adopted
from hatfn.checks.values import check_learner
from hatfn.network.copies import filled
from hatfn.network.head import Headed
from hatfn.network.network import Network
from hatfn.numerics.trees import take
from hatfn.spec import Spec
from hatfn.state import HATState
from hatfn.subnet.compact import compact as compacted
from hatfn.subnet.slicing import cleared, layout, numbers, seen_input

S = TypeVar("S", bound=Spec)

_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.PReLU: ("num_parameters",),
    _ConvTransposeNd: ("in_channels", "out_channels"),
    _ConvNd: ("out_channels", "in_channels"),
    _NormBase: ("num_features",),
}
"""The attributes that hold the sizes of a layer's weight; a class before what it derives from."""

_AROUND_HEADS = {"num_classes": 0, "num_features": 1, "head_hidden_size": 1, "in_features": 1}
"""Where timm's models keep the sizes of their classifier: its classes, and the features it reads."""


def export(hat: Spec, state: HATState, task: int, compact: bool = False, x: Any = None) -> nn.Module:
    """One learned task as a plain module, its gates folded into the weights.

    It gives what ``hat.forward`` gives for the task, to rounding: it is dense, and forward leaves out
    what is off. To the bit it gives what the masked network gives, under ``torch.no_grad()`` and after
    ``module.requires_grad_(False)`` (PyTorch takes other kernels of attention with gradients, and of
    products where weights require them). It needs nothing of hatfn, and is saved, exported and trained
    on like any other. What lies in the entries that the task's gates switch off plays no part: they are
    0. Names are those of the module that was traced, but: a head that hatfn put behind it gives a
    ``Sequential`` of ``body`` and ``head``; a gate on the input, a ``torch.fx.GraphModule`` of ``mask``
    and ``body``. A network of :mod:`hatfn.models`, whose class would have to come along, becomes such
    a graph as well.

    Args:
        hat: the learner.
        state: with ``task`` learned; nothing is shared with it.
        task: which.
        compact: slice units that are off out of the parameters, as :meth:`hatfn.HAT.compact` does,
            and let layers' attributes follow; the same but for rounding. Groups that cannot be sliced
            keep their zeros; the report of ``hat.compact`` says which.
        x: (B, ...), an input to try slices on, where random numbers will not do.

    Returns:
        The module in eval mode, on the state's device. Its heads are as wide as the task, and
        parameters require a gradient where those of the module that was traced did.

    Raises:
        TypeError, ValueError: a wrong task or input; a task that was never learned.

    Example:
        >>> import hatfn, torchopt
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4), head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2, 5], optimizer=torchopt.sgd(0.1))
        >>> state = hat.consolidate(hat.init(seed=0), task=1)
        >>> hatfn.export(hat, state, task=1)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=5, bias=True)
        )
        >>> hatfn.export(hat, state, task=1, compact=True)[0]
        Linear(in_features=4, out_features=5, bias=True)
    """
    check_owned("export", hat, state)
    t = check_task("export", task, hat.tasks)
    check_learned("export", state, [t])
    inputs = None if x is None else check_input("export", x, hat.wiring)
    network = hat.network
    if compact:
        small = compacted(network, state, t, inputs)
        values, seen = {**small.params, **small.buffers}, small.seen
    else:
        raw = numbers(network, state, t)
        this = layout(network, raw, take(state.masks, t))
        values, seen = cleared(this, raw), seen_input(this)
    with torch.no_grad():
        module = filled(network.evaluate, {network.names.get(n, n): v for n, v in values.items()})
        _name_sizes(module, network, values)
        module = _without_hatfn(module)
    return (module if seen is None else _masked(module, seen)).eval()


def adopt(hat: S, module: nn.Module) -> S:
    """A learner whose initial values are those of another module of the same architecture.

    ``adopt(hat, pretrained).init(seed)`` starts from pretrained weights, norms and running statistics,
    with embeddings drawn from the seed as ever.

    Args:
        hat: the learner.
        module: its parameters and buffers have the names and shapes of the module that was traced; it
            is copied, to the learner's device and types, neither changed nor called. Heads may have
            another number of classes: those keep the learner's initial values. What is not a number
            (activations, a norm's eps) stays the learner's. What :func:`export` gave will do as well,
            if not compact; its zeros stay zeros for the next tasks, too.

    Returns:
        The learner; states come from its ``init``.

    Raises:
        TypeError, ValueError: no module, or one of another architecture; a constant buffer with other
            values than those the trace relied on.

    Example:
        >>> import hatfn, torchopt
        >>> def make(classes): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))
        >>> net, pretrained = make(2), make(1000)
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4), head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2, 5], optimizer=torchopt.sgd(0.1))
        >>> state = hatfn.adopt(hat, pretrained).init(seed=0)
        >>> torch.equal(state.params["0.weight"], pretrained[0].weight)
        True
    """
    check_learner("adopt", hat)
    network = hat.network
    own = {n: v for n, v in network.initial.items() if n in hat.wiring.params or n not in network.heads}
    given = check_adopted(module, hat.wiring, own, network.heads)
    fitting = {name: given[name].clone() for name in own if given[name].shape == own[name].shape}
    initial = network.initial | fitting
    untrained = {name: initial[name] for name in network.untrained}
    # Constants have proved to be equal.
    return replace(hat, network=network._replace(initial=initial, untrained=untrained))


def _name_sizes(module: nn.Module, network: Network, values: Mapping[str, Tensor]) -> None:
    """Let attributes say how wide layers and heads have become."""
    for layer, hollow in zip(module.modules(), network.evaluate.modules(), strict=True):
        names = next((names for kind, names in _SIZES.items() if isinstance(layer, kind)), ())
        factors = (1, layer.groups if isinstance(layer, _ConvNd) else 1)
        sizes = zip(names, _shape(hollow), _shape(layer), factors, strict=False)
        for name, before, after, factor in sizes:
            _follow(layer, name, before * factor, after * factor)
    for head in network.wiring.heads:
        befores, afters = network.wiring.params[head.weight].shape, values[head.weight].shape
        path = head.weight.split(".")[:-2]
        for depth in range(len(path) + 1):
            owner = module.get_submodule(".".join(path[:depth]))
            for name, axis in _AROUND_HEADS.items():
                _follow(owner, name, befores[axis], afters[axis])


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """Of its weight; of a norm without one, of its statistics."""
    tensors = (getattr(layer, name, None) for name in ("weight", "running_mean"))
    return next((tuple(tensor.shape) for tensor in tensors if isinstance(tensor, Tensor)), ())


def _follow(layer: nn.Module, name: str, before: int, after: int) -> None:
    """An attribute that was a size is the new one."""
    if vars(layer).get(name) == before != after:
        setattr(layer, name, after)


def _without_hatfn(module: nn.Module) -> nn.Module:
    """The module with modules of PyTorch's own in the place of hatfn's classes; names stay."""
    if isinstance(module, Headed):
        return nn.Sequential(OrderedDict(body=_without_hatfn(module.body), head=module.head))
    if type(module).__module__.partition(".")[0] == "hatfn":
        return fx.symbolic_trace(module)
    for name, child in module.named_children():
        setattr(module, name, _without_hatfn(child))
    return module


def _masked(module: nn.Module, mask: Tensor) -> nn.Module:
    """The module behind a selection of its input: what is not read may be anything, even nan."""
    root = nn.Module()
    root.register_module("body", module)
    root.register_buffer("mask", mask.clone())
    graph = fx.Graph()
    x = graph.placeholder("x")
    read = graph.call_function(torch.where, (graph.get_attr("mask"), x, 0))
    graph.output(graph.call_module("body", (read,)))
    return fx.GraphModule(root, graph)
