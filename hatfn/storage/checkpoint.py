"""States on disk: safetensors files with a header that identifies the learner of a state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_type_hints

import optree
import torch
from torch import Tensor

from hatfn.checks.calls import check_state
from hatfn.checks.capacity import warn
from hatfn.checks.settings import check_choice
from hatfn.checks.values import check_kind
from hatfn.engine.optimizer import possible_opt_states
from hatfn.learner import HAT
from hatfn.numerics.digests import digest
from hatfn.numerics.trees import Tree
from hatfn.spec import Spec
from hatfn.state import HATState
from hatfn.storage.container import CheckpointError, read, read_header, write
from hatfn.wiring import Wiring


def save(
    path: str | Path, state: HATState, hat: HAT | Wiring, meta: Mapping[str, Any] | None = None
) -> None:
    """Write a state to a file, completely or not at all.

    The state is written to a temporary file in the same folder, which is flushed to disk and then
    renamed. Masks, protection and flags take one bit per entry.

    Args:
        path: the path of the file; its folder must exist.
        state: any single state; save stacked states one at a time.
        hat: the learner. Without a learner its wiring is enough; the file then has neither the classes
            nor the optimizer state.
        meta: a dict that JSON can hold; it is stored in the header.

    Raises:
        TypeError, ValueError: ``hat`` is neither a learner nor a wiring; the state has other tasks, or
            is stacked; JSON cannot hold ``meta``.
        OSError: the file could not be written; a file that was there before stays unchanged.

    Example:
        >>> import tempfile, hatfn, torch, torchopt
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4), head="2")
        >>> hat = hatfn.build(net, wiring, classes=[2, 2], optimizer=torchopt.adam(1e-3))
        >>> folder = Path(tempfile.mkdtemp())
        >>> hatfn.save(folder / "state.safetensors", hat.init(0), hat, meta={"note": "untrained"})
        >>> state = hatfn.load(folder / "state.safetensors", hat)
    """
    check_kind("save", "path", path, str | PathLike, "the path of a file")
    check_kind("save", "meta", {} if meta is None else meta, Mapping, "a dict that JSON can hold")
    header = owner("state", hat, "save") | {"meta": dict(meta or {})}
    if isinstance(hat, HAT):
        check_state("save", state, hat.wiring, hat.tasks)
    else:
        check_state("save", state, hat)
    try:
        json.dumps(header)
    except TypeError as error:
        raise TypeError(f"save: meta={meta!r}. Expected a dict that JSON can hold: {error}.") from error
    stored = state if isinstance(hat, HAT) else state._replace(opt_state=())
    write(Path(path), flatten(stored), header)


def load(
    path: str | Path, hat: HAT | Wiring, hyper: Literal["file", "learner"] | None = None
) -> HATState:
    """Read a state that was saved for this learner.

    Args:
        path: the path of the file.
        hat: the learner that will use the state; without a learner its wiring is enough.
        hyper: the settings of the state (s_max, sparsity, quota, compensation, the factor lr): "file"
            takes those of the file, "learner" those of the learner. None takes those of the file, and
            warns if they differ.

    Returns:
        The state, on the device of the learner's module. With a wiring alone it is on the CPU and has
        no optimizer state.

    Raises:
        TypeError: ``hat`` is neither a learner nor a wiring.
        CheckpointError: the file does not exist, is not a state, is damaged, or has another format; or
            it belongs to a learner with another wiring, other classes or other settings, or to a module
            that computes something else. The last is noticed only if PyTorch's version and the shape of
            the traced input are the same.

    Warns:
        HATWarning: the file has no optimizer state for the learner's optimizer, so it starts anew; the
            settings of the file differ from the learner's, and ``hyper`` is None.
    """
    check_kind("load", "path", path, str | PathLike, "the path of a file")
    check_choice("hyper", hyper, ("file", "learner", None), "load")
    path = Path(path)
    expected = owner("state", hat, "load")
    header, leaves = read(path)
    check_owner(path, header, expected, hat if isinstance(hat, Wiring) else hat.wiring)
    opt_leaves = {name: leaves.pop(name) for name in [*leaves] if name.startswith("opt_state")}
    if not isinstance(hat, HAT):
        state = _of_wiring(path, _assembled(path, leaves), hat, header)
        locked = state.locked[:, None]
        return state._replace(used={g: (mask & locked).any(0) for g, mask in state.masks.items()})
    leaves = _without_untrained(path, leaves, hat)
    fresh = hat.init(0)
    state = restored(path, leaves, fresh._replace(opt_state=()), hat)
    if hyper == "learner":
        state = state._replace(hyper=fresh.hyper)
    elif hyper is None:
        _warn_of_settings(path, state, fresh)
    return state._replace(opt_state=_restored_opt_state(path, opt_leaves, hat, state))


def _warn_of_settings(path: Path, state: HATState, fresh: HATState) -> None:
    """Warn of the first setting that differs between a file and the learner."""
    for name, value in fresh.hyper.items():
        if not torch.equal(state.hyper[name], value):
            warn(
                f"load: {path} was saved with {name}={state.hyper[name].tolist()}, the learner has "
                f"{value.tolist()}. The state keeps the settings of the file: write load(..., "
                f'hyper="file") if this is right, else hyper="learner".'
            )
            return


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` that a state was saved with; the state itself is not read.

    Raises:
        CheckpointError: the file does not exist, is not a state or has another format, or its header is
            damaged.
    """
    header = read_header(Path(path))
    if not isinstance(header.get("meta"), dict):
        raise CheckpointError(f"load: {path} holds {header.get('kind')!r}. Expected 'state'.")
    return dict(header["meta"])


