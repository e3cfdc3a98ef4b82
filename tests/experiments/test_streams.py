"""Streams: what data sets they are made of, and how; files are written here in their real formats."""

from __future__ import annotations

import csv
import gzip
import hashlib
import pickle
import random
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from hatfn.experiments import cli
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.folder import resumed
from hatfn.experiments.streams import StreamName, digits, make_stream, sources
from hatfn.experiments.streams.make import MIXTURE
from hatfn.experiments.streams.parts import Part, divided
from hatfn.experiments.streams.sprites import sprites

GENERATED = [name for name in get_args(StreamName) if name.endswith(("digits", "mnist1d", "dsprites"))]
FROM_FILES = [name for name in get_args(StreamName) if name not in GENERATED]
PER_CLASS = 3
FEW = {"train": 8, "validation": 2, "test": 3}


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every generated shape."""
    monkeypatch.setattr("hatfn.experiments.streams.sprites.IMAGES", FEW)


def optional(name: str) -> None:
    """Skip where the package of the data set is not installed."""
    for data, package in {"dsprites": "idsprites", "mnist1d": "mnist1d"}.items():
        if data in name:
            pytest.importorskip(package)


# The data sets in their files: the pixels of image i of class c are all c + i, a corner and the middle white.


def pixels(label: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    image = np.full(shape, label + index, np.uint8)
    image[:2, :2] = image[10:14, 10:14] = 255
    return image


def rows(classes: int, shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(classes * count, *shape), class after class, and labels."""
    labels = np.repeat(np.arange(classes), count)
    return np.stack([pixels(y, i % count, shape) for i, y in enumerate(labels)]), labels


def write_idx(root: Path, name: str, packed: bool = False) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", PER_CLASS), ("t10k", 2)):
        x, y = rows(10, (28, 28), count)
        for kind, values in (("images-idx3", x), ("labels-idx1", y.astype(np.uint8))):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            whole = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
            path = folder / f"{part}-{kind}-ubyte"
            if packed:
                path.with_suffix(".gz").write_bytes(gzip.compress(whole))
            else:
                path.write_bytes(whole)


def write_cifar(root: Path, made: type[datasets.CIFAR10], patch: pytest.MonkeyPatch) -> None:
    folder = root / made.base_folder
    folder.mkdir(parents=True)
    classes = 10 if made is datasets.CIFAR10 else 100
    label = "labels" if classes == 10 else "fine_labels"

    def dump(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for kind, count in (("train_list", PER_CLASS), ("test_list", 2)):
        names = [name for name, _ in getattr(made, kind)]
        x, y = rows(classes, (32, 32, 3), count)
        x[:, :, :, 2] = 7  # blue: channels are one after the other in the file
        batches = zip(np.array_split(x, len(names)), np.array_split(y, len(names)), strict=True)
        sums = [
            [name, dump(name, {"data": a.transpose(0, 3, 1, 2).reshape(len(a), -1), label: b.tolist()})]
            for name, (a, b) in zip(names, batches, strict=True)
        ]
        patch.setattr(made, kind, sums)
    key = made.meta["key"]
    sum_of_meta = dump(made.meta["filename"], {key: [str(n) for n in range(classes)]})
    patch.setattr(made, "meta", {**made.meta, "md5": sum_of_meta})


def write_svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    table = {}
    for part, count in (("train", PER_CLASS), ("test", 2)):
        x, y = rows(10, (32, 32, 3), count)
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y)[:, None]})
        table[part] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    patch.setattr(datasets.SVHN, "split_list", table)


def write_signs(root: Path) -> None:
    base = root / "gtsrb"
    test = base / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    listed = []
    for label in range(43):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for index in range(2):
            Image.fromarray(pixels(label, index, (40, 50, 3))).save(folder / f"{index:05d}.ppm")
        Image.fromarray(pixels(label, 0, (20, 20, 3))).save(test / f"{label:05d}.ppm")
        listed.append({"Filename": f"{label:05d}.ppm", "ClassId": label})
    with (base / "GT-final_test.csv").open("w") as file:
        writer = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
        writer.writeheader()
        writer.writerows(listed)


