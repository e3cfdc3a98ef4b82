"""Tasks in a row, and nothing forgotten: HAT-CL's notebook "continual learning".

    python examples/continual_learning.py

learns five tasks of digits with a perceptron, and ten tasks of five shapes from Infinite dSprites with
a ResNet-18 (pip install 'hatfn[dsprites]'; a quarter of an hour on two cores), and writes the accuracy
on every task after every task: with the task given (task-incremental), and with the task inferred from
the largest logit of all heads (class-incremental). The notebook does so with Split CIFAR-10:

    python examples/continual_learning.py --streams cifar10 --data-dir ~/data --device cuda
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hatfn.experiments.markdown import grid
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.loop import learn, start
from hatfn.experiments.run.result import Learned, Result

HERE = Path(__file__).parent
Stream = Literal["digits", "dsprites", "cifar10"]
RESNET = RunConfig(model="resnet18s", image_size=32, period="task", sparsity=0.1, lr=1e-3)
RUNS: dict[Stream, RunConfig] = {
    "digits": RunConfig(stream="split-digits"),
    "dsprites": replace(
        RESNET, stream="split-dsprites", tasks=10, epochs=3, batch_size=16, anneal="linear", infer="end"
    ),
    "cifar10": replace(RESNET, stream="split-cifar10", tasks=5, epochs=20, batch_size=128),
}
NOTE = """Accuracy on test images, and the share whose task is inferred right. Both accuracies of a task
are of the end; with the task given, it is what it was when the task was learned, for no logit moved.
Chance is 0.5 for two digits and 0.2 for five shapes; with the task inferred it is 0.1 and 0.02.

Published, on Split CIFAR-10 with resnet18s (Duan 2023, notebook, one run of 5 epochs), of tasks 0 to
4: task given 0.9015 0.8290 0.8985 0.9535 0.9450, mean 0.9055; task inferred 0.4085 0.0875 0.3115
0.6635 0.4675, mean 0.3877. CIFAR-10 is not here; `--streams cifar10 --data-dir ...` makes the table
that compares. What both have in common: with the task given nothing is lost, and with the task
inferred most is, for no task has seen the images of another.

![accuracy after every task, and in the end](figures/continual_learning.png)
"""


def table(stream: Stream, config: RunConfig, result: Result) -> str:
    """A row for each task, and the means."""
    columns = [
        np.diag(result.accuracy_matrix),
        result.accuracy_matrix[-1],
        result.class_incremental[-1],
        result.task_inference,
    ]
    names = [f"{index} {name}" for index, name in enumerate(result.names)]
    rows = zip([*names, "mean"], *([*column, column.mean()] for column in columns), strict=True)
    head = ["task", "when learned", "task given", "task inferred", "right task"]
    cells = [[name, *(f"{value:.4f}" for value in values)] for name, *values in rows]
    return (
        f"### {config.stream}, {config.model}\n\n{grid([head, *cells])}\n\n"
        f"Drift {result.max_drift!r}; {1 - result.free_weights[-1]:.0%} of the shared weights in use; "
        f"{result.seconds / 60:.1f} minutes."
    )


def draw(matrix: Axes, end: Axes, stream: Stream, result: Result) -> None:
    """Accuracy, a row after each task; and in the end."""
    drawn = matrix.imshow(result.accuracy_matrix, vmin=0, vmax=1)
    matrix.set(title=f"{stream}, task given", xlabel="accuracy on task", ylabel="after task")
    matrix.figure.colorbar(drawn, ax=matrix)
    end.plot(result.accuracy_matrix[-1], "o-", label="task given")
    end.plot(result.class_incremental[-1], "s--", label="task inferred")
    end.set(title=f"{stream}, at the end", xlabel="task", ylabel="accuracy", ylim=(0, 1.02))
    end.legend()


def main(
    streams: tuple[Stream, ...] = ("digits", "dsprites"),
    epochs: int | None = None,
    tasks: int | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
    folder: Path = HERE,
) -> None:
    """Write the tables and the figure.

    Args:
        streams: what to learn.
        epochs: per task; None: as many as the stream wants.
        tasks: how many; None: as many as the stream has.
        data_dir: folder with CIFAR-10, laid out as torchvision does.
        device: where to compute.
        folder: where to write continual_learning.md and figures/continual_learning.png.
    """
    figure = Figure(figsize=(10, 4 * len(streams)), layout="constrained")
    panels = figure.subplots(len(streams), 2, squeeze=False)
    text = ["# Learning tasks one after another"]
    for stream, row in zip(streams, panels, strict=True):
        config = replace(RUNS[stream], data_dir=data_dir, device=device)
        config = replace(config, epochs=epochs or config.epochs, tasks=tasks or config.tasks)
        run = start(config)
        for seen in learn(run):
            if isinstance(seen, Learned):
                print(f"{stream}, task {seen.task}: accuracy {seen.accuracies}, drift {seen.drift}")
        draw(*row, stream, run.result)
        text.append(table(stream, config, run.result))
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "continual_learning.png", dpi=120)
    (folder / "continual_learning.md").write_text("\n\n".join([*text, NOTE]))


if __name__ == "__main__":
    tyro.cli(main)
