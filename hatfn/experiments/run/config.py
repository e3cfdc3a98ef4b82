"""The settings of a run: each one a flag of ``hatfn run``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hatfn.experiments.config import StreamName
from hatfn.method.names import Init, LockName

Method = Literal["hat", "finetune", "joint", "isolated", "frozen"]


@dataclass(frozen=True)
class RunConfig:
    """Learn a stream of tasks one after another, and report how much of each is kept.

    The defaults were chosen on validation images; examples/sweep.py repeats the search.
    """

    stream: StreamName = "split-digits"
    """The sequence of tasks: a data set that is split, permuted or rotated, or eight data sets."""
    tasks: int | None = None
    """Number of tasks; None: 5 or 10 if split, 10 if permuted, 5 if rotated, 8 for the mixture."""
    data_dir: Path | None = None
    """Folder with the files of MNIST, CIFAR and other data sets, laid out as in torchvision."""
    model: str = "mlp"
    """"mlp", or the name of any timm model (resnet18s, vit_tiny_patch16_224, ...)."""
    width: int = 1000
    """Units per hidden layer of the mlp."""
    depth: int = 2
    """Hidden layers of the mlp."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit of the mlp."""
    image_size: int | None = None
    """Pixels per side of the images that a timm model receives; None: its own input size. dsprites are
    drawn for this size."""
    method: Method = "hat"
    """"hat", or the same network without gates: "finetune" protects nothing and forgets; "joint" trains
    all tasks in the same steps; "isolated" has a network for each task; "frozen" trains the shared
    weights on the first task only."""
    epochs: int = 20
    """Passes over each task's training images."""
    batch_size: int = 32
    """The most images per step and process; all batches of an epoch have nearly the same size."""
    processes: int | None = None
    """Number of batches in one step; None: one for each process that torchrun starts. A resumed run
    keeps the number that it began with, even if torchrun now starts more or fewer processes."""
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    """The optimizer of weights and embeddings."""
    lr: float = 3e-3
    """Learning rate."""
    anneal: Literal["none", "linear"] = "none"
    """"linear" lets the learning rate fall to zero over each task, which short trainings need."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""
    weight_decay: float = 0.0
    """Weight decay of the weights; embeddings have none."""
    carry: bool = False
    """Keep the optimizer state from one task to the next."""
    schedule: Literal["linear", "exponential", "cosine", "constant"] = "linear"
    """The course of the mask scale s, which is at most s_max."""
    period: Literal["epoch", "task"] = "epoch"
    """The schedule runs once in each epoch (as in the first paper), or once in each task."""
    s_max: float = 100.0
    """The largest mask scale."""
    init: Init = "normal"
    """Initial values of task embeddings."""
    init_from: Literal["similar"] | None = None
    """"similar": a task's embeddings start from the learned task that does best on its first batch."""
    sparsity: float = 0.75
    """Weight of the penalty on units that no earlier task uses."""
    first_sparsity: float | None = None
    """The same weight for the first task, for which every unit is free; None: as for other tasks."""
    sparsity_over: Literal["all", "groups"] = "all"
    """One penalty over all groups together (first paper), or one per group, then averaged (HAT-CL)."""
    quota: float = 0.0
    """Share of the units that every task may use without penalty; HAT-CL uses 1/tasks."""
    compensation: float | Literal["s_max"] | None = "s_max"
    """Factor on the gradients of embeddings: s_max (first paper), a number (HAT-CL: 100), None: off."""
    protection: LockName = "exact"
    """The rule that protects weights: "exact" protects weights between two units that one learned task
    uses; "paper" uses min(post, pre), as in the papers; "adaptive" makes updates of all used weights
    small; "magnitude" protects the largest of the used weights."""
    recalibrate: Literal["measured", "always", "never"] = "measured"
    """Whether to re-estimate batch-norm statistics with binary gates at the end of each task.
    "measured" does so if it lowers the loss on training images with these gates."""
    max_norm: float | None = 10_000.0
    """The largest norm of the gradient, which is scaled down to it; None: no limit."""
    evaluate_on: Literal["test", "validation"] = "test"
    """"test" measures on the test images and trains on all others; "validation" measures on the
    validation images and does not use the test images at all."""
    infer: Literal["always", "end"] = "always"
    """When to measure accuracy with the task inferred: after each task, or only at the end. Each image
    passes through every learned task, so after each of ten tasks this is four times the work."""
    seed: int = 0
    """Seed of the weights, embeddings, permutations and the order of the batches."""
    seeds: int = 1
    """Number of seeds to train at once: this seed and the following ones. The report shows mean and
    standard deviation."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the module; bfloat16 uses autocast: weights and optimizer state stay float32."""
    accumulate: int = 1
    """Number of micro-batches that every batch is split into; a step keeps the activations of one."""
    grad_checkpointing: bool = False
    """Compute a timm model's blocks again in the backward pass instead of keeping their activations."""
    compile: Literal["none", "update", "step"] = "none"
    """The part of a step that PyTorch compiles: "update" is all that follows the gradient, "step" is
    all. Optimizers are then TorchOpt's. Compiling takes seconds to minutes at the start and on a CPU
    needs a C++ compiler, so it pays for long runs."""
    out: Path | None = None
    """Folder for the results; None: runs/STREAM-MODEL-METHOD-SEED."""

    resume: Path | None = None
    """Folder of an interrupted run; the run goes on with its own settings."""
    save_every: float = 30.0
    """Seconds between saves of all that --resume needs; the end of a task is always saved."""

    @property
    def folder(self) -> Path:
        """The folder for the results."""
        seeds = f"{self.seed}" if self.seeds == 1 else f"{self.seed}-to-{self.seed + self.seeds - 1}"
        return self.out or Path("runs") / f"{self.stream}-{self.model}-{self.method}-{seeds}"


def check_run(config: RunConfig) -> None:
    """Refuse impossible numbers before anything is written or computed.

    Other wrong settings raise errors where they are used.

    Raises:
        ValueError: a count below 1, or NaN.
    """
    for name, value in vars(config).items():
        if name in COUNTS and value is not None and value < 1:
            raise ValueError(f"run: {name}={value}. Expected at least 1.")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"run: {name}={value}. Expected a number.")


COUNTS = {"tasks", "width", "depth", "image_size", "epochs", "batch_size", "seeds", "processes"}
