"""Files that strangers may leave in the place of files of runs and states."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hatfn.experiments import cli
from hatfn.experiments.run.config import RunConfig

QUICK = RunConfig(width=20, epochs=1, tasks=2, batch_size=256, save_every=0.0)


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The output of a command that refuses to go on, as one line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--resume", str(folder)])
    assert stop.value.code == 1
    return " ".join(capsys.readouterr().out.split())


DEEP = "[" * 100_000
TEXTS = {
    "deep": DEEP, "a list": "[]", "null": "null", "a number": "1", "a string": '"x"', "no JSON": "{", "a deep value": '{"a":' + DEEP,
    "digits": '{"learned": [' + "9" * 5000 + "]}",
}  # fmt: skip
