"""The benchmark's arithmetic by a clock that is set by hand, its memory by known allocations."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import get_args

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, learner

from hatfn.experiments import cli, commands
from hatfn.experiments.bench import cases as bench_cases
from hatfn.experiments.bench import tables as bench
from hatfn.experiments.bench import timing
from hatfn.experiments.bench.cases import CASES, Case, Comparison, Seeds, Target
from hatfn.experiments.bench.many_tasks import ManyTasks
from hatfn.experiments.bench.timing import Contender, Ratio
from hatfn.experiments.config import BenchConfig, CaseName
from hatfn.models import MLP

pytestmark = [
    pytest.mark.filterwarnings("ignore::hatfn.HATWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # torchopt's adam under vmap
]

CPU = torch.device("cpu")
SMALL = {
    "mlp": Case(
        "mlp", lambda: MLP(6, 3, width=8), (6,), 4, 3, classes=3, density=0.25,
        targets={"hat.update": Target(1e9), "predict": Target(0.0)}, parts=("update", "step"),
    ),
    "seeds": Seeds(
        "seeds", (8,), features=6, replicas=2, targets={"hatfn.Replicas": Target(0.0, least=True)},
        parts=("step",),
    ),
}  # fmt: skip


class Clock:
    """Time that passes only when a contender says so."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def contender(self, name: str, seconds: float) -> Contender:
        def step() -> None:
            self.log.append(name)
            self.now += seconds

        return Contender(name, step)


def test_every_round_runs_every_contender_and_the_order_turns_round() -> None:
    clock = Clock()
    contenders = [clock.contender("a", 1.0), clock.contender("b", 3.0)]
    rounds = timing.interleaved(contenders, rounds=2, warmup=1, clock=lambda: clock.now)
    assert list(rounds) == [{"a": 1.0, "b": 3.0}] * 2
    assert clock.log == ["a", "b", "a", "b", "b", "a"]


def test_short_steps_are_repeated_until_a_round_is_long_enough() -> None:
    clock = Clock()
    contenders = [clock.contender("a", 0.001), clock.contender("b", 0.003)]
    (seconds,) = timing.interleaved(contenders, 1, shortest=0.02, clock=lambda: clock.now)
    assert seconds == pytest.approx({"a": 0.001, "b": 0.003})
    assert clock.log == ["a", "b"] * 3 + ["a"] * 5 + ["b"] * 5


def test_the_clock_is_read_when_the_device_is_done() -> None:
    clock, queued = Clock(), []

    def wait() -> None:
        clock.now += sum(queued)
        queued.clear()

    contenders = [Contender("later", lambda: queued.append(2.0))]
    rounds = timing.interleaved(contenders, 2, clock=lambda: clock.now, wait=wait)
    assert list(rounds) == [{"later": 2.0}] * 2


def test_garbage_is_not_collected_while_the_clock_runs() -> None:
    seen = []
    contender = Contender("a", lambda: seen.append(gc.isenabled()))
    list(timing.interleaved([contender], 1, clock=iter(range(100)).__next__))
    assert gc.isenabled()
    assert not any(seen)


