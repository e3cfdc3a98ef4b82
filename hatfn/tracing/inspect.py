"""What a trace asks of a module beside its graph: heads, statistics, what it keeps between calls."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.func import functional_call

from hatfn.checks.values import check_list
from hatfn.network.copies import attributes, copied, first_names
from hatfn.numerics.seeds import seeded
from hatfn.tracing.inputs import Call
from hatfn.wiring import Head


def remembers(module: nn.Module, call: Call) -> bool:
    """Whether a call in eval mode leaves something behind, as LeViT keeps its table of biases.

    The next call, with another task's parameters, would find it.
    """
    called = copied(module, training=False)
    before = [attributes(child) for child in called.modules()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace is no call of the user's
        called(*call.args, **call.kwargs)
    after = [attributes(child) for child in called.modules()]
    return [[id(leaf) for leaf in leaves] for leaves in before] != [
        [id(leaf) for leaf in leaves] for leaves in after
    ]


def changed_buffers(module: nn.Module, call: Call, names: dict[str, str]) -> tuple[str, ...]:
    """The buffers that training changes: norms' statistics, and whatever one step changes."""
    before = dict(module.named_buffers())
    if not before:
        return ()
    trained = copied(module, training=True)
    values = {**dict(module.named_parameters()), **{n: b.clone() for n, b in before.items()}}
    with seeded(call.device, 0), torch.no_grad():
        functional_call(trained, values, call.args, call.kwargs, strict=True)
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
