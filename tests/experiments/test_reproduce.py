"""The page of results: its quick form runs, and its tables hold what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hatfn.experiments import cli, reproduce
from hatfn.experiments.reproduce import ReproduceConfig

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def test_the_quick_form_makes_the_whole_page(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.md"
    cli.main(
        ["reproduce", "--quick", "--processes", "1", "--examples", str(EXAMPLES), "--out", str(out)]
    )
    page = out.read_text()
    figures = re.findall(r"\]\((figures/.*?\.png)\)", page)
    assert len(figures) == 6, "all but the table of methods"
    for figure in figures:
        assert (out.parent / figure).read_bytes().startswith(b"\x89PNG")
    for name, chapter in reproduce.CHAPTERS.items():
        assert f"## {chapter.title}\n" in page
        assert f"hatfn reproduce --only {name} --quick" in page
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")
        for line in page.splitlines()
        if line.startswith("| ")
    }
    assert set(reproduce.METHODS) < set(rows)
    drift = {name: float(rows[name][-1].removesuffix(" |")) for name in reproduce.METHODS}
    assert drift["HAT"] == drift["isolated"] == drift["joint"] == drift["frozen features"] == 0
    assert (
        0
        < drift["adaptive protection (AdaHAT)"]
        < drift["protection by magnitude (PackNet)"]
        < drift["finetune"]
    )
    assert "Quick form" in page
    assert page.count("Points of ACC behind `isolated`: HAT ") == 2
    assert page.count("| ACC | BWT | forgetting | FWT | rho | class-incremental | drift |") == 2


def test_without_the_scripts_it_says_where_they_are_sought(tmp_path: Path) -> None:
    config = ReproduceConfig(("importance",), quick=True, examples=tmp_path, out=tmp_path / "page.md")
    with pytest.raises(ValueError, match=r"feature_importance\.py is not there.*--examples"):
        next(reproduce.reproduce(config))


def test_one_chapter_alone(tmp_path: Path) -> None:
    settings = {"only": ("compression",), "quick": True, "out": tmp_path / "results.md"}
    (only,) = reproduce.reproduce(ReproduceConfig(**settings))
    (alone,) = reproduce.reproduce(ReproduceConfig(**settings, processes=1))
    assert only[0] == "compression"
    assert only[1].splitlines()[:-1] == alone[1].splitlines()[:-1]  # the last one tells the minutes


def test_a_chapter_made_again_replaces_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {name: f"## {chapter.title}\n\nold {name}\n" for name, chapter in reproduce.CHAPTERS.items()}
    config = ReproduceConfig(only=("sensitivity",), out=tmp_path / "results.md")
    config.page.write_text(reproduce.page(old, config))
    assert reproduce.kept(config) == old
    new = reproduce.Chapter(reproduce.CHAPTERS["sensitivity"].title, lambda _: "### new")
    monkeypatch.setitem(reproduce.CHAPTERS, "sensitivity", new)
    cli.main(["reproduce", "--only", "sensitivity", "--out", str(config.page)])
    page = config.page.read_text()
    assert [name for name in old if f"old {name}" not in page] == ["sensitivity"]
    assert page.index("old baselines") < page.index("### new") < page.index("old compression")
    assert reproduce.kept(ReproduceConfig(out=config.page)) == {}, "a whole page starts from nothing"


def test_the_quick_form_does_not_write_over_the_results() -> None:
    assert ReproduceConfig().page == Path("examples/results.md")
    assert not ReproduceConfig(quick=True).page.is_relative_to("examples")