def owner(kind: str, hat: HAT | Wiring, where: str) -> dict[str, Any]:
    """The part of a header that identifies the learner of a file; a wiring alone has no classes."""
    if not isinstance(hat, HAT | Wiring):
        raise TypeError(
            f"{where}: hat is a {type(hat).__name__}. Expected the learner that build() made, or its "
            f"wiring."
        )
    wiring = hat if isinstance(hat, Wiring) else hat.wiring
    computed = None if wiring.computed is None else list(wiring.computed)
    known = {"kind": kind, "wiring": wiring.fingerprint, "computed": computed}
    if isinstance(hat, Wiring):
        return known
    classes = None if hat.classes is None else list(hat.classes)
    untrained = {name: digest(value) for name, value in hat.network.untrained.items()}
    return known | {"classes": classes, "untrained": untrained}


def check_owner(
    path: Path, header: Mapping[str, Any], expected: Mapping[str, Any], wiring: Wiring
) -> None:
    """Refuse a file of another kind or of another learner; see :func:`owner`."""
    if header.get("kind") != expected["kind"]:
        raise CheckpointError(
            f"load: {path} holds {header.get('kind')!r}. Expected {expected['kind']!r}."
        )
    theirs = header.get("wiring")
    if wiring.ungated and theirs == wiring.ungated:
        raise CheckpointError(
            f"load: {path} belongs to a learner whose last features have no gates, as was the default "
            f"before version 0.2. Trace its module so: hatfn.trace(module, x, output_gate=False)."
        )
    if theirs != expected["wiring"] and not (wiring.gated and theirs == wiring.gated.fingerprint):
        raise CheckpointError(
            f"load: {path} belongs to another wiring ({str(theirs)[:12]}...) than the "
            f"given one ({expected['wiring'][:12]}...). Trace the module that it was saved for, with "
            f"the same head, input_gate and output_gate."
        )
    if _computes_otherwise(header.get("computed"), expected["computed"]):
        raise CheckpointError(
            f"load: {path} belongs to a module with the same parameters that computes something else "
            f"(another activation, stride or number of heads, for example). Build the learner of the "
            f"module that it was saved for."
        )
    if {"classes"} <= header.keys() & expected.keys() and header["classes"] != expected["classes"]:
        raise CheckpointError(
            f"load: {path} belongs to a learner with classes={header['classes']}, the given one has "
            f"{expected['classes']}. Build the learner with the classes of the file."
        )
    if {"untrained"} <= header.keys() & expected.keys():
        mine, own = expected["untrained"], header["untrained"]
        odd = [name for name in {**mine, **own} if mine.get(name) != own.get(name)]
        if odd:
            raise CheckpointError(
                f"load: {path} belongs to a learner with other untrained weights: {odd[0]}. No state "
                f"holds weights with requires_grad=False. Build the learner of the module, or adopt "
                f"the module, that it was saved for."
            )


