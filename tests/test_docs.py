"""The documentation is true: its code runs, its links lead somewhere, its reference is whole."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hatfn

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
OPTIONAL = ("onnxruntime", "onnxscript")
"""What a block may import without its being installed everywhere; such a block is then left out."""


def run_page(page: Path) -> dict[str, Any]:
    """Run the blocks of Python of a page in one namespace; a text behind a block is what it prints."""
    names: dict[str, Any] = {"__name__": page.name}
    text = page.read_text()
    for found in FENCE.finditer(text):
        language, code, expected = found.groups()
        missing = [name for name in OPTIONAL if name in code and not importlib.util.find_spec(name)]
        if language != "python" or missing:
            continue
        line = text.count("\n", 0, found.start(2))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * line + code, str(page), "exec"), names)
        assert printed.getvalue() == (expected or ""), f"{page.name}, line {line + 1}"
    return names


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of the repository, strictly."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(
        command, cwd=root / "docs" / "site", capture_output=True, text=True, check=False
    )


def public_names() -> list[str]:
    """Every public name, and those of the public namespaces."""
    spaces = ("schedule", "metrics", "protection", "ranks", "testing", "models")
    inside = [f"{space}.{name}" for space in spaces for name in getattr(hatfn, space).__all__]
    return [f"hatfn.{name}" for name in (*hatfn.__all__, *inside)]


def undocumented(html: str) -> set[str]:
    """The public names that a reference does not hold."""
    return {name for name in public_names() if f'id="{name}"' not in html}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_the_site_builds_and_its_reference_is_whole(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "reference.html").read_text()
    assert undocumented(html) == set()
    assert undocumented(html.replace('id="hatfn.trace"', "")) == {"hatfn.trace"}
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"', page.read_text())
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|preload|icon)"[^>]*>', page.read_text())
        assert not [source for source in loaded if "//" in source], page


def test_a_broken_link_and_a_name_that_does_not_exist_fail(tmp_path: Path) -> None:
    for folder in ("docs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    (tmp_path / "hatfn").symlink_to(ROOT / "hatfn")
    page = tmp_path / "docs" / "concepts.md"
    broken = (
        "\n[a page](nowhere.md), [a name](reference.md#hatfn.nothing), [a section](design.md#none)\n"
    )
    page.write_text(page.read_text() + broken)
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    for target in ("nowhere.md", "hatfn.nothing", "#none"):
        assert target in done.stderr


@pytest.mark.parametrize("name", ["lesson_first_two_tasks", "lesson_two_sessions"])
def test_a_lesson_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    said = {"lesson_first_two_tasks": "drift of task 0: 0.0", "lesson_two_sessions": "equal to the bit"}
    assert said[name] in capfd.readouterr().out
