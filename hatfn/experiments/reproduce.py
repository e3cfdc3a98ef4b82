"""``hatfn reproduce``: the tables of the papers that this machine can compute, as one page."""

from __future__ import annotations

import runpy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from hatfn.checks.capacity import HATWarning
from hatfn.evaluation.metrics import forgetting_ratio, forward_transfer
from hatfn.experiments.config import ReproduceConfig, StreamName
from hatfn.experiments.markdown import grid
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.loop import learn, start
from hatfn.experiments.run.result import Result

Runs = Mapping[str, list[Result]]
"""The results of each method, one for each seed."""

BASE = RunConfig(width=200, seeds=5, infer="end")
QUICK: dict[str, Any] = {"width": 20, "epochs": 1, "tasks": 2, "seeds": 2}

METHODS: dict[str, dict[str, Any]] = {
    "HAT": {},
    "HAT, the papers' protection": {"protection": "paper"},
    "adaptive protection (AdaHAT)": {"protection": "adaptive"},
    "protection by magnitude (PackNet)": {"protection": "magnitude"},
    "isolated": {"method": "isolated"},
    "joint": {"method": "joint"},
    "frozen features": {"method": "frozen"},
    "finetune": {"method": "finetune"},
}


class Chapter(NamedTuple):
    """A part of the page.

    Attributes:
        title: its heading.
        write: the function from the settings of the command to its text, in Markdown.
    """

    title: str
    write: Callable[[ReproduceConfig], str]


def reproduce(config: ReproduceConfig) -> Iterator[tuple[str, str]]:
    """Make the chosen chapters, and yield the name and text of each."""
    config.page.parent.mkdir(parents=True, exist_ok=True)
    for name in config.only or CHAPTERS:
        began, chapter = time.perf_counter(), CHAPTERS[name]
        text = chapter.write(config)
        minutes = (time.perf_counter() - began) / 60
        command = f"hatfn reproduce --only {name}" + " --quick" * config.quick
        yield name, f"## {chapter.title}\n\n{text}\n\n(`{command}`, {minutes:.1f} minutes)\n"


def page(chapters: Mapping[str, str], config: ReproduceConfig) -> str:
    """The whole page in Markdown."""
    head = "# Results\n\nMade by `hatfn reproduce`: means over seeds ± standard deviation."
    if config.quick:
        head += " Quick form: tiny settings, which only show that everything runs."
    return "\n\n".join([head, *(chapters[name] for name in CHAPTERS if name in chapters)])


def kept(config: ReproduceConfig) -> dict[str, str]:
    """The chapters of an existing page, which ``--only`` leaves as they are."""
    if not (config.only and config.page.exists()):
        return {}
    parts = config.page.read_text().split("\n## ")
    titled = {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts[1:]}
    return {name: titled[each.title] for name, each in CHAPTERS.items() if each.title in titled}


def _measured(config: ReproduceConfig, runs: Sequence[RunConfig]) -> list[list[Result]]:
    """The results of each run, one for each seed.

    Each run has one thread in its own process, because a small network cannot keep two cores busy.
    """
    runs = [replace(run, **QUICK) if config.quick else run for run in runs]
    if config.processes == 1:
        return [_measure(run) for run in runs]
    spawned = get_context("spawn")  # torch's threads do not survive a fork
    one_thread = partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(config.processes, spawned, initializer=one_thread) as pool:
        return list(pool.map(_measure, runs))


def _measure(config: RunConfig) -> list[Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HATWarning)  # methods without gates use every unit
        run = start(config)
        for _ in learn(run):
            pass
    return run.results


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return "-" if np.isnan(values[0]) else f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


