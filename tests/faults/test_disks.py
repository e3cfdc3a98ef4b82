"""A disk that is full, a folder that cannot be written to: what was saved before is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from failing import failing
from nets import ConvNet, equal, learn, learner

import hatfn

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X, Y = torch.randn(8, 1, 6, 6), torch.randint(2, (8,))
HAT = learner(ConvNet(), X, optimizer=torchopt.adam(1e-2))
OPEN = HAT.begin(learn(HAT, HAT.init(0), X, 0), 1)


# A disk that is full, and a folder that cannot be written to. (Tests may run as root, whom no
# permission stops: the system's answers are made up.)


def refuse(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    """Let the system refuse one of the calls that a write consists of."""

    def no(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    class Full:
        """A file that takes half of what it is given."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            no()

    plain = Path.open

    def opened(path: Path, mode: str = "r", **how: Any) -> Any:
        if mode != "xb":
            return plain(path, mode, **how)
        return no() if where == "open" else Full(plain(path, mode))

    match where:
        case "open" | "write":
            monkeypatch.setattr(Path, "open", opened)
        case "rename":
            monkeypatch.setattr(Path, "replace", no)
        case "fsync":
            monkeypatch.setattr(os, "fsync", no)
        case "fsync of the folder":
            monkeypatch.setattr(os, "fsync", failing(os.fsync, OSError(number, os.strerror(number)), 1))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["open", "write", "fsync", "rename", "fsync of the folder"])
def test_a_failed_write_leaves_a_whole_file(
    where: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = tmp_path / "state.safetensors", HAT.consolidate(OPEN, 1, [])
    hatfn.save(path, OPEN, HAT)
    with monkeypatch.context() as patch:
        refuse(patch, where, number)
        with pytest.raises(OSError, match=f"{path.name} could not be written") as caught:
            hatfn.save(path, new, HAT)
    assert caught.value.errno == number
    for word in (os.strerror(number), "Expected a folder that exists and can be written to", "bytes"):
        assert word in str(caught.value)
    assert isinstance(caught.value, PermissionError) == (number == errno.EACCES)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    renamed = where == "fsync of the folder"
    assert equal(hatfn.load(path, HAT), new if renamed else OPEN)
    hatfn.save(path, new, HAT)
    assert equal(hatfn.load(path, HAT), new)


def test_a_state_is_not_saved_where_no_folder_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/s could not be written.*folder that exists"):
        hatfn.save(tmp_path / "nowhere" / "s", OPEN, HAT)


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """Nor is a device: a file of that name would break every other program's use of it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        FileExistsError, match=r"pipe could not be written \(it is a device or a pipe\)"
    ):
        hatfn.save(tmp_path / "pipe", OPEN, HAT)
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1
