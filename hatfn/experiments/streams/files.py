"""Data sets from files, laid out and read as torchvision does. Nothing is downloaded."""

from __future__ import annotations

import gzip
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torchvision import datasets

from hatfn.experiments.streams.parts import Part, PartName, Source, divided
from hatfn.experiments.streams.sequences import framed


class FileSet(NamedTuple):
    """A data set that is read from files.

    Attributes:
        title: its usual name.
        classes: the number of classes; None: the number of folders.
        files: the files that must be in the data folder; a name that ends in "/" is a folder.
        origin: the origin of the files, in words.
        read: the function from the data folder to training and test images.
    """

    title: str
    classes: int | None
    files: tuple[str, ...]
    origin: str
    read: Callable[[Path], tuple[Part, Part]]


def load(names: Iterable[str], folder: Path | None, stream: str) -> list[Source]:
    """Read data sets from a folder; a tenth of the training images of each is for validation.

    Args:
        names: names in ``FILE_SETS``.
        folder: the user's ``--data-dir``.
        stream: the name of the stream, for messages.

    Raises:
        ValueError: files are damaged or missing; the message names all missing files.
    """
    wanted = [FILE_SETS[name] for name in names]
    missing = [line for one in wanted for line in _missing(one, folder)]
    if missing:
        where = "no --data-dir is given" if folder is None else f"not all are in --data-dir {folder}"
        raise ValueError(
            "\n".join(
                [
                    f"stream: {stream} is read from files, and {where}. Missing:",
                    *missing,
                    "Expected one folder that has all of them, laid out as in torchvision. hatfn does "
                    "not download files.",
                ]
            )
        )
    assert folder is not None
    return [_load(one, folder) for one in wanted]


def _missing(data: FileSet, folder: Path | None) -> list[str]:
    """The lines of the message that name missing files; none if all files exist."""
    lacking = [name for name in data.files if folder is None or not _there(folder, name)]
    return [f"{data.title} ({data.origin}):", *(f"  {name}" for name in lacking)] if lacking else []


def _there(folder: Path, name: str) -> bool:
    path = folder / name
    if name.endswith("/"):
        return path.is_dir()
    return path.is_file() or path.with_name(path.name + ".gz").is_file()


def _load(data: FileSet, folder: Path) -> Source:
    try:
        train, test = data.read(folder)
        classes = int(train.y.max()) + 1 if data.classes is None else data.classes
        for part in (train, test):
            if len(part.x) != len(part.y) or not set(part.y.unique().tolist()) <= set(range(classes)):
                raise ValueError(
                    f"{len(part.x)} images and {len(part.y)} labels from {part.y.min()} to "
                    f"{part.y.max()} of {classes} classes"
                )
    except (
        *(OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError),
        *(pickle.UnpicklingError, zlib.error),
    ) as error:
        raise ValueError(
            f"stream: {data.title} in {folder} cannot be read ({error}). Expected the files as they "
            f"are published ({data.origin}), unpacked: {', '.join(data.files)}."
        ) from error
    parts: dict[PartName, Part] = divided(train)
    parts["test"] = test
    return Source(data.title, classes, parts)


def _idx(make: type[datasets.MNIST]) -> Callable[[Path], tuple[Part, Part]]:
    def read(folder: Path) -> tuple[Part, Part]:
        raw = Path(make.__name__, "raw")
        if all((folder / name).is_file() for name in _idx_files(make)):
            return _parts(make(folder, train) for train in (True, False))
        # torchvision does not read gzip, and nothing may be written to the user's folder.
        with TemporaryDirectory() as unpacked:
            (unpacked / raw).mkdir(parents=True)
            for name in _idx_files(make):
                plain = folder / name
                with (
                    plain.open("rb") if plain.is_file() else gzip.open(f"{plain}.gz") as given,
                    (unpacked / Path(name)).open("wb") as file,
                ):
                    shutil.copyfileobj(given, file)
            return _parts(make(unpacked, train) for train in (True, False))

    return read


def _idx_files(make: type[datasets.MNIST]) -> tuple[str, ...]:
    return tuple(f"{make.__name__}/raw/{name.removesuffix('.gz')}" for name, _ in make.resources)


def _cifar(make: type[datasets.CIFAR10]) -> Callable[[Path], tuple[Part, Part]]:
    def read(folder: Path) -> tuple[Part, Part]:
        for name, checksum in make.train_list + make.test_list:
            if not datasets.utils.check_integrity(folder / make.base_folder / name, checksum):
                raise ValueError(f"{name} has another MD5 checksum than {checksum}")
        return _parts(make(folder, train) for train in (True, False))

    return read


