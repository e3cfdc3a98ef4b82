"""States on disk: safetensors with a header that says what the state belongs to."""

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
from hatfn.numerics.trees import Tree
from hatfn.state import HATState
from hatfn.storage.container import CheckpointError, read, read_header, write
from hatfn.wiring import Wiring, digest


def save(
    path: str | Path, state: HATState, hat: HAT | Wiring, meta: Mapping[str, Any] | None = None
) -> None:
    """Write a state to a file, all of it or nothing.

    The file is written beside its place, flushed to disk and then renamed. Masks, protection and flags
    take a bit for each entry.

    Args:
        path: of the file; its folder must exist.
        state: any state; of stacked ones one at a time.
        hat: the learner. Its wiring alone will do where there is none; then the classes are not
            written down, and the optimiser's moments are left out.
        meta: anything that JSON can hold, kept in the header.

    Raises:
        TypeError, ValueError: something else than a learner or a wiring; a state of other tasks, or
            several stacked; a ``meta`` that JSON cannot hold.
        OSError: the file could not be written; what was there is as it was.

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
    kept = state if isinstance(hat, HAT) else state._replace(opt_state=())
    write(Path(path), flatten(kept), header)


def load(
    path: str | Path, hat: HAT | Wiring, hyper: Literal["file", "learner"] | None = None
) -> HATState:
    """Read a state that was saved for this learner.

    Args:
        path: of the file.
        hat: the learner that will use it; its wiring alone will do where there is none.
        hyper: whose settings the state has (s_max, sparsity, quota, compensation, the factor lr): those
            of the "file" or of the "learner". None: those of the file, and a warning if they differ.

    Returns:
        The state, on the device of the learner's module; with a wiring alone on the CPU, and without
        the optimiser's moments.

    Raises:
        TypeError: something else than a learner or a wiring.
        CheckpointError: no such file, not a state, damaged, of another format, or of a learner with
            another wiring, other classes or other settings; of a module that computes something else,
            which can be told where PyTorch's version and the shape of the traced input are the same.

    Warns:
        HATWarning: the file holds no optimizer state of the learner's optimiser, so that it starts
            anew; its settings differ from the learner's, and ``hyper`` does not choose.
    """
    check_kind("load", "path", path, str | PathLike, "the path of a file")
    check_choice("hyper", hyper, ("file", "learner", None), "load")
    path = Path(path)
    expected = owner("state", hat, "load")
    header, leaves = read(path)
    check_owner(path, header, expected, hat if isinstance(hat, Wiring) else hat.wiring)
    moments = {name: leaves.pop(name) for name in [*leaves] if name.startswith("opt_state")}
    if not isinstance(hat, HAT):
        return _of_wiring(path, _assembled(path, leaves), hat, header)
    leaves = _without_untrained(path, leaves, hat)
    fresh = hat.init(0)
    state = restored(path, leaves, fresh._replace(opt_state=()))
    if hyper == "learner":
        state = state._replace(hyper=fresh.hyper)
    elif hyper is None:
        _warn_of_settings(path, state, fresh)
    return state._replace(opt_state=_moments(path, moments, hat, state))


def _warn_of_settings(path: Path, state: HATState, fresh: HATState) -> None:
    """Warn of the first setting that a file and the learner have otherwise."""
    for name, value in fresh.hyper.items():
        if not torch.equal(state.hyper[name], value):
            warn(
                f"load: {path} was saved with {name}={state.hyper[name].tolist()}, the learner has "
                f"{value.tolist()}. The state keeps what it was saved with: write load(..., "
                f'hyper="file") if that is meant, or hyper="learner".'
            )
            return


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` that a state was saved with; the state itself is not read.

    Raises:
        CheckpointError: no such file, not a state, of another format, or its header is damaged.
    """
    header = read_header(Path(path))
    if not isinstance(header.get("meta"), dict):
        raise CheckpointError(f"load: {path} holds {header.get('kind')!r}. Expected 'state'.")
    return dict(header["meta"])