BASELINES = """\
All methods have the same network (64 inputs, two layers of 400), optimizer, epochs and seeds. The
settings are those found for HAT, at width 1000, on validation images (sweep.md). The width was
chosen on validation images, too: on permuted digits, HAT is 1.1 points behind `isolated` at width
400, and 1.5 at width 200 (three seeds). FWT compares with `isolated`; rho (Serrà et al. 2018)
compares with `joint` and chance. In the class-incremental column, the task is inferred from the
largest logit. Drift is the largest change of a learned task's logit, over all seeds. Adaptive
protection multiplies the update of an entry on which n > 0 earlier tasks depend by r / (n + r),
with r = 0.001 / (F + 0.1), where F is the share of free entries: its drift is bounded, not zero.
Protection by magnitude protects the larger half of the weights that a task uses; the task also
reads the other half, which later tasks change.

On split digits, finetuning is only few points behind: every pair of digits has a head of its own,
and features that separate one pair also separate the next, so little needs to be forgotten. Still,
its errors are a multiple of HAT's (rho), and its logits change much (drift). Permuted digits share
nothing from one task to the next, and there finetuning forgets.

Published results on ten permutations of MNIST are 0.986 for HAT, and 0.964 for WSN with 100 hidden
units. On eight data sets, HAT forgets 45 to 80 % less than earlier methods (Serrà et al. 2018,
abstract). Those data sets are not available here. A permutation of these digits has 1,437 training
images of 64 pixels, MNIST has 60,000 of 784, and even a network for each permutation (`isolated`)
stays below 0.986 here. The run to compare with is one command (README, Data)."""


def _baselines(config: ReproduceConfig) -> str:
    """Methods on split and permuted digits, at equal width and epochs."""
    parts = [BASELINES]
    chance: dict[StreamName, float] = {"permuted-digits": 0.1, "split-digits": 0.5}  # longest first
    jobs = [(stream, name) for stream in chance for name in METHODS]
    runs = [replace(BASE, width=400, stream=stream, **METHODS[name]) for stream, name in jobs]
    measured = dict(zip(jobs, _measured(config, runs), strict=True))
    for stream, lowest in chance.items():
        here = {name: measured[stream, name] for name in METHODS}
        parts += [f"### {stream}", _table(here, lowest), _behind(here)]
    return "\n\n".join(parts)


def _behind(runs: Runs) -> str:
    """How far HAT and finetuning are behind a network per task, seed by seed."""
    isolated = [one.acc for one in runs["isolated"]]
    points = {
        name: _spread([100 * (a - one.acc) for a, one in zip(isolated, runs[name], strict=True)])
        for name in ("HAT", "finetune")
    }
    return "Points of ACC behind `isolated`: " + ", ".join(f"{n} {p}" for n, p in points.items()) + "."


def _table(runs: Runs, chance: float) -> str:
    """A row per method."""
    isolated = [np.diag(one.accuracy_matrix) for one in runs["isolated"]]
    joint = [one.accuracy_matrix[-1] for one in runs["joint"]]
    rows = {}
    for name, results in runs.items():
        # Tasks that are trained together have no order, so the diagonal of their matrix is empty.
        fwt = [
            forward_transfer(one.accuracy_matrix, reference)
            for one, reference in zip(results, isolated, strict=True)
        ]
        rho = [
            forgetting_ratio(one.accuracy_matrix[-1], np.full(len(best), chance), best)
            for one, best in zip(results, joint, strict=True)
        ]
        rows[name] = {
            "ACC": _spread([one.acc for one in results]),
            "BWT": _spread([one.bwt for one in results]),
            "forgetting": "-" if name == "joint" else _spread([one.forgetting for one in results]),
            "FWT": "-" if name == "joint" else _spread(fwt),
            "rho": _spread(rho),
            "class-incremental": _spread([one.class_acc for one in results]),
            "drift": f"{max(one.max_drift for one in results):.3g}",
        }
    return markdown(rows, "method")


def _sensitivity(config: ReproduceConfig) -> str:
    """Results for several values of s_max and of the weight of the sparsity, one changed at a time."""
    changes: list[dict[str, Any]] = [
        {"s_max": top} for top in (10.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0)
    ]
    changes += [{"sparsity": weight} for weight in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0)]
    changes = changes[:: 8 if config.quick else 1]
    measured = _measured(config, [replace(BASE, width=100, **change) for change in changes])
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = dict(zip(("s_max", "sparsity"), figure.subplots(1, 2, sharey=True), strict=True))
    rows = {}
    for change, results in zip(changes, measured, strict=True):
        for name, value in change.items():
            for one in results:
                panels[name].plot(value, one.acc, "o", color="tab:blue", alpha=0.5)
                panels[name].plot(value, 1 - one.free_weights[-1], "s", color="tab:orange", alpha=0.5)
        gates = [sum(closing.undecided for closing in one.closings) for one in results]
        rows[", ".join(f"{name} {value:g}" for name, value in change.items())] = {
            "ACC": _spread([one.acc for one in results]),
            "weights in use": _spread([1 - one.free_weights[-1] for one in results]),
            "undecided gates": f"{np.mean(gates):.0f}",
            "gap": f"{max(closing.gap for one in results for closing in one.closings):.3f}",
        }
    panels["s_max"].set(xscale="log", xlabel="s_max", title="accuracy (blue), weights in use (orange)")
    panels["sparsity"].set(xlabel="weight of the sparsity", ylim=(0, 1.02))
    return (
        "Split digits, width 100, and the other settings as above (s_max 100, sparsity 0.75). The "
        "paper calls its method robust to different choices of these settings (abstract; on eight "
        "data sets that are not available here). Undecided gates, and the gap (the largest rise of a "
        "task's training loss when its soft gates become binary), show where serving differs from "
        "training.\n\n"
        f"{markdown(rows, 'setting')}\n\n{_saved(figure, config, 'sensitivity')}"
    )