def _cifar_files(make: type[datasets.CIFAR10]) -> tuple[str, ...]:
    names = [name for name, _ in make.train_list + make.test_list] + [make.meta["filename"]]
    return tuple(f"{make.base_folder}/{name}" for name in names)


def _svhn(folder: Path) -> tuple[Part, Part]:
    for _, name, checksum in (datasets.SVHN.split_list[part] for part in ("train", "test")):
        if not datasets.utils.check_integrity(folder / name, checksum):
            raise ValueError(f"{name} has another MD5 checksum than {checksum}")
    return _parts(datasets.SVHN(folder, part) for part in ("train", "test"))


def _parts(read: Iterable[Any]) -> tuple[Part, Part]:
    """The parts from torchvision's arrays, (B, H, W), (B, H, W, 3) or (B, 3, H, W) of bytes."""
    found = []
    for data in read:
        x = torch.as_tensor(data.data)
        if x.ndim == 3:
            x = x[:, None]
        elif x.shape[1] != 3:
            x = x.permute(0, 3, 1, 2)
        labels = data.labels if hasattr(data, "labels") else data.targets
        found.append(Part(x.contiguous(), torch.as_tensor(labels, dtype=torch.long)))
    train, test = found
    return train, test


def _traffic_signs(folder: Path) -> tuple[Part, Part]:
    train, test = (
        _pictures(datasets.GTSRB(folder, part, transform=_small)) for part in ("train", "test")
    )
    return train, test


def _folders(name: str) -> Callable[[Path], tuple[Part, Part]]:
    def read(folder: Path) -> tuple[Part, Part]:
        train, test = (
            datasets.ImageFolder(folder / name / part, transform=_small) for part in ("train", "test")
        )
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"train and test differ in their folders: only one has {odd[0]}")
        return _pictures(train), _pictures(test)

    return read


def _small(image: Image) -> torch.Tensor:
    """(3, 32, 32) bytes."""
    if image.size not in ((28, 28), (32, 32)):
        image = image.resize((32, 32), Resampling.BILINEAR)
    return framed(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def _pictures(data: Iterable[tuple[torch.Tensor, int]]) -> Part:
    x, y = zip(*data, strict=True)
    return Part(torch.stack(x), torch.tensor(y))


FILE_SETS = {
    "mnist": FileSet(
        "MNIST",
        10,
        _idx_files(datasets.MNIST),
        "handwritten digits by LeCun, Cortes and Burges; plain or .gz",
        _idx(datasets.MNIST),
    ),
    "fashionmnist": FileSet(
        "FashionMNIST",
        10,
        _idx_files(datasets.FashionMNIST),
        "by Zalando Research; plain or .gz",
        _idx(datasets.FashionMNIST),
    ),
    "cifar10": FileSet(
        "CIFAR-10",
        10,
        _cifar_files(datasets.CIFAR10),
        "by Krizhevsky; from cifar-10-python.tar.gz",
        _cifar(datasets.CIFAR10),
    ),
    "cifar100": FileSet(
        "CIFAR-100",
        100,
        _cifar_files(datasets.CIFAR100),
        "by Krizhevsky; from cifar-100-python.tar.gz",
        _cifar(datasets.CIFAR100),
    ),
    "svhn": FileSet(
        "SVHN",
        10,
        ("train_32x32.mat", "test_32x32.mat"),
        "Street View House Numbers by Netzer et al., format 2: cropped digits",
        _svhn,
    ),
    "trafficsigns": FileSet(
        "TrafficSigns",
        43,
        ("gtsrb/GTSRB/Training/", "gtsrb/GTSRB/Final_Test/Images/", "gtsrb/GT-final_test.csv"),
        "German Traffic Sign Recognition Benchmark; from GTSRB-Training_fixed.zip, "
        "GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip",
        _traffic_signs,
    ),
    "facescrub": FileSet(
        "FaceScrub",
        None,
        ("facescrub/train/", "facescrub/test/"),
        "faces by Ng and Winkler, the 100 people with most images; a folder of images per person",
        _folders("facescrub"),
    ),
    "notmnist": FileSet(
        "NotMNIST",
        None,
        ("notmnist/train/", "notmnist/test/"),
        "letters A to J by Bulatov; a folder of images per letter",
        _folders("notmnist"),
    ),
}
"""Every data set that is read from files, by its name in streams."""
