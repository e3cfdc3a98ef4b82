"""States on disk: safetensors with a header that says what the state belongs to."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from hatfn.state import HATState
from hatfn.wiring import Wiring

FORMAT = 2
"""Raised whenever a reader of the older kind would read a file wrongly: 2 packs bools to bits."""


class CheckpointError(ValueError):
    """A file that is not a state, is damaged, or belongs to another wiring."""


def save(
    path: str | Path, state: HATState, wiring: Wiring, meta: Mapping[str, Any] | None = None
) -> None:
    """Write a state to a file, all of it or nothing.

    The file is written beside its place, flushed to disk and then renamed. Masks, protection and flags
    take a bit for each entry. The optimiser's moments are left out: ``begin`` makes new ones.

    Args:
        path: of the file; its folder must exist.
        state: any state.
        wiring: of the learner.
        meta: anything that JSON can hold, kept in the header.
    """
    flat = _flatten(state)
    bits = {name: list(leaf.shape) for name, leaf in flat.items() if leaf.dtype == torch.bool}
    header = {
        "format": str(FORMAT),
        "hatfn": version("hatfn"),
        "wiring": wiring.fingerprint,
        "bits": json.dumps(bits),
        "meta": json.dumps(dict(meta or {})),
    }
    # Leaves may share storage (nothing is ever changed in place), which the format does not allow.
    leaves = {n: _packed(v) if n in bits else v.contiguous().clone() for n, v in flat.items()}
    data = serialize(leaves, header)
    path = Path(path)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def load(path: str | Path, wiring: Wiring) -> HATState:
    """Read a state that was saved for this wiring.

    Args:
        path: of the file.
        wiring: of the learner that will use it.

    Returns:
        The state, on the CPU and without the optimiser's moments. Files of format 1, which hold a byte
        for each bool, load as well.

    Raises:
        CheckpointError: no such file, not a state, damaged, of a newer format or of another wiring.
    """
    header, leaves = _read(path, tensors=True)
    if not header.get("format", "").isdigit() or int(header["format"]) > FORMAT:
        raise CheckpointError(
            f"load: {path} has format {header.get('format')!r}. Expected {FORMAT} or less, as hatfn "
            f"{version('hatfn')} writes it; it was written by hatfn {header.get('hatfn', '?')}."
        )
    if header.get("wiring") != wiring.fingerprint:
        raise CheckpointError(
            f"load: {path} belongs to another wiring ({header.get('wiring', '?')[:12]}...) than the "
            f"given one ({wiring.fingerprint[:12]}...). Trace the module that it was saved for."
        )
    return _unflatten(path, _unpacked(path, header, leaves))


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` that a state was saved with.

    Raises:
        CheckpointError: no such file, or not a state.
    """
    header, _ = _read(path, tensors=False)
    return dict(json.loads(header.get("meta", "{}")))


def _read(path: str | Path, tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys() if tensors else ()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"load: {path} is not a readable state: {error}") from error


def _packed(leaf: Tensor) -> Tensor:
    """Eight bools to a byte, the first in the highest bit; zeros fill up the last byte."""
    return torch.from_numpy(np.packbits(leaf.detach().cpu().numpy().reshape(-1)))


def _unpacked(
    path: str | Path, header: Mapping[str, str], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The leaves with those that the header lists as packed restored to bools of their shapes."""
    if header["format"] == "1":
        return dict(leaves)

    def restore(name: str, shape: list[int]) -> Tensor:
        packed, count = leaves[name], math.prod(shape)
        if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
            raise ValueError(
                f"{name} holds {tuple(packed.shape)} numbers of {packed.dtype} for {count} bits"
            )
        bits = np.unpackbits(packed.numpy())
        if bits[count:].any():
            raise ValueError(f"{name} has bits set behind its {count}")
        return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)

    try:
        bits = json.loads(header["bits"])
        return {**leaves, **{name: restore(name, shape) for name, shape in bits.items()}}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"load: {path} is damaged: its packed bits are not what its header says ({error!r}). Load "
            f"another copy."
        ) from error


def _flatten(state: HATState) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for field, value in state._asdict().items():
        if isinstance(value, Tensor):
            flat[field] = value
        elif field != "opt_state":
            flat |= {f"{field}/{name}": leaf for name, leaf in value.items()}
    return flat


def _unflatten(path: str | Path, leaves: Mapping[str, Tensor]) -> HATState:
    fields: dict[str, Any] = {"opt_state": ()}
    for key, leaf in leaves.items():
        field, slash, name = key.partition("/")
        if slash:
            fields.setdefault(field, {})[name] = leaf
        else:
            fields[field] = leaf
    for field, kind in HATState.__annotations__.items():
        if field not in fields and "dict" in str(kind):
            fields[field] = {}
    if set(fields) != set(HATState._fields):
        odd = sorted(set(fields) ^ set(HATState._fields))
        raise CheckpointError(f"load: {path} is not a whole state: {', '.join(odd)} differ.")
    return HATState(**fields)
