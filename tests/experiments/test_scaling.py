"""The formulas of examples/scaling.md against measurements, at sizes that take seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from nets import ConvNet, Transformer
from optimizers import OPTIMIZERS

import hatfn
from hatfn.experiments.bench import scaling
from hatfn.experiments.bench.scaling import count, count_saved
from hatfn.experiments.bench.timing import Contender, peak_memory
from hatfn.models import MLP

PAGE = Path(__file__).parents[2] / "examples" / "scaling.md"
SIZES = {
    "small": (MLP(64, 10, width=100), torch.zeros(16, 64)),
    "wide": (MLP(64, 10, width=400), torch.zeros(64, 64)),
    "many samples": (MLP(64, 10, width=100), torch.zeros(1024, 64)),
}


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
@pytest.mark.parametrize("optimizer", scaling.OPTIMIZERS)
@pytest.mark.parametrize("name", SIZES)
def test_memory_is_what_the_formulas_say(name: str, optimizer: str) -> None:
    module, x = SIZES[name]
    y, tasks = torch.zeros(len(x), dtype=torch.int64), 7
    hat = hatfn.build(module, hatfn.trace(module, x[:1]), [10] * tasks, OPTIMIZERS[optimizer]())
    size = count_saved(hat, x, y)
    held = [hat.begin(hat.init(0), 0)]

    def step() -> None:
        held[0], _ = hat.update(held[0], (x, y), 0, 50.0)

    assert size.state(tasks, optimizer) == pytest.approx(hatfn.memory(held[0]).sum(), rel=0.01)
    peak = peak_memory(Contender(name, step))
    assert size.step(tasks, len(x), optimizer) == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("module", [ConvNet(), Transformer()], ids=["norms", "transformer"])
@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_states_with_statistics_and_norms_of_their_own(module: torch.nn.Module) -> None:
    x = torch.zeros(2, 1, 6, 6) if isinstance(module, ConvNet) else torch.zeros(2, 4, 5)
    for tasks in (3, 300):
        hat = hatfn.build(module, hatfn.trace(module, x[:1]), [3] * tasks, OPTIMIZERS["adam"]())
        state = hat.begin(hat.init(0), 0)
        rest = hatfn.memory(state)["rest"]
        whole = hatfn.memory(state).sum() - rest
        assert count(hat).state(tasks, "adam") == pytest.approx(whole, rel=0.05)


def test_the_page_keeps_measurements_within_fifteen_percent() -> None:
    measured = PAGE.read_text().partition("## Measured")[2].partition("## Computed")[0]
    rows = re.findall(r"^\| \w.* \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|$", measured, re.MULTILINE)
    assert len(rows) == 15
    for state, step in rows:
        assert float(state) == pytest.approx(1, abs=0.01)
        assert float(step) == pytest.approx(1, abs=0.15)
