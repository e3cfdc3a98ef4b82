"""Data sets that need no files: scikit-learn's digits, MNIST-1D."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hatfn.experiments.streams.parts import SPLIT_SEED, Part, PartName, Source, divided
from hatfn.numerics.seeds import numpy_seeded


def digits() -> dict[PartName, Part]:
    """scikit-learn's digits as {"train", "validation", "test"}, each (B, 1, 8, 8) in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels
    )
    train, validation = train_test_split(
        rest, test_size=0.2, random_state=SPLIT_SEED, stratify=labels[rest]
    )
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.long)
    parts: dict[PartName, list[int]] = {"train": train, "validation": validation, "test": test}
    return {name: Part(x[rows], y[rows]) for name, rows in parts.items()}


@cache  # because it takes a second
def mnist1d() -> Source:
    """MNIST-1D with its own defaults: 4,000 and 1,000 signals, as (B, 1, 1, 40) in [0, 1].

    Source: Greydanus & Kobak 2024, arXiv 2011.14439.
    """
    package = needed("mnist1d.data", "mnist1d")
    settings = package.get_dataset_args()
    with numpy_seeded(settings.seed):  # make_dataset sets this seed globally; here it is restored
        data = package.make_dataset(settings)
    low = min(data["x"].min(), data["x_test"].min())
    high = max(data["x"].max(), data["x_test"].max())

    def part(x: Any, y: Any) -> Part:
        scaled = torch.tensor((x - low) / (high - low), dtype=torch.float32)
        return Part(scaled[:, None, None], torch.tensor(y, dtype=torch.long))

    parts = divided(part(data["x"], data["y"]))
    parts["test"] = part(data["x_test"], data["y_test"])
    return Source("mnist1d", 10, parts)


def needed(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"stream: this stream needs the package {module.partition('.')[0]}, but {error.name} is "
            f"not installed. Write pip install 'hatfn[{extra}]'."
        ) from error
