"""Which task is it? Every way to infer it, on split and on permuted digits, in one table.

    python examples/task_inference.py

trains five seeds of both streams with the settings of `hatfn run` (ten minutes on two cores) and
writes the table examples/task_inference.md: how often the task, and how often the class too, is right.
"""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import tyro

from hatfn import HATWarning, classify, infer_task, infer_task_by_gradient
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.loop import learn, start

STREAMS = ("split-digits", "permuted-digits")
METHODS = ("max", "softmax", "entropy", "energy", "gradient, per sample", "gradient, per batch")
GIVEN, CHANCE = "task given", "chance"
MEASURES = ("task", "class")


def measure(job: tuple[str, int], batch: int) -> pd.DataFrame:
    """Train one seed of one stream; shares of right tasks and classes by method, means over tasks."""
    torch.set_num_threads(1)  # the processes share the cores
    warnings.simplefilter("ignore", HATWarning)
    stream, seed = job
    run = start(RunConfig(stream=stream, seed=seed))
    for _ in learn(run):
        pass
    hat, state, count = run.hat, run.state, len(run.stream)
    rows = []
    for index, task in enumerate(run.stream):
        for x, y in zip(run.prepare(task.test.x).split(batch), task.test.y.split(batch), strict=True):
            logits, right = hat.predict(state, x), torch.full_like(y, index)
            inferred = {method: infer_task(logits, method) for method in METHODS[:4]}
            for per in ("sample", "batch"):
                inferred[f"gradient, per {per}"] = infer_task_by_gradient(hat, state, x, per=per)
            for method, found in {**inferred, GIVEN: right}.items():
                hits = found == right
                classes = hits & (classify(logits, found) == y)
                pairs = torch.stack([hits, classes], 1).tolist()
                rows += [(method, index, *pair) for pair in pairs]
    of_samples = pd.DataFrame(rows, columns=["method", "index", *MEASURES])
    means = of_samples.groupby(["method", "index"]).mean().groupby("method").mean()
    means.loc[CHANCE] = [1 / count, 1 / sum(hat.classes)]
    return means.reset_index().assign(stream=stream, seed=seed)


def table(results: pd.DataFrame) -> str:
    """A row for each method, mean and standard deviation over the seeds."""
    groups = results.groupby(["method", "stream"])[list(MEASURES)]
    mean, deviation = groups.mean(), groups.std()
    lines = [
        "| method | " + " | ".join(f"{s}: {m}" for s in STREAMS for m in MEASURES) + " |",
        "|---" * (1 + len(STREAMS) * len(MEASURES)) + "|",
    ]
    for method in (*METHODS, GIVEN, CHANCE):
        cells = []
        for stream in STREAMS:
            for what in MEASURES:
                value, spread = mean.loc[method, stream][what], deviation.loc[method, stream][what]
                fixed = method == CHANCE or (method == GIVEN and what == "task")
                cells.append(f"{value:.3f}" if fixed else f"{value:.3f} ± {spread:.3f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(results: pd.DataFrame, stream: str, what: str) -> str:
    """Which method wins, and by how much: differences are taken seed by seed."""
    wide = results[results.stream == stream].pivot(index="seed", columns="method", values=what)
    ranked = wide[list(METHODS[:-1])].mean().sort_values(ascending=False, kind="stable").index
    best = [method for method in ranked if wide[method].equals(wide[ranked[0]])]
    second = next(method for method in ranked if method not in best)
    lead, batch = wide[best[0]] - wide[second], wide[METHODS[-1]] - wide[best[0]]
    tied = ", no more than its spread" if lead.mean() <= lead.std() else ""
    return (
        f"- On {stream}, {what}: judging each image alone, the best is {' and '.join(best)} with "
        f"{wide[best[0]].mean():.3f}, {lead.mean():.3f} ± {lead.std():.3f} ahead of {second}{tied}, "
        f"{wide[best[0]].mean() / wide[CHANCE].mean():.1f} times chance; the gradient per batch "
        f"differs from it by {batch.mean():+.3f} ± {batch.std():.3f}."
    )


def main(seeds: int = 5, batch: int = 32, processes: int = 2) -> None:
    """Write the table.

    Args:
        seeds: how many, from 0.
        batch: test images, all of one task, that the gradient per batch sees at once.
        processes: how many to train in.
    """
    jobs = [(stream, seed) for seed in range(seeds) for stream in reversed(STREAMS)]
    with ProcessPoolExecutor(processes) as pool:
        results = pd.concat(pool.map(partial(measure, batch=batch), jobs))
    made = " ".join(["python examples/task_inference.py", *sys.argv[1:]])
    text = [
        "# Which task is it?",
        f"Made by `{made}`: mean ± standard deviation over {seeds} seeds, on test images. task: the "
        f"share whose task is inferred; class: whose task is, and whose class within it is right; both "
        f"are means over the tasks. The gradient per batch sees {batch} images of one task at once; "
        f"every other method judges each image alone.",
        table(results),
        "\n".join(verdict(results, stream, what) for stream in STREAMS for what in MEASURES),
    ]
    Path(__file__).with_suffix(".md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    tyro.cli(main)
