"""A file of named tensors and a JSON header, written completely or not at all, checked when read."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

FORMAT = "3"
"""The version of the file format; it changes if a reader of this version would misread new files."""

FIELDS = {"format", "hatfn", "header", "bits", "tensors"}
"""The fields in front of the tensors, without the checksum of these fields."""


class CheckpointError(ValueError):
    """A file that cannot be used: not of this library, damaged, or of another learner."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # the message quotes the file


def printable(text: str) -> str:
    """Foreign text, cut to a length, with characters escaped that a terminal may take for commands."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:2000])


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to one safetensors file.

    Bools take one bit per entry. The file has two checksums, one of the tensors and one of the fields
    in front of them, so that a reader can check the header alone.

    Args:
        path: the path of the file.
        tensors: {name: tensor} on any device; the file does not store devices.
        header: anything that JSON can hold.
    """
    bits = {name: list(leaf.shape) for name, leaf in tensors.items() if leaf.dtype == torch.bool}
    # Tensors may share storage, which the format does not allow.
    stored = {
        name: _packed(leaf) if name in bits else leaf.detach().cpu().contiguous().clone()
        for name, leaf in tensors.items()
    }
    fields = {
        "format": FORMAT,
        "hatfn": version("hatfn"),
        "header": json.dumps(header),
        "bits": json.dumps(bits),
        "tensors": _digest_of_tensors(stored),
    }
    write_atomically(path, serialize(stored, fields | {"sha256": _digest_of_fields(fields)}))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors, on the CPU.

    Raises:
        CheckpointError: the file does not exist, has another format, or is damaged.
    """
    fields, stored = _open(path, tensors=True)
    if fields["tensors"] != _digest_of_tensors(stored):
        raise _damaged(path, "its tensors do not have the checksum of its header")
    header, bits = (_read_json(path, fields[name]) for name in ("header", "bits"))
    if bare := [name for name, leaf in stored.items() if leaf.dtype == torch.bool]:
        raise _damaged(path, f"{bare[0]!r} has bools of a byte each")
    try:
        restored = {name: _unpacked(stored[name], shape) for name, shape in bits.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(path, f"the number of its bits is not that of its header ({error!r})") from error
    return header, {**stored, **restored}


def read_header(path: Path) -> dict[str, Any]:
    """The header alone; the tensors are neither read nor checked.

    Raises:
        CheckpointError: the file does not exist, has another format, or its header is damaged.
    """
    return _read_json(path, _open(path, tensors=False)[0]["header"])


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file in the same folder, flush it to disk, and rename it to ``path``.

    So ``path`` is never incomplete.

    Raises:
        OSError: the file could not be written; the class is that of the system's error.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # renaming would replace it
            raise FileExistsError(errno.EEXIST, "it is a device or a pipe")
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _flush_names(path.parent)
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}); no incomplete file was left. Expected a "
            f"folder that exists and can be written to, with room for {len(data)} bytes",
        ) from error


def _flush_names(folder: Path) -> None:
    """Flush a folder, if the system can do this, so that a new name is on the disk, too."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writes left in a folder."""
    for scratch in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        scratch.unlink(missing_ok=True)


def _open(path: Path, tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The fields in front of the tensors, checked, and the stored tensors, not yet checked."""
    try:
        with safe_open(str(path), framework="pt") as file:
            fields = file.metadata() or {}
            # The tensors that safetensors reads map the file, which others may change after the check.
            # They may also be unaligned in memory, and kernels may then round differently. So clone.
            names = file.keys() if tensors else ()
            stored = {name: file.get_tensor(name).clone() for name in names}
    except Exception as error:  # the bytes are foreign, so the parser may raise anything
        raise CheckpointError(
            f"load: {path} cannot be read: {error}. Expected a file that hatfn saved."
        ) from error
    if fields.get("format") != FORMAT:
        raise CheckpointError(
            f"load: {path} has format {fields.get('format')!r}, written by hatfn "
            f"{fields.get('hatfn', '(none)')}. Expected format {FORMAT!r}, as hatfn {version('hatfn')} "
            f"reads and writes it: use the version that wrote the file."
        )
    if fields.pop("sha256", None) != _digest_of_fields(fields) or fields.keys() != FIELDS:
        raise _damaged(path, "its header does not have its checksum")
    return fields, stored


def _read_json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise _damaged(path, f"its header is a {type(found).__name__} instead of a dict")
    return found


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"load: {path} is damaged: {why}. Use another copy.")


def _digest_of_fields(fields: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _digest_of_tensors(stored: Mapping[str, Tensor]) -> str:
    names = sorted(stored)
    shapes = [(name, str(stored[name].dtype), tuple(stored[name].shape)) for name in names]
    digest = hashlib.sha256(json.dumps(shapes).encode())
    for name in names:
        digest.update(stored[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _packed(leaf: Tensor) -> Tensor:
    """Bools packed eight to a byte, the first in the highest bit; zeros fill up the last byte."""
    return torch.from_numpy(np.packbits(leaf.detach().cpu().numpy().reshape(-1)))


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    """The bools that were packed, in the given shape."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(f"{tuple(packed.shape)} numbers of {packed.dtype} for {count} bits")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).reshape(shape)
