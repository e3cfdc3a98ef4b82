"""The names and settings of the commands; those of ``hatfn run`` are in run/config.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

StreamName = Literal[
    "split-digits",
    "permuted-digits",
    "rotated-digits",
    "split-mnist",
    "permuted-mnist",
    "rotated-mnist",
    "split-fashionmnist",
    "permuted-fashionmnist",
    "rotated-fashionmnist",
    "split-cifar10",
    "permuted-cifar10",
    "rotated-cifar10",
    "split-cifar100",
    "permuted-cifar100",
    "rotated-cifar100",
    "split-mnist1d",
    "permuted-mnist1d",
    "split-dsprites",
    "permuted-dsprites",
    "mixture",
]

CaseName = Literal["mlp", "resnet18s", "vit", "resnet18", "mlp40", "tasks", "seeds"]

ZooName = Literal[
    "all",
    "torchvision",
    "pytorchcv",
    "vit_pytorch",
    "segmentation_models_pytorch",
    "monai",
    "transformers",
    "x_transformers",
    "torchaudio",
    "braindecode",
    "torchcrepe",
    "resemblyzer",
    "torch_geometric",
]

ChapterName = Literal[
    "continual",
    "baselines",
    "sensitivity",
    "compression",
    "initialisation",
    "importance",
    "compensation",
]


@dataclass(frozen=True)
class TraceConfig:
    """Find the wiring of a model of timm or of another library, and show how good it is."""

    model: tyro.conf.Positional[str | None] = None
    """The name of any timm model; with --zoo, of a model in the table of these libraries."""
    all: bool = False
    """Trace the smallest model of every family of timm instead of one model."""
    zoo: tuple[ZooName, ...] = ()
    """Trace small models of these other libraries instead, with random weights; all: of each."""
    verify: bool = False
    """Also prove the wiring by perturbation."""
    side: int | None = None
    """Pixels per side of an image for timm; None: the smallest common size that the model accepts."""
    out: Path | None = None
    """File for the table of --all or --zoo, in Markdown."""


@dataclass(frozen=True)
class BenchConfig:
    """Time hatfn against the same modules in plain torch, and tabulate the ratios.

    On a machine that others use too, --threads 1 gives steadier times: several threads wait for each
    other whenever a core is busy.
    """

    rounds: int = 15
    """How often each comparison runs all of its contenders, in turn."""
    only: tuple[CaseName, ...] = ()
    """The models to run; none given: all of them."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """Number of threads of torch; None: torch's own default."""
    compiled: bool = True
    """Also time steps that PyTorch compiles; this needs a C++ compiler, and takes minutes more."""
    out: Path | None = None
    """File for the table, in Markdown."""


@dataclass(frozen=True)
class ReproduceConfig:
    """Make the page of results: the tables of the papers that this machine can compute."""

    only: tuple[ChapterName, ...] = ()
    """The chapters to make; the other chapters of an existing page stay. None given: all of them."""
    quick: bool = False
    """Use tiny settings, which only show that everything runs."""
    processes: int = 2
    """How many runs to train side by side, each with one thread."""
    examples: Path = Path("examples")
    """The folder of hatfn's example scripts; some of them write chapters."""
    out: Path | None = None
    """File for the page; figures go to a folder beside it. None: examples/results.md, or
    runs/quick/results.md with --quick."""

    @property
    def page(self) -> Path:
        """The file of the page."""
        return self.out or Path("runs/quick/results.md" if self.quick else "examples/results.md")
