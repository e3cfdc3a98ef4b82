"""How the defaults of `hatfn run` were chosen: one setting changed at a time, on validation images.

    python examples/sweep.py

trains every setting below on split and on permuted digits (a quarter of an hour to an hour on two
cores) and writes the table examples/sweep.md. The test images take no part: tasks are trained on the
training images and judged by the validation images.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hatfn import HATWarning
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.loop import learn, start

BASE = RunConfig(
    epochs=20, lr=3e-3, s_max=100.0, schedule="linear", period="epoch", init="normal", sparsity=0.75,
    evaluate_on="validation",
)  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {},
    {"s_max": 30.0}, {"s_max": 50.0}, {"s_max": 200.0}, {"s_max": 400.0},
    {"period": "task"}, {"schedule": "cosine"}, {"schedule": "exponential"},
    {"init": "sparse"}, {"init": "dense"},
    {"sparsity": 0.1}, {"sparsity": 0.3}, {"sparsity": 1.5}, {"sparsity": 3.0},
]  # fmt: skip
STREAMS = ("split-digits", "permuted-digits")
SEEDS = (0,)


def train(config: RunConfig) -> dict[str, float]:
    """One run; what it kept and what it left free."""
    torch.set_num_threads(1)  # the processes share the cores
    warnings.simplefilter("ignore", HATWarning)
    run = start(config)
    for _ in learn(run):
        pass
    return {"acc": run.result.acc, "free": run.result.free_weights[-1], "drift": run.result.max_drift}


def main() -> None:
    jobs = [
        (", ".join(f"{k}={v}" for k, v in change.items()) or "base", stream, seed, change)
        for seed in SEEDS
        for change in CHANGES
        for stream in STREAMS
    ]
    configs = [replace(BASE, stream=stream, seed=seed, **change) for _, stream, seed, change in jobs]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        for (setting, stream, _, _), result in zip(jobs, pool.map(train, configs), strict=True):
            rows.append({"setting": setting, "stream": stream, **result})
            if stream == STREAMS[-1]:
                write(pd.DataFrame(rows))
    print(Path(__file__).with_suffix(".md").read_text())


def write(rows: pd.DataFrame) -> None:
    """The table so far: a sweep that is interrupted keeps what it has measured."""
    groups = rows.groupby(["setting", "stream"], sort=False)
    table, seeds = groups.mean().unstack(), groups.size().unstack()
    lines = [
        "# Settings on validation images, one changed at a time",
        "",
        f"base: {BASE.optimizer} lr={BASE.lr}, {BASE.epochs} epochs, s_max={BASE.s_max}, "
        f"{BASE.schedule} per {BASE.period}, init={BASE.init}, sparsity={BASE.sparsity}",
        "",
        "| setting | split ACC | permuted ACC | split free | permuted free | drift | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, row in table.iterrows():
        acc = " | ".join(f"{row['acc'][stream]:.4f}" for stream in STREAMS)
        free = " | ".join(f"{row['free'][stream]:.2f}" for stream in STREAMS)
        lines.append(
            f"| {setting} | {acc} | {free} | {row['drift'].max()} | {seeds.loc[setting].min()} |"
        )
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
