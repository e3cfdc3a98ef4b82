"""What goes wrong around a learner costs nothing but the step: the state before it is intact."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, equal, learn, learner
from torch import Tensor, nn

import hatfn
from hatfn.experiments import cli
from hatfn.experiments.run import loop as run_loop
from hatfn.experiments.run import measure, plots
from hatfn.experiments.run.folder import LOG
from hatfn.storage import container

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X, Y = torch.randn(8, 1, 6, 6), torch.randint(2, (8,))
HAT = learner(ConvNet(), X, optimizer=torchopt.adam(1e-2))
OPEN = HAT.begin(learn(HAT, HAT.init(0), X, 0), 1)
NORM = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def fingerprint(state: hatfn.HATState) -> list[tuple[int, bytes]]:
    return [(leaf._version, leaf.numpy().tobytes()) for leaf in optree.tree_leaves(state)]


class Slope(torch.autograd.Function):
    """The loss as it is, with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, slope: Any) -> Tensor:
        ctx.slope = slope
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope * (ctx.slope() if callable(ctx.slope) else ctx.slope), None


class Calls(nn.Module):
    """A network that calls something when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.act = Act()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


class Act(nn.Module):
    fault: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Act.fault is not None:
            raise Act.fault("in the module")
        return x.relu()


def with_slope(slope: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: Slope.apply(HAT.loss(logits, y), slope)


def adam_of(change: Callable[[Tensor], Tensor]) -> Any:
    def update(*args: Any, **kwargs: Any) -> Any:
        steps, moments = HAT.optimizer.update(*args, **kwargs)
        return optree.tree_map(change, steps), moments

    return HAT.optimizer._replace(update=update)


# Not finite, wherever it comes from.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("scale", [20.0, None], ids=["soft", "binary"])
@pytest.mark.parametrize("where", ["data", "one pixel", "loss", "gradient", "update"])
def test_what_is_not_finite_is_refused(where: str, scale: float | None, bad: float) -> None:
    hat, x = HAT, X
    match where:
        case "data":
            x = torch.full_like(X, bad)
        case "one pixel":
            x = X.index_put((torch.tensor([3]), *[torch.tensor([0])] * 3), torch.tensor(bad))
        case "loss":
            hat = replace(hat, loss=lambda logits, y: HAT.loss(logits, y) + bad)
        case "gradient":
            hat = replace(hat, loss=with_slope(bad))
        case "update":
            hat = replace(hat, optimizer=adam_of(lambda step: step + bad))
    before = fingerprint(OPEN)
    after, info = hat.update(OPEN, (x, Y), 1, scale)
    assert not info.ok
    assert equal(after, OPEN)
    assert fingerprint(OPEN) == before
    good, info = HAT.update(after, (X, Y), 1, scale)
    assert info.ok
    assert equal(good, HAT.update(OPEN, (X, Y), 1, scale)[0])
    assert not equal(good.params, OPEN.params)


def test_targets_that_are_not_finite_are_refused() -> None:
    module, x = nn.Linear(5, 3), torch.randn(8, 5)
    hat = hatfn.build(
        module, hatfn.trace(module, x), None, torchopt.adam(1e-2), num_tasks=1, loss=nn.functional.mse_loss
    )  # fmt: skip
    state = hat.begin(hat.init(0), 0)
    for bad in (torch.nan, torch.inf):
        after, info = hat.update(state, (x, torch.full((8, 3), bad)), 0, None)
        assert not info.ok
        assert equal(after, state)
    assert hat.update(state, (x, torch.zeros(8, 3)), 0, None)[1].ok


def test_one_replica_is_refused_and_the_others_go_on() -> None:
    many, states = hatfn.Replicas(HAT), hatfn.replicate(HAT, [0, 1, 2])
    states = many.begin(states, 1)
    x = torch.stack([X, X * torch.nan, X])
    after, info = many.update(states, (x, Y.expand(3, 8)), 1, 20.0)
    assert info.ok.tolist() == [True, False, True]
    for index, ok in enumerate([True, False, True]):
        pair = (hatfn.replicas.replica(both, index) for both in (after, states))
        assert equal(*pair) != ok


def test_statistics_that_are_not_finite_are_not_taken() -> None:
    assert equal(HAT.recalibrate(OPEN, [X, X * torch.nan], 1), OPEN)
    assert not equal(HAT.recalibrate(OPEN, [X], 1), OPEN)


# Broken off in the middle.

FAULTS = [torch.OutOfMemoryError, RuntimeError, MemoryError, KeyboardInterrupt]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "where", ["loss", "backward", "regularizer", "optimizer", "after the optimizer"]
)
def test_an_update_is_broken_off(where: str, fault: type[BaseException]) -> None:
    """The error comes through as it is; state, random numbers and modes are as before."""

    def broken(*_: Any, **__: Any) -> Any:
        raise fault("in the middle")

    hat = {
        "loss": lambda: replace(HAT, loss=broken),
        "backward": lambda: replace(HAT, loss=with_slope(broken)),
        "regularizer": lambda: replace(HAT, regularizer=broken),
        "optimizer": lambda: replace(HAT, optimizer=HAT.optimizer._replace(update=broken)),
        "after the optimizer": lambda: replace(HAT, optimizer=adam_of(broken)),
    }[where]()
    state, _ = HAT.update(OPEN, (X, Y), 1, 10.0)
    before, random = fingerprint(state), torch.get_rng_state()
    with pytest.raises(fault, match="in the middle"):
        hat.update(state, (X, Y), 1, 20.0)
    if where != "backward":  # vmap takes no autograd.Function of this kind
        with pytest.raises(fault, match="in the middle"):
            hatfn.Replicas(hat).update(hatfn.replicas.stack([state]), (X, Y), 1, 20.0, shared=True)
    assert fingerprint(state) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert HAT.update(state, (X, Y), 1, 20.0)[1].ok, "and it goes on"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_module_breaks_off(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch raises is explained, and only that."""
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    hat = learner(Calls(), x)
    state = hat.begin(hat.init(0), 1)
    before, expected = fingerprint(state), hat.update(state, (x, y), 1, 5.0)[0]
    with monkeypatch.context() as patch:
        patch.setattr(Act, "fault", fault)
        with pytest.raises(ValueError if fault is RuntimeError else fault, match="in the module"):
            hat.update(state, (x, y), 1, 5.0)
    assert fingerprint(state) == before
    assert equal(hat.update(state, (x, y), 1, 5.0)[0], expected)


