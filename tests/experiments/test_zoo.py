"""Models of other libraries: a table of their wirings, and one shown in full."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from hatfn.experiments import cli, rows
from hatfn.experiments.config import ZooName
from hatfn.experiments.zoo import libraries as zoo
from hatfn.tracing import trace


def keep(monkeypatch: pytest.MonkeyPatch, name: str, *models: str, **changes: str) -> None:
    """Let a library of the zoo have these models alone."""
    library = zoo.LIBRARIES[name]
    kept = {model: library.models[model] for model in models}
    monkeypatch.setitem(zoo.LIBRARIES, name, library._replace(models=kept, **changes))


def test_the_command_line_knows_every_library() -> None:
    assert {*get_args(ZooName)} == {"all", *zoo.LIBRARIES}


def test_every_library_has_models_of_different_names() -> None:
    assert zoo.LIBRARIES.keys() >= {"torchvision", "transformers"}
    assert sum(len(library.models) for library in zoo.LIBRARIES.values()) >= 100


def test_hatfn_trace_zoo_makes_a_verified_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    keep(monkeypatch, "torchvision", "squeezenet1_1")
    keep(monkeypatch, "transformers", "ResNet", "Bert")
    # In this process: others would not see the shorter lists.
    monkeypatch.setattr(
        zoo, "sweep", lambda row, chosen, verify, _: (row(*names, verify) for names in chosen)
    )
    out = tmp_path / "zoo.md"
    cli.main(["trace", "--zoo", "torchvision", "transformers", "--verify", "--out", str(out)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Traced: 3 of 3. Passed the perturbation test: 3" in shown
    assert "At least 95 % of the parameters shared: 3." in shown
    page = out.read_text()
    assert "Made by `hatfn trace --zoo torchvision transformers --verify --out examples/zoo.md`" in page
    assert "| torchvision | squeezenet1_1 | 64 px |" in page
    assert page.count("| passed") == 3


def test_hatfn_trace_shows_a_model_of_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["trace", "squeezenet1_1", "--zoo", "torchvision"])
    shown = capsys.readouterr().out
    assert "squeezenet1_1, 64 px" in shown
    assert "heads       classifier.1.weight" in shown


@pytest.mark.parametrize("libraries", [["monai"], ["all"], ["torchvision", "monai"]])
def test_a_missing_library_is_told_by_its_pip_line(
    libraries: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, library in zoo.LIBRARIES.items():
        monkeypatch.setitem(zoo.LIBRARIES, name, library._replace(package="torch"))
    monai = zoo.LIBRARIES["monai"]
    monkeypatch.setitem(zoo.LIBRARIES, "monai", monai._replace(package="nosuch", project="monai"))
    with pytest.raises(SystemExit):
        cli.main(["trace", "--zoo", *libraries])
    shown = " ".join(capsys.readouterr().out.split())
    assert "monai is not installed. Write pip install monai;" in shown
    assert "pip install 'hatfn[zoo]'" in shown


def test_an_unknown_model_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["trace", "nosuch", "--zoo", "torchcrepe", "torchvision"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "squeezenet1_1" in shown or "torchcrepe is not installed" in shown


def test_a_library_that_fails_names_its_error() -> None:
    def broken() -> rows.Sample:
        raise RuntimeError("no such file\nand more")

    entry = rows.examine("lib", "model", broken, verify=True)
    assert entry.error == "RuntimeError: no such file"
    assert not rows.good(entry)


class Stamped(nn.Module):
    """Most of its numbers are one vector that is added to the ungated input."""

    def __init__(self) -> None:
        super().__init__()
        self.stamp = nn.Parameter(torch.randn(1, 40))
        self.hidden, self.fc = nn.Linear(40, 2), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.hidden(x + self.stamp).relu())


def test_the_reason_names_the_largest_parameters() -> None:
    wiring = trace(Stamped(), torch.randn(2, 40))
    assert rows.reason(wiring) == (
        "a copy for each task: stamp 32.8% of the parameters; "
        "a gate at one end only: hidden.weight 100.0% of the shared weights"
    )
    deep = nn.Sequential(nn.Linear(2, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 3))
    assert rows.reason(trace(deep, torch.randn(2, 2))) == ""