def write_folders(root: Path, name: str, classes: int, shape: tuple[int, ...]) -> None:
    for part, count in (("train", PER_CLASS), ("test", 2)):
        for label in range(classes):
            folder = root / name / part / f"class {label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(pixels(label, index, shape)).save(folder / f"{index}.png")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every data set that is read from files, very small."""
    write_idx(tmp_path, "MNIST")
    write_idx(tmp_path, "FashionMNIST")
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    write_cifar(tmp_path, datasets.CIFAR100, monkeypatch)
    write_svhn(tmp_path, monkeypatch)
    write_signs(tmp_path)
    write_folders(tmp_path, "facescrub", 4, (60, 60, 3))
    write_folders(tmp_path, "notmnist", 3, (28, 28))
    return tmp_path


def test_digits_are_all_there_once() -> None:
    parts = digits()
    assert {name: len(part.y) for name, part in parts.items()} == {
        "train": 1149, "validation": 288, "test": 360,
    }  # fmt: skip
    everything = torch.cat([part.x.flatten(1) for part in parts.values()])
    assert len(everything) == 1797
    assert everything.min() == 0
    assert everything.max() == 1
    for part in parts.values():  # stratified
        assert part.y.bincount().min() > 0.8 * len(part.y) / 10


@pytest.mark.parametrize("name", GENERATED)
def test_streams_are_functions_of_their_seed_and_touch_no_other(name: str) -> None:
    optional(name)
    sources.mnist1d.cache_clear()
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first, again, other = (make_stream(name, 2, seed) for seed in (3, 3, 4))
    read = [[task.train for task in stream] for stream in (first, again, other)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]
    assert [task.name for task in first] == [task.name for task in again]
    for a, b in zip(*read[:2], strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
    same = all(torch.equal(a.x, b.x) for a, b in zip(read[0], read[2], strict=True))
    assert same == (name in {"split-digits", "rotated-digits", "split-mnist1d"})


@pytest.mark.parametrize("name", GENERATED)
def test_images_lie_between_0_and_1_and_labels_below_the_classes(name: str) -> None:
    optional(name)
    checked(name, None, {"split": 5, "permuted": 10, "rotated": 5}, {"split-dsprites": 10})


@pytest.mark.parametrize("name", FROM_FILES)
def test_every_stream_of_files_loads_or_says_what_is_missing(name: str, files: Path) -> None:
    counts = {"split": 5, "permuted": 10, "rotated": 5, "mixture": 8}
    checked(name, files, counts, {"split-cifar100": 10})
    empty = files / "empty"
    for folder, where in ((None, "no --data-dir is given"), (empty, f"--data-dir {empty}")):
        with pytest.raises(ValueError, match=r"stream: .* is read from files") as caught:
            make_stream(name, None, 0, folder)
        assert where in str(caught.value)
        assert "MNIST/raw/" in str(caught.value) or "cifar-10" in str(caught.value)


def checked(name: str, folder: Path | None, counts: dict, special: dict) -> None:
    stream = make_stream(name, None, 0, folder)
    assert len(stream) == special.get(name, counts[name.partition("-")[0]])
    shape = stream[0].train.x.shape[1:]
    for task in stream:
        for part in (task.train, task.validation, task.test):
            assert part.x.dtype == torch.float32
            assert part.x.shape == (len(part.y), *shape)
            assert part.x.min() >= 0
            assert part.x.max() <= 1
            assert part.x.max() > 0.5
            assert part.y.unique().tolist() == list(range(task.classes))


def test_split_digits_are_two_digits_a_task() -> None:
    stream, everything = make_stream("split-digits", None, 0), digits()["test"]
    assert [task.classes for task in stream] == [2] * 5
    for index, task in enumerate(stream):
        mine = everything.y // 2 == index
        assert torch.equal(task.test.x, everything.x[mine])
        assert torch.equal(task.test.y, everything.y[mine] - 2 * index)
    assert [len(make_stream("split-digits", n, 0)) for n in (1, 2)] == [1, 2]


def test_permuted_and_rotated_digits_keep_their_pixels() -> None:
    plain = digits()["train"].x
    stream = make_stream("permuted-digits", 3, 0)
    assert torch.equal(stream[0].train.x, plain)
    assert not torch.equal(stream[1].train.x, stream[2].train.x)
    for task in stream:
        assert torch.equal(task.train.x.flatten(1).sort(1).values, plain.flatten(1).sort(1).values)
    turned = make_stream("rotated-digits", 2, 0)
    assert torch.equal(turned[0].train.x, plain)
    torch.testing.assert_close(turned[1].train.x, plain.rot90(1, (2, 3)))


def test_a_permutation_moves_pixels_with_all_their_colours(files: Path) -> None:
    plain, moved = make_stream("permuted-cifar10", 2, 0, files)
    assert not torch.equal(plain.train.x, moved.train.x)
    assert (moved.train.x[:, 2] <= 7 / 255 + 1e-6).sum() > 0.9 * moved.train.x[:, 2].numel()


@pytest.mark.parametrize(
    ("name", "tasks", "message"),
    [
        ("digits", None, r"stream: 'digits'\. Expected one of split-digits, "),
        ("split-digits", 3, r"3 tasks of the 10 classes of digits.* Expected one of 1, 2, 5\."),
        ("split-digits", 0, r"stream: tasks=0\. Expected at least 1\."),
        ("rotated-mnist1d", None, "cannot be rotated.* Expected split or permuted"),
        ("rotated-dsprites", None, "at random already.* Expected split or permuted"),
        ("mixture", 9, "mixture of 9 tasks. Expected at most 8"),
    ],
)
def test_streams_that_are_not_there(name: str, tasks: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(name, tasks, 0)


def test_the_divisors_of_a_hundred_classes_are_named(files: Path) -> None:
    with pytest.raises(ValueError, match=r"30 tasks of the 100 .* 1, 2, 4, 5, 10, 20, 25, 50\."):
        make_stream("split-cifar100", 30, 0, files)
    assert [task.classes for task in make_stream("split-cifar100", 20, 0, files)] == [5] * 20


def test_a_share_of_each_class_is_for_validation_and_never_all() -> None:
    labels = torch.tensor([0] * 20 + [1] * 5 + [2])
    parts = divided(Part(torch.arange(26), labels))
    assert parts["validation"].y.tolist() == [0, 0, 1]
    assert sorted(torch.cat([part.x for part in parts.values()]).tolist()) == list(range(26))


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_from_its_own_files_packed_or_not(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, "MNIST", packed)
    before = sorted(tmp_path.rglob("*"))
    task = make_stream("permuted-mnist", 1, 0, tmp_path)[0]
    assert sorted(tmp_path.rglob("*")) == before
    x, y = rows(10, (28, 28), 2)
    assert torch.equal(task.test.x, torch.tensor(x)[:, None].float() / 255)
    assert torch.equal(task.test.y, torch.tensor(y))
    assert len(task.train.y) + len(task.validation.y) == 10 * PER_CLASS


def test_only_the_files_that_are_missing_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path, "MNIST")
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="Missing:\nMNIST ") as caught:
        make_stream("split-mnist", None, 0, tmp_path)
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith("  ")] == ["  MNIST/raw/t10k-labels-idx1-ubyte"]
    with pytest.raises(ValueError, match="mixture is read from files") as caught:
        make_stream("mixture", None, 0, tmp_path)
    for name in ("facescrub/test/", "notmnist/train/", "train_32x32.mat", "gtsrb/GT-final_test.csv"):
        assert f"  {name}" in str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("split-mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("split-fashionmnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ("split-cifar10", "cifar-10-batches-py/data_batch_3"),
        ("split-cifar100", "cifar-100-python/meta"),
        ("mixture", "test_32x32.mat"),
        ("mixture", "facescrub/test/class 1/0.png"),
    ],
)
def test_files_that_are_damaged(name: str, damaged: str, files: Path) -> None:
    path = files / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"cannot be read \(.*Expected the files as they are published"
    ):
        make_stream(name, None, 0, files)