def _saved(figure: Figure, config: ReproduceConfig, name: str) -> str:
    """Save a figure, and return the line of the page that shows it."""
    folder = config.page.parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120)
    return f"![{name}](figures/{name}.png)"


def _compression(config: ReproduceConfig) -> str:
    """The share of the shared weights in use after each task."""
    streams: tuple[StreamName, ...] = ("permuted-digits", "split-digits")
    runs = [
        replace(BASE, stream=stream, sparsity=weight)
        for stream in streams
        for weight in (0.1, 0.75, 2.5)
    ]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, rows = figure.subplots(), {}
    for run, results in zip(runs, _measured(config, runs), strict=True):
        used = 1 - np.mean([one.free_weights for one in results], axis=0)
        dashes = "--" if run.stream == "split-digits" else "-"
        axes.plot(range(1, len(used) + 1), used, dashes, label=f"{run.stream}, {run.sparsity:g}")
        rows[f"{run.stream}, {run.sparsity:g}"] = {
            "ACC": _spread([one.acc for one in results]),
            "share of weights in use after each task": " ".join(f"{share:.2f}" for share in used),
        }
    axes.set(xlabel="tasks learned", ylabel="share of the shared weights in use", ylim=(0, 1))
    axes.legend(fontsize="small")
    return (
        "The share of shared weights that a learned task depends on, for several weights of the "
        "sparsity. (The paper compresses each of its data sets alone, with larger networks, so its "
        "numbers cannot be compared with these.)\n\n"
        f"{markdown(rows, 'stream, sparsity')}\n\n{_saved(figure, config, 'compression')}"
    )


def _example(name: str, **quick: Any) -> Callable[[ReproduceConfig], str]:
    """A chapter that a script of examples/ writes, together with its figure.

    Args:
        name: the name of the script.
        quick: its arguments in the quick form.
    """

    def write(config: ReproduceConfig) -> str:
        script = config.examples / f"{name}.py"
        if not script.exists():
            raise ValueError(
                f"reproduce: {script} is not there. Expected a checkout of hatfn: run there, or name "
                f"the scripts' folder with --examples."
            )
        folder = config.page.parent
        runpy.run_path(str(script))["main"](**quick if config.quick else {}, folder=folder)
        _, _, text = (folder / f"{name}.md").read_text().partition("\n\n")  # drops the script's title
        return text.strip()

    return write


def markdown(rows: Mapping[str, Mapping[str, str]], corner: str) -> str:
    """A table in Markdown, from {row: {column: cell}}."""
    head = [corner, *next(iter(rows.values()))]
    return grid([head, *([name, *cells.values()] for name, cells in rows.items())])


CHAPTERS: dict[str, Chapter] = {
    "continual": Chapter(
        "Learning tasks one after another (HAT-CL's notebook)",
        _example("continual_learning", streams=("digits",), epochs=1, tasks=2),
    ),
    "baselines": Chapter("HAT and other methods on digits", _baselines),
    "sensitivity": Chapter("Sensitivity to settings (Serrà et al. 2018, section 4.3)", _sensitivity),
    "compression": Chapter("Network compression (Serrà et al. 2018, section 4.4)", _compression),
    "initialisation": Chapter(
        "Mask initialisation and scaling (HAT-CL's notebook)",
        _example("mask_initialisation", trials=2, datasets=1, epochs=2),
    ),
    "importance": Chapter(
        "Feature importance (HAT-CL's notebook)",
        _example("feature_importance", seeds=1, epochs=1, width=8),
    ),
    "compensation": Chapter(
        "Penalty against compensation (HAT-CL's notebook)",
        _example("regularisation_compensation", size=2, steps=4, width=8),
    ),
}
