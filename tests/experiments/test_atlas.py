"""Traces of timm's models: shown, verified, and gathered in a table of families."""

from __future__ import annotations

import pytest

from hatfn.experiments import atlas, cli, rows
from hatfn.wiring import Measures


def test_hatfn_trace_shows_and_verifies_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["trace", "test_vit", "--verify", "--side", "64"])
    shown = capsys.readouterr().out
    for part in ("test_vit, 64 px", "patch_embed.proj", "pos_embed (1, 17, 64)", "fell back   0"):
        assert part in shown
    assert "verified    50 shared parameters; not tested: none" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "is not a timm model"),
        ([], "Write hatfn trace resnet18"),
        (["test_vit", "--side", "7"], "does not accept an image of 7 pixels"),
    ],
)
def test_hatfn_trace_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["trace", *arguments])
    assert message in capsys.readouterr().out.replace("\n", " ")


def test_the_table_of_families_tells_good_from_bad() -> None:
    measures = Measures(1.0, 0.99, 0.25, 8)
    good = rows.Entry("a", "a_1", "64 px", 10, measures, 1, untested=())
    bad = rows.Entry("b", "b_1", "64 px", 10, measures._replace(shared=0.5), 1, untested=("w",))
    broken = rows.Entry("c", "c_1", error="RuntimeError: no")
    assert [rows.good(entry) for entry in (good, bad, broken)] == [True, False, False]
    text = rows.markdown([good, bad, broken], atlas.PAGE)
    assert "Traced: 2 of 3. Passed the perturbation test: 2 (1 parameters" in text
    assert "| passed; not tested: w |" in text
    assert "- c c_1: RuntimeError: no" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.slow
def test_the_sweep_traces_the_smallest_of_a_family() -> None:
    (entry,) = atlas.entries(["starnet"], True)
    assert entry.model == "starnet_s050"
    assert rows.good(entry)
    assert entry.untested == ()
