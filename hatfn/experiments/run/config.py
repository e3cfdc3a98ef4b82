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
    """Learn a stream of tasks one after another, and report what was kept.

    The defaults were chosen on validation images; examples/sweep.py repeats the search.
    """

    stream: StreamName = "split-digits"
    """The sequence of tasks: a data set that is split, permuted or rotated, or eight data sets."""
    tasks: int | None = None
    """Number of tasks; None: the stream's own (5 or 10 split, 10 permuted, 5 rotated, 8 mixed)."""
    data_dir: Path | None = None
    """Folder of the files of MNIST, CIFAR and the like, laid out as torchvision does."""
    model: str = "mlp"
    """"mlp", or the name of any timm model (resnet18s, vit_tiny_patch16_224, ...)."""
    width: int = 1000
    """Units per hidden layer of the mlp."""
    depth: int = 2
    """Hidden layers of the mlp."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit of the mlp."""
    image_size: int | None = None
    """Pixels per side that a timm model is given; None: its own input size. dsprites are
    drawn for it."""
    method: Method = "hat"
    """"hat", or the same network without gates: "finetune" protects nothing and forgets; "joint" trains
    all tasks in the same steps; "isolated" has a network for each task; "frozen" trains its shared
    weights on the first task only."""
    epochs: int = 20
    """Passes over each task's training images."""
    batch_size: int = 32
    """Images per step and process, at most; the last batch is never much smaller."""
    processes: int | None = None
    """How many batches make a step; None: one for each process, of which torchrun starts several. A run
    goes on with as many as it was begun with, whatever the number of processes is then."""
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    """The optimiser of weights and embeddings."""
    lr: float = 3e-3
    """Learning rate."""
    anneal: Literal["none", "linear"] = "none"
    """How the learning rate falls over each task; linear: to zero, which short trainings need."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""
    weight_decay: float = 0.0
    """Weight decay; embeddings are never decayed."""
    carry: bool = False
    """Keep the optimiser's moments from one task to the next."""
    schedule: Literal["linear", "exponential", "cosine", "constant"] = "linear"
    """How the mask scale s goes from small to s_max."""
    period: Literal["epoch", "task"] = "epoch"
    """Over what the schedule runs once: each epoch (the first paper) or the whole task."""
    s_max: float = 100.0
    """The largest mask scale."""
    init: Init = "normal"
    """Initial task embeddings."""
    init_from: Literal["similar"] | None = None
    """"similar": a task's embeddings start from the learned task that does best on its first batch."""
    sparsity: float = 0.75
    """Weight of the penalty on units that no earlier task uses."""
    first_sparsity: float | None = None
    """The same weight for the first task alone, whom every unit is free to; None: as the others'."""
    sparsity_over: Literal["all", "groups"] = "all"
    """Penalty over all groups together (first paper), or the mean of the groups' own (HAT-CL)."""
    quota: float = 0.0
    """Share of the units that every task may take without penalty; HAT-CL's is 1/tasks."""
    compensation: float | Literal["s_max"] | None = "s_max"
    """Factor on the embeddings' gradients: s_max (first paper), a number (HAT-CL: 100), None: off."""
    protection: LockName = "exact"
    """What is held fixed: weights that one task uses at both ends, the papers' min(post, pre), all that
    is in use a little ("adaptive"), or of it the largest weights ("magnitude")."""
    recalibrate: Literal["measured", "always", "never"] = "measured"
    """Re-estimate batch-norm statistics under binary gates at the end of each task: if that lowers the
    loss that is measured on training images under these gates, or always, or never."""
    max_norm: float | None = 10_000.0
    """Gradients are scaled down to this norm; None: not."""
    evaluate_on: Literal["test", "validation"] = "test"
    """"test" trains on all other images; "validation" leaves the test images out of everything."""
    infer: Literal["always", "end"] = "always"
    """After which tasks to measure accuracy with the task inferred: each, or the last alone. Images
    pass through every learned task: after each of ten, that is four times the work."""
    seed: int = 0
    """Of the weights, embeddings, permutations and the order of the batches."""
    seeds: int = 1
    """How many runs to train at once, of this seed and the following: mean and deviation are shown."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the module; bfloat16: under autocast, weights and moments stay float32."""
    accumulate: int = 1
    """Parts that every batch is split into: a step holds the activations of one at a time."""
    grad_checkpointing: bool = False
    """Compute a timm model's blocks again in the backward pass instead of keeping their activations."""
    compile: Literal["none", "update", "step"] = "none"
    """What of a step PyTorch compiles, with TorchOpt's optimisers: what follows the gradient, or all.
    Takes seconds to minutes at the start, on a CPU a C++ compiler, and pays for long runs."""
    out: Path | None = None
    """Folder for the results; None: runs/STREAM-MODEL-METHOD-SEED."""

    resume: Path | None = None
    """Folder of a run that was cut off: go on with it, by its own settings."""
    save_every: float = 30.0
    """Seconds between saves of all that it takes to go on; a task's end is always saved."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        seeds = f"{self.seed}" if self.seeds == 1 else f"{self.seed}-to-{self.seed + self.seeds - 1}"
        return self.out or Path("runs") / f"{self.stream}-{self.model}-{self.method}-{seeds}"


def check_run(config: RunConfig) -> None:
    """Refuse numbers that no run can have, before anything is written or computed.

    Raises:
        ValueError: a count below 1; NaN. What else is wrong is told by those who use it.
    """
    for name, value in vars(config).items():
        if name in COUNTS and value is not None and value < 1:
            raise ValueError(f"run: {name}={value}. Expected at least 1.")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"run: {name}={value}. Expected a number.")


COUNTS = {"tasks", "width", "depth", "image_size", "epochs", "batch_size", "seeds", "processes"}
