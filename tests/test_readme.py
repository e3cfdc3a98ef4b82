"""What the README says is true: its code runs, its commands are CI's, its map is of this code."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from suites import SUITES, suites_of
from test_layout import storey

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_blocks_of_code_run() -> None:
    quickstart, own_arrays = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(quickstart.splitlines()) <= 18
    names: dict = {}
    exec(compile(quickstart, "README.md", "exec"), names)
    logits, stream = names["logits"], names["stream"]
    assert logits.shape == (5, len(stream[0].test.x), 2)
    right = logits[0].argmax(-1) == stream[0].test.y
    assert right.double().mean() > 0.95
    assert names["state"].learned.all()
    assert torch.isfinite(logits).all()
    assert repr(names["state"]) in README
    exec(compile(own_arrays, "README.md", "exec"), names)
    state, hat, x = names["state"], names["hat"], names["x"]
    assert torch.equal(hat.forward(hat.begin(state, 1), x, 0), names["before"])
    assert 0 <= names["accuracies"][0] <= 1


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_ci_runs_the_command_of_the_readme() -> None:
    run, test = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)[:2]
    assert run.endswith("hatfn run")
    assert test.endswith("pytest -n 2 --cov")
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_map_names_every_package_in_the_order_of_its_storey() -> None:
    rows = re.findall(r"^\| `hatfn/(\w+)(?:/|\.py)`", README, re.MULTILINE)
    there = {path.stem for path in (ROOT / "hatfn").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert sorted(rows) == sorted(there - {"__main__", "__pycache__", "public"})
    levels = [storey(f"hatfn.{name}") for name in rows if name != "__init__"]
    assert levels == sorted(levels)


def test_links_lead_to_files_and_sections() -> None:
    for target, section in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", README):
        path = ROOT / target
        assert path.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert section in slugs, f"{target}#{section}"


def test_every_test_file_is_of_one_suite() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert len(suites_of(str(path.relative_to(ROOT)))) == 1, path
    for suite in SUITES.values():
        for place in suite.places:
            assert (ROOT / "tests" / place).exists(), place