def _computes_otherwise(theirs: Any, ours: list[str] | None) -> bool:
    """Whether ``computed`` of two wirings shows that their modules differ.

    Args:
        theirs: from a file, so it may be anything.
        ours: of the given wiring.
    """
    if ours is None or not isinstance(theirs, list) or len(theirs) != len(ours):
        return False
    return bool(theirs[1] == ours[1] and theirs[0] != ours[0])


def flatten(state: HATState) -> dict[str, Tensor]:
    """Every leaf of a state under its name: "params/0.weight", "learned", "opt_state[0].mu[1]".

    The cumulative mask is left out, because it follows from the others.
    """
    flat: dict[str, Tensor] = {}
    for field, value in state._asdict().items():
        if field == "used":
            continue
        if field == "opt_state":
            flat |= _named_opt_state(value)
        elif isinstance(value, dict):
            flat |= {f"{field}/{name}": leaf for name, leaf in value.items()}
        else:
            flat[field] = value
    return flat


def restored(path: Path, leaves: Mapping[str, Tensor], template: HATState, spec: Spec) -> HATState:
    """The state with these leaves, each on the device of the template's leaf.

    Args:
        path: the path of the file, for messages.
        leaves: {name: tensor}, named as :func:`flatten` does.
        template: a state with the same structure, shapes and dtypes.
        spec: the settings of the learner.

    Raises:
        CheckpointError: a leaf is missing, left over, or of another shape or dtype.
    """
    if misfit := _misfit(leaves, flatten(template)):
        raise CheckpointError(
            f"load: {path} does not fit the learner: {misfit}. Build the learner with the settings "
            f"that the file was saved with."
        )
    placed = {
        name: leaves[name].to(leaf.device)
        for name, leaf in flatten(template._replace(opt_state=())).items()
    }
    state = _assembled(path, placed)
    return state._replace(used=spec.used(state), opt_state=_filled(template.opt_state, leaves))


