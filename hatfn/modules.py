"""Copies and names of modules: what hatfn needs of ``nn.Module`` beside calling it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hatfn.bits import drop
from hatfn.kinds import check_list
from hatfn.seeds import seeded
from hatfn.wiring import Head


def twin(
    module: nn.Module, training: bool | None, convert: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """A copy of the module's structure, in train or eval mode, that shares the module's tensors.

    Args:
        module: any.
        training: train or eval mode; None: every part in the mode it is in.
        convert: what to put in the place of each parameter and buffer; tied ones stay tied.
    """
    memo: dict[int, object] = {}
    for child in module.modules():
        for value in _attributes(child):
            if isinstance(value, Tensor) and not value.is_leaf:  # computed: cannot be copied
                memo[id(value)] = value.detach()
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = tensor if convert is None else convert(tensor)
    copied = copy.deepcopy(module, memo)
    # Into train mode first: there a module drops what it kept from calls in eval mode.
    return copied if training is None else copied.train().train(training)


def _attributes(module: nn.Module) -> list[Any]:
    """What a module's attributes hold, containers opened."""
    return optree.tree_leaves(list(vars(module).values()))  # type: ignore[arg-type]


def remembers(module: nn.Module, x: Tensor) -> bool:
    """Whether a call in eval mode leaves something behind, as LeViT keeps its table of biases.

    The next call, with another task's parameters, would find it.
    """
    called = twin(module, training=False)
    before = [_attributes(child) for child in called.modules()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace is no call of the user's
        called(x.clone())
    after = [_attributes(child) for child in called.modules()]
    return [[id(leaf) for leaf in leaves] for leaves in before] != [
        [id(leaf) for leaf in leaves] for leaves in after
    ]


GATE = "hatfn_gate"
"""The buffer of a skeleton's layer by which its output is gated; an empty one gates nothing."""


COLUMNS = "hatfn_columns"
"""The buffer with the places of its input that a layer reads; an empty one reads all."""

BACK = "hatfn_back"
"""The buffer with the place of each of its outputs among those that a layer makes; empty: makes all."""


def skeleton(
    module: nn.Module, training: bool, layers: Iterable[str] = (), narrow: Iterable[str] = ()
) -> nn.Module:
    """A twin without numbers: ``functional_call`` must supply every parameter and buffer.

    Args:
        module: any.
        training: train or eval mode.
        layers: paths of the layers that get one buffer more, ``GATE``, and gate what they return by it.
        narrow: paths of the layers that get two more, ``COLUMNS`` and ``BACK``, by which one with a
            smaller weight takes the same input and returns the same output.
    """

    def empty(tensor: Tensor) -> Tensor:
        hollow = torch.empty_like(tensor, device="meta")
        return (
            nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
        )

    hollow = twin(module, training, empty)
    for child in () if training else hollow.modules():  # nothing is kept there to be saved on
        for flag in RECOMPUTES:
            if getattr(child, flag, False) is True:
                setattr(child, flag, False)
    for path in layers:
        layer = hollow.get_submodule(path)
        layer.register_buffer(GATE, torch.empty(0, device="meta"))
        layer.register_forward_hook(_gated)
    for path in narrow:
        layer = hollow.get_submodule(path)
        for name in (COLUMNS, BACK):
            layer.register_buffer(name, torch.empty(0, dtype=torch.int64, device="meta"))
        layer.register_forward_pre_hook(_narrowed)
        layer.register_forward_hook(_widened, prepend=True)  # the user's hooks see what they always saw
    return hollow


_OURS = (GATE, COLUMNS, BACK)


def _gated(layer: nn.Module, _: object, output: Tensor) -> Tensor:
    gate = layer.get_buffer(GATE)
    if not gate.numel():
        return output
    if gate.dtype == torch.bool:  # a product would make an overflow in a row that is off a nan
        return drop(~gate, output)
    return output * gate.to(output.dtype)


def _narrowed(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    columns = layer.get_buffer(COLUMNS)
    return (_picked(layer, inputs[0], columns),) if columns.numel() else None


def _widened(layer: nn.Module, _: object, output: Tensor) -> Tensor:
    back = layer.get_buffer(BACK)
    return _picked(layer, output, back) if back.numel() else output


def _picked(layer: nn.Module, value: Tensor, index: Tensor) -> Tensor:
    """Some entries along the axis that the layer's weight mixes: the last, or the one before space."""
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    if weight.dim() > 2:
        return value.index_select(1 - weight.dim(), index)
    # Along the last of two axes a CPU picks ten times as fast as along the last of three.
    return value.flatten(0, -2).index_select(-1, index).reshape(*value.shape[:-1], len(index))


RECOMPUTES = ("grad_checkpointing", "gradient_checkpointing")
"""Flags by which timm's and transformers' modules know that they checkpoint activations."""


def recomputes(module: nn.Module) -> bool:
    """Whether parts of a module are computed a second time in the backward pass."""
    return any(getattr(child, flag, False) is True for child in module.modules() for flag in RECOMPUTES)


def recompute(module: nn.Module) -> None:
    """Have a module checkpoint its activations, by its own switch or by those of modules inside.

    Raises:
        ValueError: it offers none.
    """
    if not _switch_on(module) and not recomputes(module):
        raise ValueError(
            f"build: grad_checkpointing=True, but {type(module).__name__} does not offer it. Expected "
            f"a module with set_grad_checkpointing(), as most of timm's have; for others split every "
            f"batch instead: build(accumulate=4)."
        )


def _switch_on(module: nn.Module) -> bool:
    if hasattr(module, "set_grad_checkpointing"):
        try:
            module.set_grad_checkpointing(True)  # type: ignore[operator]
        except AssertionError:  # timm's way to say no
            return False
        return True
    if hasattr(module, "gradient_checkpointing_enable"):
        module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return True
    offered = [_switch_on(child) for child in module.children()]
    return any(offered)


def keeping(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A skeleton that holds numbers of its own, for what it computes again in the backward pass.

    By then ``functional_call`` has taken those it was given out again. Buffers are copies: what the
    first pass writes must neither be read nor written by the second.

    Args:
        module: from :func:`skeleton`.
        values: {name: tensor}, all its parameters and buffers, before the first pass.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    copies = {id(b): values[name].clone() for name, b in module.named_buffers()}
    return twin(module, None, lambda t: values[names[id(t)]] if id(t) in names else copies[id(t)])


def filled(hollow: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A skeleton with numbers in eval mode: a module like any other, which owes nothing to hatfn.

    Args:
        hollow: from :func:`skeleton`.
        values: {name: tensor}, all its parameters and buffers, of whatever shape; they are copied.
    """
    names = {id(t): name for name, t in (*hollow.named_parameters(), *hollow.named_buffers())}

    def real(tensor: Tensor) -> Tensor:
        name = names[id(tensor)]
        if name.rpartition(".")[2] in _OURS:
            return tensor
        value = values[name].detach().clone()
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value

    return bare(twin(hollow, False, real))


def bare(module: nn.Module) -> nn.Module:
    """The module itself, rid of what :func:`skeleton` put on its layers; other hooks stay."""
    ours = (_gated, _narrowed, _widened)
    for layer in module.modules():
        if [name for name in _OURS if layer._buffers.pop(name, None) is not None]:
            for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if hook in ours]:
                    del hooks[key]
    return module


def measuring(module: nn.Module) -> nn.Module:
    """The module with batch norms in train mode whose running statistics become those of each batch.

    Only the norms that ``train()`` puts in train mode: a module may keep some of them frozen.
    """
    training = [child.training for child in twin(module, training=True).modules()]
    for child, trains in zip(module.modules(), training, strict=True):
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats and trains:
            child.train()
            child.momentum = 1.0
    return module


def first_names(module: nn.Module) -> dict[str, str]:
    """{every name of every parameter and buffer: its first name}: tied ones have several."""
    names: dict[str, str] = {}
    for walk in (module.named_parameters, module.named_buffers):
        first = {id(tensor): name for name, tensor in walk()}
        names |= {name: first[id(tensor)] for name, tensor in walk(remove_duplicate=False)}
    return names


def changed_buffers(module: nn.Module, x: Tensor, names: dict[str, str]) -> tuple[str, ...]:
    """The buffers that training changes: norms' statistics, and whatever one step changes."""
    before = dict(module.named_buffers())
    if not before:
        return ()
    trained = twin(module, training=True)
    values = {**dict(module.named_parameters()), **{n: b.clone() for n, b in before.items()}}
    with seeded(x.device, 0), torch.no_grad():
        functional_call(trained, values, (x.clone(),), strict=True)
    changed = {name for name in before if not torch.equal(values[name], before[name])}
    for path, child in trained.named_modules(remove_duplicate=False):
        if isinstance(child, nn.modules.batchnorm._NormBase) and child.training:
            changed |= {names[f"{path}.{name}".lstrip(".")] for name, _ in child.named_buffers()}
    return tuple(name for name in before if name in changed)


def find_heads(module: nn.Module, head: str | tuple[str, ...] | None) -> list[Head]:
    """The parameters of the classifier's layers.

    Args:
        module: any.
        head: names of the layers; None asks timm's ``get_classifier``, and finds none where there is
            none.

    Raises:
        TypeError: ``head`` is no name.
        ValueError: a name that the module does not have, or that is no layer whose first dimension
            counts classes.
    """
    modules = dict(module.named_modules())
    if head is not None and not isinstance(head, str):
        check_list("trace", "head", head, 'names of layers: "fc", or ("head", "head_dist")')
    named = [head] if isinstance(head, str) else head
    layers = _classifiers(module) if named is None else list(named)
    for name in layers:
        if not _is_head(modules.get(name)):
            known = [other for other, child in modules.items() if _is_head(child)]
            raise ValueError(
                f"trace: head={name!r} names no linear or (ungrouped) convolution layer of "
                f"{type(module).__name__}. Expected one of its own, such as {known[-1:]}."
            )
    first = first_names(module)
    return [
        Head(first[f"{name}.weight".lstrip(".")], first.get(f"{name}.bias".lstrip(".")))
        for name in layers
    ]


def _classifiers(module: nn.Module) -> list[str]:
    """The layers behind timm's ``get_classifier``, looked for in tuples, lists and wrappers.

    And the layers called "...head" that are as wide: VOLO's second classifier is in no list.
    """
    if not hasattr(module, "get_classifier"):
        return []
    found = module.get_classifier()  # type: ignore[operator]
    several = isinstance(found, tuple | list | nn.ModuleList)
    wanted = [child for child in (found if several else [found]) if isinstance(child, nn.Module)]
    classes = getattr(module, "num_classes", None)
    inside = {id(layer) for child in wanted for layer in child.modules()}
    return [
        name
        for name, layer in module.named_modules()
        if _is_head(layer)
        and (
            any(layer is child for child in wanted)
            or (len(layer.weight) == classes and (id(layer) in inside or name.endswith("head")))
        )
    ]


def _is_head(module: nn.Module | None) -> bool:
    """Whether the weight is a parameter whose rows are classes."""
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return "weight" in module._parameters and getattr(module, "groups", 1) == 1
