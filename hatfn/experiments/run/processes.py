"""Several processes under torchrun, and the share of a run that each of them does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import distributed as dist

from hatfn.engine.ranks import ALONE, Ranks, joined
from hatfn.experiments.run.config import RunConfig


@contextmanager
def processes(device: str) -> Iterator[Ranks]:
    """The processes that torchrun has started, or this process alone.

    Args:
        device: where to compute. With "cuda" each process has a GPU, and messages go by nccl, else by
            gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield joined()
    finally:
        dist.destroy_process_group()


def shares(config: RunConfig) -> list[RunConfig]:
    """Split a run of several seeds into runs with some of the seeds, one for each process.

    The number of processes is the one that the run began with. A run of one process or one seed is not
    split.

    Raises:
        ValueError: more processes than seeds.
    """
    count = config.processes or 1
    if count == 1 or config.seeds == 1:
        return [config]
    if config.seeds < count:
        raise ValueError(
            f"run: {config.seeds} seeds for {count} processes. Expected at least one seed for each "
            f"process, or --seeds 1, so that all processes share the batches of one seed."
        )
    runs = []
    for part in np.array_split(np.arange(config.seed, config.seed + config.seeds), count):
        first, last = int(part[0]), int(part[-1])
        folder = config.folder / f"seeds-{first}-to-{last}"
        begun = config.resume is not None and (folder / "config.json").exists()
        runs.append(
            replace(
                config,
                seed=first,
                seeds=len(part),
                processes=1,
                out=folder,
                resume=folder if begun else None,
            )
        )
    return runs
