"""The words and settings of the commands; those of ``hatfn run`` are in run/config.py."""

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

CaseName = Literal["mlp", "resnet18s", "vit", "seeds"]

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
    """Find the wiring of a timm model, and show how good it is."""

    model: tyro.conf.Positional[str | None] = None
    """The name of any timm model."""
    all: bool = False
    """Instead of one model, the smallest of every family of timm."""
    verify: bool = False
    """Prove the wiring by perturbation as well."""
    side: int | None = None
    """Pixels per side of the image; None: the smallest common size that the model takes."""
    out: Path | None = None
    """Where --all writes its table, in Markdown."""


@dataclass(frozen=True)
class BenchConfig:
    """Time hatfn against the same modules in plain torch, and tabulate the ratios.

    On a machine that others use as well, --threads 1 is the steadier measure: threads that wait for a
    busy core stretch every step.
    """

    rounds: int = 15
    """How often each comparison runs all of its contenders, in turn."""
    only: tuple[CaseName, ...] = ()
    """The models to run; none: all of them."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """Threads of torch; None: as many as it takes by itself."""
    compiled: bool = True
    """Also time steps that PyTorch compiles; wants a C++ compiler, and minutes more."""
    out: Path | None = None
    """Where to write the table, in Markdown."""


@dataclass(frozen=True)
class ReproduceConfig:
    """Make the page of results anew: tables of the papers, as far as this machine can run them."""

    only: tuple[ChapterName, ...] = ()
    """The chapters to make; none: all of them."""
    quick: bool = False
    """Tiny settings that show that everything runs, and nothing else."""
    processes: int = 2
    """How many runs to train side by side, each with one thread."""
    examples: Path = Path("examples")
    """The folder of hatfn's example scripts, some of which are chapters."""
    out: Path | None = None
    """Where to write the page; figures go beside it. None: examples/results.md, in the quick form
    runs/quick/results.md. Of a page that is there, only the chapters that are made are replaced."""

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return self.out or Path("runs/quick/results.md" if self.quick else "examples/results.md")