def test_folders_of_train_and_test_must_agree(files: Path) -> None:
    (files / "notmnist/test/class 2").rename(files / "notmnist/test/other")
    with pytest.raises(ValueError, match=r"NotMNIST.*train and test differ .* class 2"):
        make_stream("mixture", None, 0, files)


def test_the_mixture_is_eight_data_sets_in_the_order_of_the_seed(files: Path) -> None:
    streams = [make_stream("mixture", None, seed, files) for seed in (0, 0, 1)]
    names = [[task.name for task in stream] for stream in streams]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == len(MIXTURE) == 8
    # sklearn.utils.shuffle(numpy.arange(8), random_state=0), as the paper's code does
    order = [6, 2, 1, 7, 3, 0, 5, 4]
    titles = ["CIFAR-10", "CIFAR-100", "MNIST", "SVHN", "FashionMNIST", "TrafficSigns", "FaceScrub", "NotMNIST"]  # fmt: skip
    assert names[0] == [titles[index] for index in order]
    assert [task.name for task in make_stream("mixture", 3, 0, files)] == names[0][:3]
    by_name = {task.name: task for task in streams[0]}
    assert {name: task.classes for name, task in by_name.items()} == dict.fromkeys(titles, 10) | {
        "CIFAR-100": 100, "TrafficSigns": 43, "FaceScrub": 4, "NotMNIST": 3,
    }  # fmt: skip
    for task in by_name.values():
        assert task.test.x.shape[1:] == (3, 32, 32)
    x, y = rows(10, (32, 32, 3), 2)
    assert torch.equal(by_name["SVHN"].test.x, torch.tensor(x).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(by_name["SVHN"].test.y, torch.tensor(y))
    framed = by_name["MNIST"].test.x
    assert (framed[:, :, [0, 1, 30, 31]] == 0).all()
    assert (framed[:, :, 2:4, 2:4] == 1).all()
    blue = by_name["CIFAR-10"].test.x[:, 2]
    assert (blue == 7 / 255).all()


def test_shapes_are_new_in_every_task_and_the_same_in_a_longer_stream() -> None:
    optional("dsprites")
    short, long = make_stream("split-dsprites", 2, 0), make_stream("split-dsprites", 3, 0)
    assert torch.equal(short[1].train.x, long[1].train.x)
    assert [task.name for task in long] == ["shapes 0-4", "shapes 5-9", "shapes 10-14"]
    assert not torch.equal(long[0].test.x, long[1].test.x)
    flat = torch.cat([long[0].train.x, long[0].validation.x, long[0].test.x]).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_shapes_can_be_told_apart_at_every_size() -> None:
    optional("dsprites")
    small, large = (sprites(2, 0, side, {"train": 2, "validation": 1, "test": 1}) for side in (32, 64))
    a, b = (source.parts["train"].x.float() for source in (small, large))
    assert a.shape == (4, 3, 32, 32)
    assert b.shape == (4, 3, 64, 64)
    assert (a - torch.nn.functional.avg_pool2d(b, 2)).abs().mean() < 2  # the same pictures
    sized = make_stream("split-dsprites", 1, 0, None, 64)[0]
    assert sized.test.x.shape[-2:] == (64, 64)


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(ImportError, match=r"package nosuch, .*pip install 'hatfn\[extra\]'"):
        sources.needed("nosuch.data", "extra")


def test_a_missing_package_ends_the_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "idsprites", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--stream", "split-dsprites", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 1
    assert "pip install 'hatfn[dsprites]'" in " ".join(capsys.readouterr().out.split())


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_permuted_mnist_is_one_command_away(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_idx(tmp_path, "MNIST")
    out = tmp_path / "run"
    flags = ["--data-dir", str(tmp_path), "--tasks", "2", "--width", "16", "--epochs", "1"]
    cli.main(["run", "--stream", "permuted-mnist", *flags, "--out", str(out)])
    assert "drift       0.0" in capsys.readouterr().out
    config = resumed(RunConfig(resume=out))
    assert config.data_dir == tmp_path
    with pytest.raises(SystemExit):
        cli.main(["run", "--stream", "permuted-mnist", "--out", str(out)])
    assert "MNIST/raw/train-images-idx3-ubyte" in capsys.readouterr().out
