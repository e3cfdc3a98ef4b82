"""Which pixels a network needs: HAT-CL's notebook "feature importance", on scikit-learn's digits.

    python examples/feature_importance.py

A multilayer perceptron with a gate on every pixel learns all ten digits under penalties of several
weights on open pixels; the gates that stay open are the pixels that matter. The notebook (Duan 2023)
does so on MNIST, 784 pixels, with one network whose penalty grows over 500 epochs; it gives accuracy
0.9672 without a penalty and the rest as plots. Here are 8x8 digits, and every weight has networks of
its own, all of them trained at once as replicas; it takes two minutes.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torchopt
import tyro
from matplotlib.figure import Figure
from torch import Tensor

import hatfn
from hatfn.experiments.streams import digits
from hatfn.models import MLP

HERE = Path(__file__).parent
S_MAX, BATCH = 100.0, 32
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
NOTE = """Open pixels of 64 and test accuracy under binary gates, mean ± standard deviation over {seeds}
seeds. Published, on MNIST: 0.9672 without a penalty; the rest as plots without numbers. Settings are
the notebook's (adam 0.01, batch 32, dense start, cosine scale to 100 over each epoch, one hidden layer
of 128), but each weight has {epochs} epochs from scratch, and hidden units have gates too, at no cost.
All {count} networks trained at once in {seconds:.0f} s.

![accuracy against open pixels, and which pixels stay open](figures/feature_importance.png)
"""


def pay_for_pixels(gates: dict[str, Tensor], used: dict[str, Tensor], quota: Tensor) -> Tensor:
    """The sparsity of the inputs alone: hidden units cost nothing."""
    return hatfn.sparsity({"input": gates["input"]}, {"input": used["input"]}, quota)


def main(seeds: int = 4, epochs: int = 30, width: int = 128, folder: Path = HERE) -> None:
    """Write the table and the figure.

    Args:
        seeds: networks for each weight of the penalty.
        epochs: over the training images.
        width: of the hidden layer.
        folder: where to write feature_importance.md and figures/feature_importance.png.
    """
    data, start = digits(), time.perf_counter()
    x, y = data["train"]
    net = MLP(features=64, classes=10, width=width, depth=1)
    hat = hatfn.build(
        net,
        hatfn.trace(net, x[:1], input_gate=True),
        classes=[10],
        optimizer=torchopt.adam(0.01),
        s_max=S_MAX,
        init="dense",
        regularizer=pay_for_pixels,
    )
    many, sparsity = hatfn.Replicas(hat), [weight for weight in WEIGHTS for _ in range(seeds)]
    states = hatfn.replicate(hat, seeds=list(range(seeds)) * len(WEIGHTS), sparsity=sparsity)
    states, scale, steps = many.begin(states, 0), hatfn.schedule.cosine(S_MAX), len(y) // BATCH
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=shuffle)
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            batch, progress = (x[rows], y[rows]), step / (steps - 1)
            states, _ = many.update(states, batch, 0, scale(progress), shared=True)
    states = many.consolidate(states, 0)

    test_x, test_y = data["test"]
    right = (many.forward(states, test_x, 0).argmax(-1) == test_y).double().mean(1)
    accuracy, pixels = right.reshape(-1, seeds), states.masks["input"][:, 0].reshape(-1, seeds, 8, 8)
    count = pixels.sum((2, 3)).double()
    lines = ["| weight of the penalty | open pixels | accuracy |", "|---|---|---|"]
    for weight, n, acc in zip(WEIGHTS, count, accuracy, strict=True):
        spread = (f"{v.mean():.{d}f} ± {v.std(correction=0):.{d}f}" for v, d in ((n, 1), (acc, 4)))
        lines.append(f"| {weight} | {' | '.join(spread)} |")

    shown = range(1, len(WEIGHTS), 2)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=[3, 2])
    axes = rows[0].subplots()
    axes.plot(count.flatten(), accuracy.flatten(), ".", color="tab:gray", label="a network")
    axes.plot(count.mean(1), accuracy.mean(1), "o-", label="mean of a weight")
    axes.set(xlabel="open pixels of 64", ylabel="test accuracy")
    axes.legend()
    maps = rows[1].subplots(1, len(shown) + 1)
    maps[0].imshow(x.mean((0, 1)).numpy(), cmap="gray_r")
    maps[0].set_title("mean image", fontsize="small")
    for panel, i in zip(maps[1:], shown, strict=True):
        drawn = panel.imshow(pixels[i].double().mean(0).numpy(), vmin=0, vmax=1)
        panel.set_title(f"weight {WEIGHTS[i]}", fontsize="small")
    for panel in maps:
        panel.set(xticks=[], yticks=[])
    rows[1].colorbar(drawn, ax=maps, label="share of networks")
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "feature_importance.png", dpi=120)
    seconds = time.perf_counter() - start
    note = NOTE.format(seeds=seeds, epochs=epochs, count=len(sparsity), seconds=seconds)
    text = "\n\n".join(["# Which pixels matter", "\n".join(lines), note])
    (folder / "feature_importance.md").write_text(text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