def _misfit(leaves: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first leaf that is not as expected, in words; None if all are."""
    if odd := sorted(leaves.keys() ^ expected.keys()):
        return f"{odd[0]} is {'not expected' if odd[0] in leaves else 'missing'}"
    for name, leaf in expected.items():
        got, right = ((tuple(x.shape), x.dtype) for x in (leaves[name], leaf))
        if got != right:
            return f"{name} is {got[0]} of {got[1]}, expected {right[0]} of {right[1]}"
    return None


def _restored_opt_state(path: Path, leaves: Mapping[str, Tensor], hat: HAT, state: HATState) -> Tree:
    """The optimizer state with these leaves, for the tasks that were opened together last."""
    misfits = []
    for fresh in possible_opt_states(hat.optimizer, state):
        if leaves.keys() != (expected := _named_opt_state(fresh)).keys():
            warn(
                f"load: {path} has no optimizer state of this optimizer, so it starts anew. To keep "
                f"the saved one, build the learner with the optimizer that the state was saved with."
            )
            return fresh
        if not (misfit := _misfit(leaves, expected)):
            return _filled(fresh, leaves)
        misfits.append(misfit)
    raise CheckpointError(
        f"load: {path} does not fit the learner: {misfits[0]}. Build the learner with the settings "
        f"that the file was saved with."
    )


def _named_opt_state(opt_state: Tree) -> dict[str, Tensor]:
    """The leaves of an optimizer state by name.

    A name contains all fields on the path to its leaf, so the state of one optimizer is not taken for
    that of another.
    """
    names = [f"opt_state{accessor.codify('')}" for accessor in optree.tree_accessors(opt_state)]
    return dict(zip(names, optree.tree_leaves(opt_state), strict=True))


def _filled(opt_state: Tree, leaves: Mapping[str, Tensor]) -> Tree:
    """An optimizer state of the same structure and on the same devices, with the given leaves."""
    placed = [leaves[name].to(leaf.device) for name, leaf in _named_opt_state(opt_state).items()]
    return optree.tree_unflatten(optree.tree_structure(opt_state), placed)


def _assembled(path: Path, leaves: Mapping[str, Tensor]) -> HATState:
    """A state that follows from the names of its leaves alone, without optimizer state."""
    derived = ("used", "opt_state")
    hints = {name: hint for name, hint in get_type_hints(HATState).items() if name not in derived}
    fields: dict[str, Any] = {name: {} for name, hint in hints.items() if hint != Tensor}
    for key, leaf in leaves.items():
        field, slash, name = key.partition("/")
        if field not in hints or bool(slash) != (hints[field] != Tensor):
            raise CheckpointError(f"load: {path} is not a state: {key!r} is no part of one.")
        if slash:
            fields[field][name] = leaf
        else:
            fields[field] = leaf
    if missing := sorted(hints.keys() - fields.keys()):
        raise CheckpointError(f"load: {path} is not a whole state: {', '.join(missing)} is missing.")
    return HATState(**fields, used={}, opt_state=())


def _without_untrained(path: Path, leaves: Mapping[str, Tensor], hat: HAT) -> dict[str, Tensor]:
    """The leaves without the untrained weights that versions before 0.2 wrote into a state."""
    kept = dict(leaves)
    for name, value in hat.network.untrained.items():
        kept.pop(f"protection/{name}", None)
        for field in ("params", "task_params"):
            old = kept.pop(f"{field}/{name}", value)
            if not torch.equal(old.to(value.device).expand_as(old), value.expand_as(old)):
                raise CheckpointError(
                    f"load: {path} belongs to a learner with other untrained weights: {name}. Build "
                    f"the learner of the module, or adopt the module, that the file was saved for."
                )
    return kept


def _of_wiring(path: Path, state: HATState, wiring: Wiring, header: Mapping[str, Any]) -> HATState:
    """The state, after a check of its names and shapes against a wiring; heads may have any width."""
    if wiring.gated and header.get("wiring") == wiring.gated.fingerprint:
        wiring = wiring.gated
    heads = {name for head in wiring.heads for name in head} or {"head.weight", "head.bias"}
    untrained = header.get("untrained")
    elsewhere = heads | {*(untrained if isinstance(untrained, dict) else ())}
    shapes = {name: role.shape for name, role in wiring.params.items() if name not in elsewhere}
    shared = {n: s for n, s in shapes.items() if wiring.params[n].kind in ("shared", "unread")}
    units = {group: (*state.learned.shape, count) for group, count in wiring.groups.items()}
    found = {
        field: _shapes(getattr(state, field))
        for field in ("params", "protection", "embeddings", "masks")
    }
    found["task_params"] = {name: shape[1:] for name, shape in _shapes(state.task_params).items()}
    expected = {
        "params": shared,
        "protection": shared,
        "embeddings": units,
        "masks": units,
        "task_params": {name: shape for name, shape in shapes.items() if name not in shared},
    }
    for field, wanted in expected.items():
        got = {name: shape for name, shape in found[field].items() if name not in heads}
        if got != wanted:
            raise CheckpointError(
                f"load: {path} does not fit the wiring: it has other {field}. Expected those of the "
                f"wiring: trace the module that the file was saved for."
            )
    if state.task_buffers.keys() != {*wiring.buffers}:
        raise CheckpointError(
            f"load: {path} does not fit the wiring: it has other task_buffers. Expected those of the "
            f"wiring: trace the module that the file was saved for."
        )
    return state


def _shapes(tree: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in tree.items()}