# A run.

ARGUMENTS = ["--width", "20", "--epochs", "2", "--tasks", "2", "--batch-size", "128", "--save-every", "0",
             "--optimizer", "sgd", "--momentum", "0.9", "--lr", "0.05", "--dropout", "0.2"]  # fmt: skip
CTRL_C, MEMORY = KeyboardInterrupt(), torch.OutOfMemoryError("no memory is left")
DISK = OSError(errno.ENOSPC, "no space is left")
CUTS = {  # what fails, how, and at which call
    "in a step": (hatfn.HAT, "update", CTRL_C, 9),
    "in the first step": (hatfn.HAT, "update", MEMORY, 0),
    "before a task": (hatfn.HAT, "begin", CTRL_C, 1),
    "at the end of a task": (hatfn.HAT, "consolidate", CTRL_C, 0),
    "after a step": (run_loop, "accuracy", MEMORY, 3),
    "while it is measured": (measure, "evaluate", MEMORY, 1),
    "while data are read": (run_loop, "training_part", OSError(errno.EIO, "the loader died"), 1),
    "before a save": (container, "serialize", CTRL_C, 4),
    "in a save": (os, "fsync", DISK, 10),
    "at the end of a save": (Path, "replace", CTRL_C, 3),
    "while plots are drawn": (plots, "training", DISK, 0),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    cli.main(["run", *ARGUMENTS, "--out", str(folder)])
    return folder


def same(folder: Path, other: Path) -> bool:
    """State, log and result, but for the time that it took."""
    trees = [container.read(path / "state.safetensors") for path in (folder, other)]
    results = [json.loads((path / "result.json").read_text()) for path in (folder, other)]
    for result in results:
        del result["seconds"]
    logs = [(path / LOG).read_text() for path in (folder, other)]
    return equal(trees[0][1], trees[1][1]) and results[0] == results[1] and logs[0] == logs[1]


def failing(function: Callable[..., Any], error: BaseException, nth: int) -> Callable[..., Any]:
    """The function, whose nth call fails instead."""
    calls = iter(range(10**9))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("cut", CUTS)
def test_a_run_goes_on(whole: Path, cut: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Wherever it is cut off: the command says how to go on, and that ends as if nothing had been."""
    target, name, error, nth = CUTS[cut]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing(getattr(target, name), error, nth))
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", *ARGUMENTS, "--out", str(tmp_path)])
    assert stop.value.code == (130 if error is CTRL_C else 1)
    said = "".join(capsys.readouterr().out.split())
    assert f"togoon:hatfnrun--resume{tmp_path}" in said
    if isinstance(error, OSError):
        assert error.strerror.replace(" ", "") in said
    assert not list(tmp_path.glob(".*.tmp"))
    assert not (tmp_path / "result.json").exists() or name == "training"
    cli.main(["run", "--resume", str(tmp_path)])
    assert same(tmp_path, whole)


# A disk that is full, and a folder that cannot be written to. (Tests may run as root, whom no
# permission stops: the system's answers are made up.)


def refuse(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    """Let the system refuse one of the calls that a write consists of."""

    def no(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    class Full:
        """A file that takes half of what it is given."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            no()

    plain = Path.open

    def opened(path: Path, mode: str = "r", **how: Any) -> Any:
        if mode != "xb":
            return plain(path, mode, **how)
        return no() if where == "open" else Full(plain(path, mode))

    match where:
        case "open" | "write":
            monkeypatch.setattr(Path, "open", opened)
        case "rename":
            monkeypatch.setattr(Path, "replace", no)
        case "fsync":
            monkeypatch.setattr(os, "fsync", no)
        case "fsync of the folder":
            monkeypatch.setattr(os, "fsync", failing(os.fsync, OSError(number, os.strerror(number)), 1))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["open", "write", "fsync", "rename", "fsync of the folder"])
def test_a_failed_write_leaves_a_whole_file(
    where: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = tmp_path / "state.safetensors", HAT.consolidate(OPEN, 1, [])
    hatfn.save(path, OPEN, HAT)
    with monkeypatch.context() as patch:
        refuse(patch, where, number)
        with pytest.raises(OSError, match=f"{path.name} could not be written") as caught:
            hatfn.save(path, new, HAT)
    assert caught.value.errno == number
    for word in (os.strerror(number), "Expected a folder that exists and can be written to", "bytes"):
        assert word in str(caught.value)
    assert isinstance(caught.value, PermissionError) == (number == errno.EACCES)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    renamed = where == "fsync of the folder"
    assert equal(hatfn.load(path, HAT), new if renamed else OPEN)
    hatfn.save(path, new, HAT)
    assert equal(hatfn.load(path, HAT), new)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_run_that_cannot_write_says_so_at_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), str(tmp_path / "runs"))

    monkeypatch.setattr(Path, "mkdir", no)
    monkeypatch.setattr(cli, "start", failing(cli.start, AssertionError("not at once"), 0))
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", *ARGUMENTS, "--out", str(tmp_path / "runs")])
    assert stop.value.code == 1
    said = "".join(capsys.readouterr().out.split())
    assert os.strerror(number).replace(" ", "") in said
    assert str(tmp_path / "runs") in said


