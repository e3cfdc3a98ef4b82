"""The example scripts run, on settings so small that nothing is learned, and write what they promise."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK: dict[str, dict[str, Any]] = {
    "continual_learning": {"streams": ("digits",), "epochs": 1, "tasks": 2},
    "mask_initialisation": {"trials": 2, "datasets": 1, "epochs": 2},
    "feature_importance": {"seeds": 1, "epochs": 1, "width": 8},
    "regularisation_compensation": {"size": 2, "steps": 4, "width": 8},
}
ROWS = {  # of the quick form, and of the one that is kept
    "continual_learning": (3, 17),
    "mask_initialisation": (9, 9),
    "feature_importance": (11, 11),
    "regularisation_compensation": (2, 2),
}


@pytest.mark.parametrize("name", QUICK)
def test_examples_write_their_table_and_figure(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(**QUICK[name], folder=tmp_path)
    text = (tmp_path / f"{name}.md").read_text()
    kept = (EXAMPLES / f"{name}.md").read_text()
    for made, count in zip((text, kept), ROWS[name], strict=True):
        tables = re.findall(r"(?:^\|.*\n)+", made, re.MULTILINE)
        assert sum(table.count("\n") - 2 for table in tables) == count
        for table in tables:
            assert len({row.count("|") for row in table.splitlines()}) == 1
    (figure,) = re.findall(r"\]\((figures/.*?\.png)\)", text)
    for folder in (tmp_path, EXAMPLES):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")


def test_somebody_elses_model_passes_its_own_tests() -> None:
    files = [*(EXAMPLES / "testing").glob("*.py")]
    assert sum(len(path.read_text().splitlines()) for path in files) < 120
    run = [sys.executable, "-m", "pytest", "-q", "examples/testing"]
    alone = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        run, env=alone, capture_output=True, text=True, cwd=EXAMPLES.parent, check=False
    )
    assert "4 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_to_run_them(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < 120
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(source))


def test_the_published_numbers_are_met() -> None:
    """What the kept table says: as fast as without a gate, and far slower with a normal start."""
    rows = re.findall(
        r"^\| (\w+) \| (normal|dense) \+ \w+ \| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \| (\d+) \|$",
        (EXAMPLES / "mask_initialisation.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 9
    for gates, start, published, ours, error, lost in rows:
        assert lost == "0"
        if start == "dense" or gates == "none":
            assert float(ours) == pytest.approx(float(published), rel=0.2)
        else:  # the published mean, of fewer trials, has twice the error of ours
            assert abs(float(ours) - float(published)) < 2 * 5**0.5 * float(error)
            assert float(ours) > 5 * 12.58
