"""How gates should start and be scaled: HAT-CL's notebook "mask initialization and scaling".

    python examples/mask_initialisation.py

A linear layer with gated inputs, a gated output or both learns y = 2 x0 + 1, until its test loss is
below 0.1; then it finds which of five inputs y = x0 - 2 x2 + 3 x4 depends on, until its binary gates
are right at the end of an epoch. Average batches as published (Duan 2023, 100 trials), normal + linear
and dense + cosine: output gate 90.33, 12.53; input gate 99.40, 12.60; both 179.63, 12.43; no gate
12.58; recovery 338.5, 25.0. The trials of a setting train at once, as replicas; it takes a minute.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
import torchopt
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

import hatfn

HERE = Path(__file__).parent
S_MAX, BATCH, TRAIN, TEST = 100.0, 32, 800, 200
RECIPES = {"normal + linear": hatfn.schedule.linear, "dense + cosine": hatfn.schedule.cosine}
PUBLISHED = {
    ("none", "normal + linear"): 12.58,
    ("output", "normal + linear"): 90.33, ("output", "dense + cosine"): 12.53,
    ("input", "normal + linear"): 99.40, ("input", "dense + cosine"): 12.60,
    ("both", "normal + linear"): 179.63, ("both", "dense + cosine"): 12.43,
    ("recovery", "normal + linear"): 338.5, ("recovery", "dense + cosine"): 25.0,
}  # fmt: skip
NOTE = """Batches until done, mean ± standard error, {trials} trials on each of {datasets} data sets.
With normal + linear they differ so much that a mean over 100, as published, is uncertain by a tenth.
Settings are the notebook's: 800 + 200 samples, batch 32, sgd 0.01 with momentum 0.9, s_max and
compensation 100, a scale that runs through each epoch of 25 batches, test loss at s_max, no penalty but
in the recovery (weight 1, by group, no quota), which is judged once an epoch. Made in {seconds:.0f} s.

With dense + cosine gates are open and s is high at first: the layer learns as if it had none. With
normal + linear half of the gates start shut, and they move only while s is small, early in an epoch.

![share of trials done against batches](figures/mask_initialisation.png)
"""


def batches_needed(gates: str, recipe: str, trials: int, datasets: int, epochs: int) -> Tensor:
    """Batches until each trial is done, (datasets * trials,), nan where it never was."""
    recovery, init, scale = gates == "recovery", recipe.partition(" ")[0], RECIPES[recipe](S_MAX)
    slopes, bias = ([1.0, 0.0, -2.0, 0.0, 3.0], 0.0) if recovery else ([2.0, 0.0], 1.0)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(datasets, TRAIN + TEST, len(slopes), generator=draw).repeat_interleave(trials, 0)
    y = x @ torch.tensor(slopes)[:, None] + bias
    net, optimizer, inputs = nn.Linear(len(slopes), 1), torchopt.sgd(0.01, momentum=0.9), x[0, :1]
    gated = ("input", "output") if gates in ("both", "recovery") else (gates,)
    wiring = hatfn.trace(net, inputs, input_gate="input" in gated, output_gate="output" in gated)
    hat = hatfn.build(
        net, wiring, classes=None, optimizer=optimizer, loss=nn.functional.mse_loss, init=init,
        s_max=S_MAX, sparsity=float(recovery), regularizer=partial(hatfn.sparsity, over="groups"),
    )  # fmt: skip
    many, states = hatfn.Replicas(hat), hatfn.replicate(hat, seeds=range(len(x)))
    states = many.begin(states, 0)
    steps, replicas = TRAIN // BATCH, torch.arange(len(x))[:, None]
    needed = torch.full((len(x),), float("nan"))
    for count, step in enumerate([*range(steps)] * epochs):
        if step == 0:
            order = torch.rand(len(x), TRAIN, generator=draw).argsort(1)
        rows = order[:, step * BATCH : (step + 1) * BATCH]
        batch = (x[replicas, rows], y[replicas, rows])
        states, _ = many.update(states, batch, 0, scale(step / (steps - 1)))
        if not recovery:
            outputs = many.forward(states, x[:, TRAIN:], 0, scale=S_MAX, shared=False)
            done = (outputs - y[:, TRAIN:]).square().mean((1, 2)) < 0.1
        elif step == steps - 1:
            on = {group: e[:, 0] > 0 for group, e in states.embeddings.items()}
            right = (on.pop("input") == torch.tensor(slopes).bool()).all(-1)
            done = right & torch.cat(list(on.values()), -1).all(-1)
        else:
            continue
        needed = torch.where(done & needed.isnan(), count + 1.0, needed)
        if not needed.isnan().any():
            break
    return needed


def main(trials: int = 100, datasets: int = 4, epochs: int = 100, folder: Path = HERE) -> None:
    """Write the table and the figure.

    Args:
        trials: on each data set, each with weights and embeddings of its own.
        datasets: how many; the notebook has one.
        epochs: after which a trial is given up.
        folder: where to write mask_initialisation.md and figures/mask_initialisation.png.
    """
    start, figure = time.perf_counter(), Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines = ["| gates | start + scale | published | ours | given up |", "|---" * 5 + "|"]
    for (gates, recipe), published in PUBLISHED.items():
        needed = batches_needed(gates, recipe, trials, datasets, epochs)
        mean, lost = needed.nanmean(), int(needed.isnan().sum())
        error = ((needed - mean).square().nanmean() / (len(needed) - lost)).sqrt()
        cells = [gates, recipe, str(published), f"{mean:.2f} ± {error:.2f}", str(lost)]
        lines.append(f"| {' | '.join(cells)} |")
        dashes = {"linestyle": "--"} if recipe == "dense + cosine" else {}
        axes.ecdf(needed.nan_to_num(nan=torch.inf), label=f"{gates}, {recipe}", **dashes)
    axes.set(xscale="log", xlabel="batches", ylabel="share of trials done")
    axes.legend(fontsize="small")
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "mask_initialisation.png", dpi=120)
    note = NOTE.format(trials=trials, datasets=datasets, seconds=time.perf_counter() - start)
    text = "\n\n".join(["# Mask initialisation and scaling", "\n".join(lines), note])
    (folder / "mask_initialisation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
