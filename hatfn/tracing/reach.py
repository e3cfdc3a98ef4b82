"""What a call of a private copy reads that is neither given to it nor its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hatfn.checks.capacity import warn
from hatfn.network.closures import reached
from hatfn.network.copies import meta_copy
from hatfn.network.hooks import hook_outputs
from hatfn.numerics.seeds import seeded
from hatfn.tracing.graph import TraceError
from hatfn.tracing.inputs import Call


class _Watch(TorchDispatchMode):
    """Notes the operands of all operators that no operator has made."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.strange: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) not in self.known:
                self.strange[id(leaf)] = leaf
        output = func(*args, **(kwargs or {}))
        made = pytree.tree_leaves(output)
        self.known.update(id(leaf) for leaf in made if isinstance(leaf, Tensor))
        return output


def watched_call(module: nn.Module, call: Call, training: bool) -> dict[str, Tensor]:
    """Call a private copy of a module as a learner does, and check every tensor that it reads.

    The copy has no numbers. ``functional_call`` gives it parameters and buffers; whatever else reaches
    an operator comes from a closure, a list, a class or a global variable.

    Args:
        module: the module to trace; it is not changed.
        call: the arguments.
        training: train or eval mode.

    Returns:
        {name: tensor}, parameters and buffers after the call.

    Raises:
        TraceError: the call reads a parameter that the copy does not register, or a tensor of the
            module itself.

    Warns:
        HATWarning: the call reads another tensor that the copy does not hold.
    """
    memo: dict[int, Any] = {}
    private = meta_copy(module, training, memo)
    hook_outputs(private)
    registered = {id(t): name for name, t in (*private.named_parameters(), *private.named_buffers())}
    own = {id(v): v for v in memo.values() if isinstance(v, Tensor) and id(v) not in registered}
    values: dict[str, Tensor] = {}
    strange: dict[int, Tensor] = {}
    for _ in range(2):  # what only one of two calls reads was made by the call itself
        values = {n: p.detach() for n, p in module.named_parameters()}
        values |= {n: b.detach().clone() for n, b in module.named_buffers()}
        args, kwargs = call.args, call.kwargs
        given = pytree.tree_leaves((args, kwargs, values))
        watch = _Watch({id(leaf) for leaf in given})
        try:
            with seeded(call.device, 0), torch.no_grad(), warnings.catch_warnings(), watch:
                warnings.simplefilter("ignore")  # the user has not called the module
                functional_call(private, values, args, kwargs, strict=True)
        finally:
            _check_registered(module, private, watch.strange, registered)
        found = {i: t for i, t in watch.strange.items() if i not in own}
        strange = {i: t for i, t in found.items() if i in strange} if strange else found
        for i, tensor in watch.strange.items():
            if i in own and isinstance(tensor, nn.Parameter):
                raise _unregistered(module, f"a parameter of shape {tuple(tensor.shape)}", private, i)
        if not strange:
            break
    _check_outside(module, strange)
    return values


def _check_registered(
    module: nn.Module, private: nn.Module, strange: Mapping[int, Tensor], registered: Mapping[int, str]
) -> None:
    """Refuse a registered tensor that is also read from elsewhere: no call can replace it there."""
    for i in strange:
        if i in registered:
            raise _unregistered(module, registered[i], private, i)


def _unregistered(module: nn.Module, what: str, private: nn.Module, tensor: int) -> TraceError:
    """The error for a tensor that is read from a place where it is not registered."""
    skipped = ("._parameters", "._buffers", "._modules")
    holders = (where for where, one in reached(private) if id(one) == tensor)
    where = next((w for w in holders if not any(s in w for s in skipped)), None)
    place = "a place outside the module" if where is None else f"self{_readable(where)}"
    return TraceError(
        f"trace: {type(module).__name__} reads {what} from {place}, where PyTorch does not register "
        f"it, so no task can have its own. Expected parameters that forward reads as attributes of "
        f"their layers: hold layers in nn.ModuleList, parameters in nn.ParameterList, and call the "
        f"layer itself."
    )


def _readable(where: str) -> str:
    """A path as a user writes it: without the dicts in which modules keep their children."""
    for name in ("_modules", "_parameters", "_buffers"):
        where = where.replace(f".{name}['", ".").replace("']", "") if f".{name}['" in where else where
    return where


def _check_outside(module: nn.Module, strange: Mapping[int, Tensor]) -> None:
    """Refuse tensors of the user's module, and warn of others that no copy holds."""
    names = {
        t.untyped_storage().data_ptr(): name
        for name, t in (*module.named_parameters(), *module.named_buffers())
        if t.numel()
    }
    kind = type(module).__name__
    for tensor in strange.values():
        name = names.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        shape = tuple(tensor.shape)
        if name is not None or tensor.requires_grad:
            what = f"a tensor of shape {shape}" if name is None else f"{name} of the module"
            raise TraceError(
                f"trace: {kind} reads {what} through its class, a global variable or something that "
                f"cannot be copied. A learner calls a copy of the module, and a later change of {what} "
                f"would change what old tasks give. Expected a module that reads its layers as its own "
                f"attributes."
            )
        warn(
            f"trace: {kind} reads a tensor of shape {shape} that no copy of it holds, such as one in a "
            f"global variable. If it changes, old tasks' outputs change. Register it: "
            f"self.register_buffer('name', tensor)."
        )
