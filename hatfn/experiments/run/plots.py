"""Plots of a run as PNG files; they do not use the global state of pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hatfn.experiments.run.progress import Step
from hatfn.experiments.run.result import Result


def accuracy_matrix(result: Result, path: Path) -> None:
    """Accuracy on every task after every task."""
    count = len(result.names)
    figure = Figure(figsize=(1.5 + 0.7 * count, 1.2 + 0.6 * count), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(result.accuracy_matrix, vmin=0, vmax=1, cmap="viridis")
    for (row, column), value in np.ndenumerate(result.accuracy_matrix):
        if not np.isnan(value):
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, size=8)
    axes.set(xlabel="accuracy on task", ylabel="after task", title=f"ACC {result.acc:.4f}")
    axes.set(xticks=range(count), yticks=range(count))
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)


def mask_use(result: Result, path: Path) -> None:
    """The share of each group's units that each task uses."""
    shares = result.usage.drop(columns=["free", "units"])
    height = 1.2 + 0.3 * len(shares)
    figure = Figure(figsize=(3 + 0.6 * shares.shape[1], height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.to_numpy(), vmin=0, vmax=1, cmap="magma", aspect="auto")
    axes.set(xlabel="task", title="units in use", xticks=range(shares.shape[1]))
    axes.set_yticks(range(len(shares)), list(map(str, shares.index)))
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)


def capacity(result: Result, path: Path) -> None:
    """Free capacity after each task: the share of units per group, and of shared weights."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    tasks = range(len(result.free_units))
    groups = list(result.free_units[0])
    for group in groups:
        free = [after[group] for after in result.free_units]
        axes.plot(tasks, free, alpha=0.6, label=group if len(groups) <= 8 else None)
    axes.plot(tasks, result.free_weights, "k--", label="shared weights")
    axes.set(xlabel="after task", ylabel="free", ylim=(0, 1), xticks=tasks, title="capacity")
    axes.legend()
    figure.savefig(path, dpi=120)


def training(steps: Sequence[Step], path: Path) -> None:
    """Loss and mask scale over all steps, with a line at the first step of each task."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    x = range(len(steps))
    axes.semilogy(x, [step.loss for step in steps], lw=0.6, label="loss")
    axes.set(xlabel="step", ylabel="loss")
    scales = axes.twinx()
    scales.plot(x, [step.scale for step in steps], lw=0.6, color="tab:orange", alpha=0.7)
    scales.set_ylabel("mask scale s", color="tab:orange")
    for index, step in enumerate(steps):
        if step.step == 1:
            axes.axvline(index, color="grey", lw=0.8, ls=":")
    figure.savefig(path, dpi=120)