def test_a_state_is_not_saved_where_no_folder_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/s could not be written.*folder that exists"):
        hatfn.save(tmp_path / "nowhere" / "s", OPEN, HAT)


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """Nor is a device: a file of that name would break every other program's use of it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        FileExistsError, match=r"pipe could not be written \(it is a device or a pipe\)"
    ):
        hatfn.save(tmp_path / "pipe", OPEN, HAT)
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


# Loaders.


def dying(batches: list[Any]) -> Iterator[Any]:
    yield from batches
    raise ConnectionError("the loader died")


LEARNED = HAT.consolidate(OPEN, 1, [])
READERS: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda read: hatfn.evaluate(HAT, LEARNED, [[(X, Y)], read([(X, Y)] * 2), []]),
    "readiness": lambda read: hatfn.readiness(HAT, OPEN, read([(X, Y)] * 2), 1),
    "recalibrate": lambda read: HAT.recalibrate(OPEN, read([X] * 2), 1),
    "recalibrate replicas": lambda read: hatfn.Replicas(HAT).recalibrate(
        hatfn.replicas.stack([OPEN, OPEN]), read([X] * 2), 1, shared=True
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_loader_dies(reader: str) -> None:
    """Its own error, and nothing of what was read before it counts."""
    before = [fingerprint(state) for state in (OPEN, LEARNED)]
    with pytest.raises(ConnectionError, match="the loader died"):
        READERS[reader](dying)
    assert [fingerprint(state) for state in (OPEN, LEARNED)] == before
    READERS[reader](list)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("given", ["nothing", "an empty batch"])
def test_a_loader_that_gives_nothing_is_told(reader: str, given: str) -> None:
    def nothing(batches: list[Any]) -> Any:
        if given == "nothing":
            return iter(())
        one = batches[0]
        return [one[:0] if isinstance(one, Tensor) else (one[0][:0], one[1][:0])]

    with pytest.raises(ValueError, match=f"{reader.split(maxsplit=1)[0]}.* Expected at least one"):
        READERS[reader](nothing)


LABELS = [torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize(
    "reader",
    {
        "update": lambda y: HAT.update(OPEN, (X, y), 1, 5.0),
        "readiness": lambda y: hatfn.readiness(HAT, OPEN, [(X, y)], 1),
        "evaluate, loader 0": lambda y: hatfn.evaluate(HAT, LEARNED, [[(X, y)], [(X, Y)], []]),
        "begin": lambda y: HAT.begin(LEARNED, 2, init_from="similar", batch=(X, y)),
        "update replicas": lambda y: hatfn.Replicas(HAT).update(
            hatfn.replicas.stack([OPEN]), (X, y), 1, 5.0, shared=True
        ),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_labels_of_another_type(
    reader: tuple[str, Callable[[Tensor], Any]], dtype: torch.dtype
) -> None:
    where, read = reader
    with pytest.raises(TypeError, match=f"{where.removesuffix(' replicas')}: .*{dtype}.*int64"):
        read(Y.to(dtype))
    read(Y)


def test_a_single_sample_and_batch_norm() -> None:
    """In training it has no variance over one sample; where it is served it needs none."""
    x = torch.randn(8, 5)
    hat = learner(NORM, x, head="3")
    state = hat.begin(hat.init(0), 1)
    many, states = hatfn.Replicas(hat), hatfn.replicas.stack([state])
    before = fingerprint(state)
    for attempt in (
        lambda: hat.update(state, (x[:1], Y[:1]), 1, 5.0),
        lambda: hat.recalibrate(state, [x, x[:1]], 1),
        lambda: many.update(states, (x[:1], Y[:1]), 1, 5.0, shared=True),
    ):
        with pytest.raises(ValueError, match=r"x of shape \(1, 5\).*more than one sample"):
            attempt()
    assert fingerprint(state) == before
    state, info = hat.update(state, (x[:2], Y[:2]), 1, 5.0)
    assert info.ok
    assert hat.forward(hat.consolidate(state, 1), x[:1], 1).shape == (1, 2)
    wide, one = HAT.update(OPEN, (X[:1], Y[:1]), 1, 5.0)  # one image, of many pixels
    assert one.ok
    assert not equal(wide.params, OPEN.params)
