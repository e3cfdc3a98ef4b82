"""What grows with tasks, units, parameters and processes: formulas against measurements.

    python examples/scaling.py

measures the bytes of a state and of a training step, allocation by allocation, for three sizes of a
perceptron and two of a vision transformer, and puts them beside what hatfn/experiments/scaling.py says;
by the same formulas, what ten thousand tasks and a ViT-L would need. The tables of examples/scaling.md
are written anew. It takes two minutes and two gigabytes.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torchopt
import tyro
from torch import Tensor, nn

import hatfn
from hatfn.experiments.bench.scaling import OPTIMIZERS, Size, count, count_saved
from hatfn.experiments.bench.timing import Contender, peak_memory
from hatfn.experiments.markdown import grid
from hatfn.models import MLP

HERE = Path(__file__).parent
MAKERS = {
    "sgd": torchopt.sgd(0.1),
    "momentum": torchopt.sgd(0.1, momentum=0.9),
    "adam": torchopt.adam(1e-3),
}
VITS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
MEASURED, COMPUTED = "## Measured", "## Computed"
FAR = ["module", "tasks", "state, GB", "step, GB", "of it copied stacks, GB"]


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A module, and a batch for it."""
    torch.manual_seed(0)
    if name.startswith("mlp"):
        return MLP(64, 10, width=int(name.split()[1])), torch.randn(256, 64)
    return timm.create_model(name, num_classes=10), torch.randn(4, 3, 224, 224)


def measure(name: str, tasks: int) -> list[list[str]]:
    """Rows of the table: measured, and by the formulas relative to it."""
    module, x = make(name)
    wiring, y = hatfn.trace(module, x[:1]), torch.randint(10, x.shape[:1])
    rows = []
    for label in OPTIMIZERS:
        hat = hatfn.build(module, wiring, [10] * tasks, MAKERS[label], s_max=100.0)
        size, box = count_saved(hat, x, y), [hat.begin(hat.init(0), 0)]

        def step(hat: hatfn.HAT = hat, box: list[hatfn.HATState] = box) -> None:
            box[0], _ = hat.update(box[0], (x, y), 0, 50.0)

        held, peak = int(hatfn.memory(box[0]).sum()), peak_memory(Contender(name, step))
        said = size.state(tasks, label) / held, size.step(tasks, len(x), label) / peak
        cells = [f"{held / 1e6:.1f}", f"{said[0]:.2f}", f"{peak / 1e6:.1f}", f"{said[1]:.2f}"]
        rows.append([name, label, f"{size.shared / 1e6:.2f}", *cells])
    return rows


def needs(what: str, size: Size, tasks: int) -> list[str]:
    """A row of what has not been run: gigabytes under adam, without activations."""
    parts = size.state(tasks, "adam"), size.step(tasks, 0, "adam"), size.stacks(tasks)
    return [what, str(tasks), *(f"{part / 1e9:.2f}" for part in parts)]


def main(
    names: tuple[str, ...] = (*(f"mlp {width}" for width in (400, 800, 1600)), *VITS),
    large: tuple[str, ...] = ("mlp 1600", "resnet18s", "vit_large_patch16_224"),
    tasks: int = 5,
    folder: Path = HERE,
) -> None:
    """Write the page.

    Args:
        names: of the modules that are measured.
        large: of the modules whose needs are computed for 10 and 10,000 tasks.
        tasks: of the measured ones.
        folder: where to write scaling.md.
    """
    head = [
        "module",
        "optimiser",
        "P, millions",
        "state, MB",
        "formula / it",
        "step, MB",
        "formula / it",
    ]
    rows = [row for name in names for row in measure(name, tasks)]
    far = []
    for name in large:
        module, x = make(name)
        size = count(hatfn.build(module, hatfn.trace(module, x[:1]), [10], torchopt.sgd(0.1)))
        far += [needs(name, size, many) for many in (10, 10_000)]
    measured, computed = grid([head, *rows]), grid([FAR, *far])
    page = folder / "scaling.md"
    said, _, rest = page.read_text().partition(MEASURED)
    _, _, rest = rest.partition(COMPUTED)
    _, _, rest = rest.partition("\n\n## ")
    page.write_text(f"{said}{MEASURED}\n\n{measured}\n\n{COMPUTED}\n\n{computed}\n\n## {rest}")
    print(page.read_text())


if __name__ == "__main__":
    tyro.cli(main)