def owner(kind: str, hat: HAT | Wiring, where: str) -> dict[str, Any]:
    """What a header says of the learner that a file belongs to; a wiring alone has no classes."""
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
            f"(by another activation, stride or number of heads, say). Build the learner of the module "
            f"that it was saved for."
        )
    if {"classes"} <= header.keys() & expected.keys() and header["classes"] != expected["classes"]:
        raise CheckpointError(
            f"load: {path} belongs to a learner with classes={header['classes']}, the given one has "
            f"{expected['classes']}. Build it with the classes of the file."
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
    """Whether two wirings' ``computed`` tell modules apart: what a file says may be anything."""
    if ours is None or not isinstance(theirs, list) or len(theirs) != len(ours):
        return False
    return bool(theirs[1] == ours[1] and theirs[0] != ours[0])


def flatten(state: HATState) -> dict[str, Tensor]:
    """Every leaf of a state under its name: "params/0.weight", "learned", "opt_state[0].mu[1]"."""
    flat: dict[str, Tensor] = {}
    for field, value in state._asdict().items():
        if field == "opt_state":
            flat |= _named_opt_state(value)
        elif isinstance(value, dict):
            flat |= {f"{field}/{name}": leaf for name, leaf in value.items()}
        else:
            flat[field] = value
    return flat


def restored(path: Path, leaves: Mapping[str, Tensor], template: HATState) -> HATState:
    """The state of these leaves, each on the device of the template's.

    Args:
        path: of the file, for errors.
        leaves: as :func:`flatten` named them.
        template: a state of the very structure, shapes and dtypes.

    Raises:
        CheckpointError: a leaf is missing, left over, or of another shape or dtype.
    """
    if misfit := _misfit(leaves, flatten(template)):
        raise CheckpointError(
            f"load: {path} does not fit the learner: {misfit}. Build it with the settings that the "
            f"file was saved under."
        )
    own = {
        name: leaves[name].to(leaf.device)
        for name, leaf in flatten(template._replace(opt_state=())).items()
    }
    return _assembled(path, own)._replace(opt_state=_filled(template.opt_state, leaves))


def _misfit(leaves: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first leaf that is not as expected, in words."""
    if odd := sorted(leaves.keys() ^ expected.keys()):
        return f"{odd[0]} is {'not expected' if odd[0] in leaves else 'missing'}"
    for name, leaf in expected.items():
        got, right = ((tuple(x.shape), x.dtype) for x in (leaves[name], leaf))
        if got != right:
            return f"{name} is {got[0]} of {got[1]}, expected {right[0]} of {right[1]}"
    return None


def _moments(path: Path, moments: Mapping[str, Tensor], hat: HAT, state: HATState) -> Tree:
    """The optimiser's moments, of as many tasks as were opened together last."""
    misfits = []
    for fresh in possible_opt_states(hat.optimizer, state):
        if moments.keys() != (expected := _named_opt_state(fresh)).keys():
            warn(
                f"load: {path} holds no moments of this optimiser, so that they start anew. Build the "
                f"learner with the optimiser that the state was saved under to keep them."
            )
            return fresh
        if not (misfit := _misfit(moments, expected)):
            return _filled(fresh, moments)
        misfits.append(misfit)
    raise CheckpointError(
        f"load: {path} does not fit the learner: {misfits[0]}. Build it with the settings that the "
        f"file was saved under."
    )


def _named_opt_state(opt_state: Tree) -> dict[str, Tensor]:
    """Names with the fields on the way: moments of one optimiser are not taken for another's."""
    names = [f"opt_state{accessor.codify('')}" for accessor in optree.tree_accessors(opt_state)]
    return dict(zip(names, optree.tree_leaves(opt_state), strict=True))


def _filled(opt_state: Tree, leaves: Mapping[str, Tensor]) -> Tree:
    """Moments of the same structure and on the same devices, with the numbers of other leaves."""
    own = [leaves[name].to(leaf.device) for name, leaf in _named_opt_state(opt_state).items()]
    return optree.tree_unflatten(optree.tree_structure(opt_state), own)


def _assembled(path: Path, leaves: Mapping[str, Tensor]) -> HATState:
    """A state by the names of its leaves alone, without moments."""
    hints = {name: hint for name, hint in get_type_hints(HATState).items() if name != "opt_state"}
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
    return HATState(**fields, opt_state=())


def _without_untrained(path: Path, leaves: Mapping[str, Tensor], hat: HAT) -> dict[str, Tensor]:
    """The leaves without the untrained weights that versions before 0.2 wrote into a state."""
    kept = dict(leaves)
    for name, value in hat.network.untrained.items():
        kept.pop(f"protection/{name}", None)
        for field in ("params", "task_params"):
            old = kept.pop(f"{field}/{name}", value)
            if not torch.equal(old.to(value.device).expand_as(old), value.expand_as(old)):
                raise CheckpointError(
                    f"load: {path} belongs to a learner with other untrained weights: {name}."
                )
    return kept


def _of_wiring(path: Path, state: HATState, wiring: Wiring, header: Mapping[str, Any]) -> HATState:
    """The state, if its names and shapes are those that a wiring knows; heads may be of any width."""
    if wiring.gated and header.get("wiring") == wiring.gated.fingerprint:
        wiring = wiring.gated
    heads = {name for head in wiring.heads for name in head} or {"head.weight", "head.bias"}
    untrained = header.get("untrained")
    elsewhere = heads | {*(untrained if isinstance(untrained, dict) else ())}
    shapes = {name: role.shape for name, role in wiring.params.items() if name not in elsewhere}
    shared = {n: s for n, s in shapes.items() if wiring.params[n].kind in ("shared", "unread")}
    units = {group: (*state.learned.shape, count) for group, count in wiring.groups.items()}
    expected = {
        "params": shared,
        "protection": shared,
        "embeddings": units,
        "masks": units,
        "task_params": {name: shape for name, shape in shapes.items() if name not in shared},
    }
    for field, wanted in expected.items():
        own = _shapes(getattr(state, field))
        if field == "task_params":
            own = {name: shape[1:] for name, shape in own.items()}
        if {name: shape for name, shape in own.items() if name not in heads} != wanted:
            raise CheckpointError(f"load: {path} does not fit the wiring: its {field} are others.")
    if state.task_buffers.keys() != {*wiring.buffers}:
        raise CheckpointError(f"load: {path} does not fit the wiring: its task_buffers are others.")
    return state


def _shapes(tree: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in tree.items()}
