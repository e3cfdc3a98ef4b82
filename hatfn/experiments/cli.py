"""The command line: ``hatfn run``, ``trace``, ``bench`` and ``reproduce``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

EXTRA = "pip install 'hatfn[run]'"
"""How to install the packages that only the commands need."""

Command = Callable[..., object]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the ``hatfn`` command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(version("hatfn"))
        return
    try:
        config = parse(arguments)
        # Importing PyTorch takes seconds, and --help does not need it.
        from hatfn.experiments.commands import execute  # noqa: PLC0415
    except ModuleNotFoundError as error:
        sys.exit(f"hatfn: {error}. The commands need more packages than the library: {EXTRA}.")
    execute(config)


def parse(arguments: Sequence[str]) -> Any:
    """The settings of the command that is called."""
    import tyro  # noqa: PLC0415

    from hatfn.experiments.config import BenchConfig, ReproduceConfig, TraceConfig  # noqa: PLC0415
    from hatfn.experiments.run.config import RunConfig  # noqa: PLC0415

    commands: dict[str, Command] = {
        "run": RunConfig,
        "trace": TraceConfig,
        "bench": BenchConfig,
        "reproduce": ReproduceConfig,
    }
    return tyro.extras.subcommand_cli_from_dict(commands, prog="hatfn", args=list(arguments))
