"""The command line answers before PyTorch is imported, and says what is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import hatfn
from hatfn.experiments import cli


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["bench", "--help"]])
def test_help_needs_no_pytorch(arguments: list[str]) -> None:
    seen = python(
        f"import sys\nfrom hatfn.experiments.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print([name for name in ('torch', 'timm', 'pandas', 'matplotlib') if name in sys.modules])"
    )
    assert "usage: hatfn" in seen
    assert seen.endswith("[]\n")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"{version('hatfn')}\n" == f"{hatfn.__version__}\n"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hatfn.experiments.commands", None)
    with pytest.raises(SystemExit, match=r"pip install 'hatfn\[run\]'"):
        cli.main(["run"])


def test_public_names_are_those_of_the_list() -> None:
    seen = python(
        "import sys, hatfn\nassert 'torch' not in sys.modules\n"
        "from hatfn.replicas import Replicas\n"  # a submodule first
        "print(callable(hatfn.build), hatfn.Replicas is Replicas, sorted(hatfn.__all__) == sorted(hatfn.public.__all__))"
    )
    assert seen == "True True True\n"
    assert {*hatfn.__all__} <= {*dir(hatfn)}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hatfn.nonsense  # noqa: B018