def test_ratios_are_of_each_round() -> None:
    slow = [1.0, 1.0, 10.0, 10.0, 10.0]  # the machine is busy from the third round on
    assert timing.paired([2 * t for t in slow], slow) == Ratio(2.0, 2.0, 2.0)
    assert timing.paired([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == Ratio(3.0, 2.0, 4.0)


def test_a_row_has_the_ratio_the_right_way_round_and_judges_it() -> None:
    def row(throughput: bool, target: Target) -> bench.Row:
        contenders = [Contender("plain", lambda: None), Contender("hat", lambda: None)]
        comparison = Comparison("m", "w", "", contenders, {"hat": target}, throughput)
        rounds = iter([{"plain": 4.0, "hat": 1.0}] * 3)
        (row,) = bench.add(bench.Bench([], {}), comparison, rounds, CPU).rows
        return row

    times, throughputs = row(False, Target(0.2)), row(True, Target(4.0, least=True))
    assert (times.ratio.median, throughputs.ratio.median) == (0.25, 4.0)
    assert bench.cells(times)[3:9] == (
        "hat", "plain", "0.25 (0.25 to 0.25)", "<= 0.20", "missed", "1000.00 / 4000.00",
    )  # fmt: skip
    assert bench.cells(throughputs)[6:8] == (">= 4.00", "met")
    assert bench.verdict([times, throughputs]) == "Targets met: 1 of 2."


def test_a_target_is_judged_by_the_best_way_to_the_work() -> None:
    """Of each model, work and plain optimiser; of throughputs the largest is the best."""

    def row(name: str, ratio: float, target: Target | None, plain: str = "SGD") -> bench.Row:
        comparison = Comparison("m", "w", f"my {plain}", [], {}, plain=plain)
        return bench.Row(comparison, name, "plain", Ratio(ratio, 0, 9), target, (1, 1), (1, 1), (0, 0))

    most, least = Target(1.5), Target(4.0, least=True)
    rows = [
        row("slow", 2.0, most), row("fast", 1.2, most), row("faster", 0.1, None),
        row("other", 1.6, most, "Adam"), row("few", 3.0, least), row("many", 5.0, least),
    ]  # fmt: skip
    assert [each.measured for each in bench.best(rows)] == ["fast", "other", "many"]
    assert bench.choice(rows[1]) == ("m", "w", "SGD", "<= 1.50", "1.20", "met", "fast, my SGD")
    assert bench.verdict(rows) == "Targets met: 2 of 3."
    assert bench.BEST not in bench.sheets(bench.Bench([rows[2]], {}))


def test_peak_memory_is_of_what_is_held_at_once() -> None:
    def step() -> None:
        first = torch.zeros(1000)
        second = torch.ones(500)
        del first
        torch.cat([second, second])

    assert timing.peak_memory(Contender("", step)) == pytest.approx(6000, abs=64)


def test_peak_memory_starts_from_what_the_step_before_left() -> None:
    kept = [torch.zeros(1000)]

    def replace() -> None:
        kept[0] = torch.zeros(1000)  # old and new at once
        kept.append(torch.zeros(10))
        kept.pop()

    def refill() -> None:
        kept.clear()
        kept.append(torch.zeros(1000))

    assert timing.peak_memory(Contender("", replace)) == pytest.approx(4000, abs=64)
    assert timing.peak_memory(Contender("", refill)) == pytest.approx(0, abs=64)
    assert timing.peak_memory(Contender("", refill, kept.clear)) == pytest.approx(4000, abs=64)


def test_states_have_the_density_that_was_asked_for() -> None:
    hat = learner(ConvNet(), torch.randn(4, 1, 6, 6))
    for density, units in ((0.25, 2), (0.01, 1), (1.0, 8)):
        state = bench_cases.with_density(hat, density, seed=0)
        assert state.learned.all()
        for group, mask in state.masks.items():
            assert mask.sum(1).tolist() == [units] * 3, group
    masks = bench_cases.with_density(hat, 0.5, seed=0).masks.values()
    assert any(not torch.equal(mask[0], mask[1]) for mask in masks)


def test_every_way_to_the_logits_of_all_tasks_gives_the_same() -> None:
    comparison = list(SMALL["mlp"].comparisons(CPU))[-1]
    plain, loop, *others = (contender.step() for contender in comparison.contenders)
    assert len(plain) == len(loop) == 3
    for logits in others:
        torch.testing.assert_close(torch.stack(list(logits)), torch.stack(loop))


def test_one_vmap_trains_as_one_after_another() -> None:
    hat = learner(MLP(6, 2, width=8), torch.randn(4, 6), classes=[2, 2], optimizer=torchopt.adam(1e-3))
    states = [hat.begin(hat.init(seed, fresh=True), 0) for seed in range(3)]
    data = bench_cases.random_batches(2, (3, 4), (6,), 2, CPU)
    alone, together = (f(hat, states, data) for f in (bench_cases.one_by_one, bench_cases.batched))
    for _ in range(3):
        alone.step()
        together.step()
    singles, stacked = (
        contender.step.__closure__[contender.step.__code__.co_freevars.index(name)].cell_contents
        for contender, name in ((alone, "states"), (together, "state"))
    )
    for index, single in enumerate(singles):
        replica = optree.tree_map(lambda leaf, i=index: leaf[i], stacked)
        for name, value in single.params.items():
            assert not torch.equal(value, states[index].params[name])
            torch.testing.assert_close(replica.params[name], value, rtol=1e-5, atol=1e-6)


def test_the_command_has_every_case() -> None:
    assert set(get_args(CaseName)) == CASES.keys()
    for name, case in CASES.items():
        assert case.name == name


@pytest.mark.parametrize("compiled", [True, False])
def test_the_command_writes_its_table(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, leaves: graph)
    monkeypatch.setattr("torch.compile", lambda module: module)
    monkeypatch.setattr(commands, "CASES", SMALL)
    monkeypatch.setattr(
        commands, "interleaved", lambda contenders, rounds, wait: constant(contenders, rounds)
    )
    out, flags = tmp_path / "table.md", [] if compiled else ["--no-compiled"]
    cli.main(["bench", "--rounds", "2", "--threads", "1", "--out", str(out), *flags])
    printed, text = capsys.readouterr().out, out.read_text()
    command = (
        "hatfn bench --rounds 2 --threads 1 " + "--no-compiled " * (not compiled) + "--out table.md"
    )
    assert f"`{command}`" in text
    assert "1 thread, torch" in text
    assert str(tmp_path) not in text
    rows = [
        line for line in text.splitlines() if line.startswith("| mlp") or line.startswith("| seeds")
    ]
    ways = len(bench_cases.all_tasks(*prepared())) - 1
    optimizers = len(bench_cases.OPTIMIZERS)
    compiling = compiled * sum(pair.compiles for pair in bench_cases.OPTIMIZERS.values())
    more = 3 * compiling, 2 * compiling  # update, step, plain module; one after another, replicas
    targets = 5  # a step of SGD and one of Adam, predict; replicas of both
    assert len(rows) == targets + (2 * optimizers + 1 + ways) + 2 * optimizers + sum(more)  # and states
    for found in (
        "| mlp | train step | torchopt.adam | hat.update | plain torch | 2.00 (2.00 to 2.00) | <= 1000000000.00 | met |",
        "| mlp | train step | Adam | <= 1000000000.00 | 2.00 | met | hat.update, torchopt.adam |",
        "| mlp | evaluate all tasks |  | predict | 3 plain passes | 3.00 (3.00 to 3.00) | <= 0.00 | missed |",
        "| seeds | throughput of 2 seeds, width 8 | torchopt.adam | hatfn.Replicas | one after another | 0.50 (0.50 to 0.50) | >= 0.00 | met |",
    ):
        assert found in text
        assert all(part.strip() in printed for part in found.split("|"))
    if compiled:
        assert (
            "| torchopt.adam | hat.update, step compiled | plain torch | 5.00 (5.00 to 5.00) |" in text
        )
    assert "Targets met: 4 of 5." in text


def constant(contenders: list[Contender], rounds: int):
    for contender in contenders:
        contender.step()  # each must run
    for _ in range(rounds):
        yield {contender.name: 1.0 + i for i, contender in enumerate(contenders)}


def prepared() -> tuple:
    case = SMALL["mlp"]
    module, wiring = case.traced(CPU)
    hat, state = case.learned(module, wiring, torchopt.sgd(0.1))
    return hat, state, module.eval(), torch.randn(4, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], r"rounds=0\. Expected at least 1"),
        (["--threads", "0"], r"threads=0\. Expected at least 1"),
        (["--device", "cuda:9"], r"device='cuda:9', but torch finds no GPU"),
    ],
)
def test_settings_that_cannot_be_run(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["bench", *flags])
    assert re.search(message, capsys.readouterr().out.replace("\n", " "))


def test_the_command_in_the_file_is_the_one_that_was_given() -> None:
    config = BenchConfig(only=("mlp", "vit"), device="cuda", out=Path("some/where/table.md"))
    assert bench.command(config) == "hatfn bench --only mlp vit --device cuda --out table.md"
    assert bench.command(BenchConfig()) == "hatfn bench"


def test_many_tasks_are_compared_by_their_number() -> None:
    case = ManyTasks("tasks", (3, 6), features=6, width=8, batch=4, targets={"T = 6": Target(1.1)})
    steps, donated, opening = case.comparisons(CPU)
    for comparison in (steps, donated, opening):
        assert [contender.name for contender in comparison.contenders] == ["T = 3", "T = 6"]
        for contender in comparison.contenders:
            contender.step()
    assert (steps.targets, donated.targets) == ({}, {"T = 6": Target(1.1)})
    begun = opening.contenders[1].step()
    assert begun.learned.tolist() == [True] * 5 + [False]
    assert begun.locked.tolist() == begun.learned.tolist()


def test_page_faults_are_those_of_a_step() -> None:
    assert timing.page_faults(Contender("", lambda: None)) < 20
    assert timing.page_faults(Contender("", lambda: torch.ones(2**24))) > 10_000
