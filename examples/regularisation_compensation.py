"""The penalty's weight against the compensation factor: HAT-CL's notebook, a hundred trainings at once.

    python examples/regularisation_compensation.py

A layer of gated units learns the ten digits under every pair of ten weights of the sparsity penalty
and ten factors of the embeddings' gradients, by sgd and by adam. The notebook (Duan 2023) does so on
MNIST; it gives plots without numbers and concludes: with sgd, weight and factor both speed up and
strengthen the penalty; with adam the factor does nothing, since adam scales each gradient by itself.
Its hundred trainings of 1875 steps, one after another, took 12.6 minutes with sgd and 14.3 with adam.
Here the grid is one batched run of replicas; both take three minutes together.
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
from hatfn.experiments.bench.timing import Contender, Ratio, interleaved, paired
from hatfn.experiments.streams import digits
from hatfn.models import MLP
from hatfn.replicas import replica

HERE = Path(__file__).parent
S_MAX, BATCH = 100.0, 32
OPTIMIZERS = {"sgd": lambda: torchopt.sgd(0.01), "adam": lambda: torchopt.adam(0.001)}
NOTE = """accuracy: on test images, without penalty, mean over the factors. Then mask use: at the
smallest factor (10) and the largest (200), means over all weights but 0; at the smallest weight but 0
and the largest (5), means over the factors. Published, on MNIST: the same maps as plots, and the
conclusion that the factor matters with sgd and not with adam. Settings are the notebook's (sgd 0.01,
adam 0.001, dense start, batch 32, {steps} steps in which the scale runs one cosine to 100, no quota),
but 8x8 digits, {width} units, and accuracy under binary gates where the notebook takes s = 1.

seconds: of all {count} trainings at once. step: what a step of all takes, in steps of one learner,
median and quartiles of interleaved runs; one after another the {count} trainings would take {count}
over it times as long.

![accuracy and mask use](figures/regularisation_compensation.png)
"""


def train_grid(name: str, size: int, steps: int, width: int) -> tuple[Tensor, Tensor, float, Ratio]:
    """Accuracy and mask use, (weights, factors); seconds; a step's time in steps of one learner."""
    data = digits()
    x, y = data["train"]
    net = MLP(features=64, classes=10, width=width, depth=1)
    hat = hatfn.build(
        net, hatfn.trace(net, x[:1]), classes=[10], optimizer=OPTIMIZERS[name](), s_max=S_MAX,
        init="dense", max_norm=None,
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.linspace(0, 5, size), torch.linspace(10, 200, size)).T.tolist()
    many, scale = hatfn.Replicas(hat), hatfn.schedule.cosine(S_MAX)
    states = hatfn.replicate(hat, range(size**2), sparsity=grid[0], compensation=grid[1])
    states, draw = many.begin(states, 0), torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(y), (BATCH,), generator=draw)
        batch, s = (x[rows], y[rows]), scale(step / (steps - 1))
        states, _ = many.update(states, batch, 0, s, shared=True)
    seconds, one = time.perf_counter() - start, replica(states, 0)
    of_all = Contender("all", lambda: many.update(states, batch, 0, S_MAX, shared=True))
    of_one = Contender("one", lambda: hat.update(one, batch, 0, S_MAX))
    times = list(interleaved([of_all, of_one], rounds=20))
    ratio = paired([t["all"] for t in times], [t["one"] for t in times])

    states, (test_x, test_y) = many.consolidate(states, 0), data["test"]
    accuracy = (many.forward(states, test_x, 0).argmax(-1) == test_y).double().mean(1)
    (masks,) = states.masks.values()
    use = masks[:, 0].double().mean(1)
    return accuracy.reshape(size, size), use.reshape(size, size), seconds, ratio


def main(size: int = 10, steps: int = 1875, width: int = 100, folder: Path = HERE) -> None:
    """Write the table and the figure.

    Args:
        size: weights and factors of the grid.
        steps: of every training.
        width: gated units.
        folder: where to write regularisation_compensation.md and its figure.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    lines = [
        "| | accuracy | factor 10, 200 | smallest, largest weight | seconds | step |",
        "|---" * 6 + "|",
    ]
    for row, optimizer in zip(figure.subplots(2, 2), OPTIMIZERS, strict=True):
        accuracy, use, seconds, step = train_grid(optimizer, size, steps, width)
        ends = [f"{a.mean():.2f}, {b.mean():.2f}" for a, b in (use[1:].T[[0, -1]], use[[1, -1]])]
        cells = [optimizer, f"{accuracy[0].mean():.3f}", *ends, f"{seconds:.0f}", str(step)]
        lines.append(f"| {' | '.join(cells)} |")
        for axes, what, values in zip(row, ("accuracy", "mask use"), (accuracy, use), strict=True):
            extent = (0, 210, -0.25, 5.25)
            drawn = axes.imshow(values.numpy(), origin="lower", vmin=0, vmax=1, extent=extent)
            axes.set(aspect="auto", title=f"{optimizer}: {what}", xlabel="factor", ylabel="weight")
    figure.colorbar(drawn, ax=figure.axes)
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "regularisation_compensation.png", dpi=120)
    note = NOTE.format(steps=steps, width=width, count=size**2)
    text = "\n\n".join(["# Penalty against compensation", "\n".join(lines), note])
    (folder / "regularisation_compensation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
