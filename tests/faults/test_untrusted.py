"""States and run folders of strangers are data: nothing in them is executed, obeyed or believed."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from nets import equal, learn, learner
from safetensors.torch import save

import hatfn
from hatfn.experiments import cli
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.folder import CONFIG, LOG, PROGRESS, RunFolder, resumed
from hatfn.experiments.run.loop import learn as learn_run
from hatfn.experiments.run.loop import start
from hatfn.experiments.streams import make_stream
from hatfn.models import MLP
from hatfn.storage import checkpoint, container

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

ROOT = Path(hatfn.__file__).parent
X = torch.randn(6, 5)
HAT = learner(MLP(5, 3, width=8), X, optimizer=torchopt.adam(1e-2))
STATE = learn(HAT, HAT.init(0), X, 0)
QUICK = RunConfig(width=20, epochs=1, tasks=2, batch_size=256, save_every=0.0)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No message is wrapped."""
    monkeypatch.setenv("COLUMNS", "10000")


# No pickle, no code.

LOADERS = [
    "storage/container.py",
    "storage/checkpoint.py",
    "experiments/run/folder.py",
    "experiments/run/result.py",
    "experiments/run/config.py",
]
MODULES = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "importlib",
    "subprocess",
    "runpy",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "import_module",
}
DANGEROUS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "os.system"}


def forbidden(source: str) -> list[str]:
    """What could turn bytes into code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [
                name for name in names if name.split(".")[0] in MODULES and name != "importlib.metadata"
            ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS | DANGEROUS or any(key.arg == "allow_pickle" for key in node.keywords):
                found.append(name)
    return found


@pytest.mark.parametrize("name", LOADERS)
def test_nothing_on_the_way_executes_what_it_reads(name: str) -> None:
    assert forbidden((ROOT / name).read_text()) == []


def test_what_executes_is_found() -> None:
    assert (
        len(
            forbidden(
                "import pickle\nfrom yaml import load\ntorch.load(f)\neval(x)\nf(allow_pickle=True)"
            )
        )
        == 5
    )


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that was cut off in its first task."""
    folder = tmp_path_factory.mktemp("begun")
    config = replace(QUICK, out=folder)
    files, run = RunFolder(config), start(config)
    for event in learn_run(run):
        files.log(run, event)
        if len(run.results[0].drift):
            break
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(begun: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    for name, data in begun.items():
        (path / name).write_bytes(data)
    return path


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says, in one line, when it does not go on."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--resume", str(folder)])
    assert stop.value.code == 1
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", [CONFIG, LOG, PROGRESS])
def test_a_pickle_in_the_place_of_a_file_of_a_run(
    name: str, kind: str, folder: Path, tmp_path, capsys
) -> None:
    mark = tmp_path / "mark"
    if kind == "pickle":
        (folder / name).write_bytes(pickle.dumps(Payload(mark)) * (1000 if name == LOG else 1))
    else:
        torch.save(Payload(mark), folder / name)
    assert name.partition(".")[0] in refused(folder, capsys)
    assert not mark.exists()


@pytest.mark.parametrize("hat", [HAT, HAT.wiring], ids=["learner", "wiring"])
def test_a_pickle_in_the_place_of_a_state(hat: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "s", tmp_path / "s.pt", tmp_path / "s.safetensors"):
        torch.save(Payload(tmp_path / "mark"), path)
        with pytest.raises(hatfn.CheckpointError, match="cannot be read"):
            hatfn.load(path, hat)
        with pytest.raises(hatfn.CheckpointError, match="cannot be read"):
            checkpoint.read_meta(path)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_among_the_data(tmp_path: Path) -> None:
    """CIFAR's files are pickles as published; no others are opened."""
    mark = tmp_path / "mark"
    cifar = tmp_path / "cifar-10-batches-py"
    cifar.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta"):  # fmt: skip
        (cifar / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match="another MD5 checksum"):
        make_stream("split-cifar10", data_dir=tmp_path)
    assert not mark.exists()


# States: with all checksums right, as somebody writes them who knows the format.


def parts() -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The fields and the stored tensors of a good file."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"hatfn-{os.getpid()}.safetensors"
    hatfn.save(path, STATE, HAT, {"note": "good"})
    try:
        return container._open(path, tensors=True)
    finally:
        path.unlink()


FIELDS, STORED = parts()


def forge(path: Path, fields: dict[str, str], stored: dict[str, torch.Tensor]) -> Path:
    whole = FIELDS | fields | {"tensors": container._digest_of_tensors(stored)}
    path.write_bytes(save(stored, whole | {"sha256": container._digest_of_fields(whole)}))
    return path


def test_a_forgery_without_malice_is_a_state(tmp_path: Path) -> None:
    path = forge(tmp_path / "s", {}, STORED)
    assert equal(hatfn.load(path, HAT), STATE)
    assert checkpoint.read_meta(path) == {"note": "good"}


DEEP = "[" * 100_000
TEXTS = {
    "deep": DEEP, "a list": "[]", "null": "null", "a number": "1", "a string": '"x"', "no JSON": "{", "a deep value": '{"a":' + DEEP,
    "digits": '{"learned": [' + "9" * 5000 + "]}",
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "negative": [-1, -3], "too many": [2**60], "overflow": [2**70, 0], "overflow too": [2**63, 2**63], "floats": [3.0], "bools": [True, 3],
    "strings": ["3"], "many": [1] * 100_000, "null": None, "an object": {"3": 3}, "a number": 3, "nested": [[3]],
}  # fmt: skip


@pytest.mark.parametrize("field", ["header", "bits"])
@pytest.mark.parametrize("text", TEXTS)
def test_headers_that_are_none(field: str, text: str, tmp_path: Path) -> None:
    path = forge(tmp_path / "s", {field: TEXTS[text]}, STORED)
    with pytest.raises(hatfn.CheckpointError, match=str(path)):
        hatfn.load(path, HAT)
    if field == "header":
        with pytest.raises(hatfn.CheckpointError, match=str(path)):
            checkpoint.read_meta(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_shapes_that_cannot_be(shape: str, tmp_path: Path) -> None:
    bits = json.loads(FIELDS["bits"]) | {"learned": SHAPES[shape]}
    path = forge(tmp_path / "s", {"bits": json.dumps(bits)}, STORED)
    with pytest.raises(hatfn.CheckpointError, match=str(path)):
        hatfn.load(path, HAT)


def test_bools_of_a_byte_are_refused(tmp_path: Path) -> None:
    """A byte may be neither 0 nor 1, and what such a bool does is not defined."""
    bits = json.loads(FIELDS["bits"])
    del bits["learned"]
    stored = STORED | {"learned": torch.tensor([True, False, False])}
    path = forge(tmp_path / "s", {"bits": json.dumps(bits)}, stored)
    with pytest.raises(hatfn.CheckpointError, match="'learned' has bools of a byte each"):
        hatfn.load(path, HAT)


NAMES = [
    "../../x", "/etc/passwd", "__class__", "__class__/x", "params/__class__", "params/../x", "params/", "params", "learned/x", "masks/__init__",
    "_replace", "_replace/x", "hyper", "opt", "", "/", "task_params/head.weight.x", "task_buffers/x", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("hat", [HAT, HAT.wiring], ids=["learner", "wiring"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_no_state_has(name: str, hat: Any, tmp_path: Path) -> None:
    path = forge(tmp_path / "s", {}, STORED | {name: torch.zeros(3)})
    with pytest.raises(hatfn.CheckpointError, match=r"does not fit|is no part of one") as caught:
        hatfn.load(path, hat)
    assert str(caught.value).isprintable()
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("name", "hat"),
    [
        ("params/hidden.0.weight", HAT), ("params/hidden.0.weight", HAT.wiring),
        ("embeddings/hidden.1", HAT), ("embeddings/hidden.1", HAT.wiring),
        ("task_params/head.bias", HAT),  # a wiring does not know the widths of heads
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_shapes_that_the_learner_does_not_have(name: str, hat: Any, tmp_path: Path) -> None:
    for wrong in (STORED[name][..., :-1], STORED[name][None], STORED[name][:0]):
        path = forge(tmp_path / "s", {}, STORED | {name: wrong.clone()})
        with pytest.raises(hatfn.CheckpointError, match="does not fit"):
            hatfn.load(path, hat)


def test_moments_by_hostile_names_are_names(tmp_path: Path) -> None:
    name = f"opt_state.__import__('os').mkdir('{tmp_path / 'mark'}')"
    path = forge(tmp_path / "s", {}, STORED | {name: torch.zeros(3)})
    loaded = hatfn.load(path, HAT)  # with a warning that these are no moments of the optimiser
    assert equal(loaded._replace(opt_state=()), STATE._replace(opt_state=()))
    assert not (tmp_path / "mark").exists()


def test_what_is_quoted_cannot_command_a_terminal(tmp_path: Path) -> None:
    header = json.loads(FIELDS["header"]) | {"wiring": "\x1b[2J\x07" * 9, "kind": "state"}
    path = forge(tmp_path / "s", {"header": json.dumps(header)}, STORED)
    with pytest.raises(hatfn.CheckpointError, match="another wiring") as caught:
        hatfn.load(path, HAT)
    assert str(caught.value).isprintable()
    header = json.loads(FIELDS["header"]) | {"classes": [0] * 10**6}
    path = forge(tmp_path / "s", {"header": json.dumps(header)}, STORED)
    with pytest.raises(hatfn.CheckpointError) as caught:
        hatfn.load(path, HAT)
    assert len(str(caught.value)) < 5000


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
CLAIMS: dict[str, tuple[Any, int | None]] = {  # a header, and the length that is claimed for it
    "2^60 numbers": ({"a": ENTRY | {"shape": [2**60], "data_offsets": [0, 2**62]}}, None),
    "a product that overflows": ({"a": ENTRY | {"shape": [2**40, 2**40]}}, None),
    "a number that overflows": ({"a": ENTRY | {"shape": [2**70]}}, None),
    "a negative number": ({"a": ENTRY | {"shape": [-2]}}, None),
    "offsets beyond the file": ({"a": ENTRY | {"shape": [2**28], "data_offsets": [0, 2**30]}}, None),
    "offsets backwards": ({"a": ENTRY | {"data_offsets": [8, 0]}}, None),
    "offsets that overlap": ({"a": ENTRY, "b": ENTRY}, None),
    "a hole": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 24]}}, None),
    "numbers of no type": ({"a": ENTRY | {"dtype": "O"}}, None),
    "a GiB without a byte": ({"a": ENTRY | {"shape": [0, 2**28], "data_offsets": [0, 2**30]}}, None),
    "a header beyond the file": ({"a": ENTRY}, 2**30),
    "a header of 2^63": ({"a": ENTRY}, 2**63),
    "an empty header": ({}, 0),
    "a deep header": (DEEP, None),
    "deep metadata": ('{"__metadata__": {"format": ' + DEEP, None),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_costs_nothing(claim: str, tmp_path: Path) -> None:
    header, length = CLAIMS[claim]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "s"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(24))
    tracemalloc.start()
    try:
        for read in (lambda: hatfn.load(path, HAT.wiring), lambda: checkpoint.read_meta(path)):
            with pytest.raises(hatfn.CheckpointError, match=str(path)):
                read()
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


# Folders of runs.

SETTINGS: dict[str, Any] = {
    "lr": math.nan, "s_max": "1e3", "width": 2**70, "epochs": 0, "batch_size": -5, "seed": 2**64, "seeds": 0, "dropout": [0.5],
    "device": "cpu\x1b[2J", "model": "hf-hub:stranger/model", "stream": "split-../../etc", "data_dir": "/tmp\n", "out": ["x"], "__class__": "x",
    "../x": 1, "weight_decay": 10**400, "tasks": True, "max_norm": {}, "resume": 7, "depth": None, "compensation": "eval",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS, ids=ascii)
def test_settings_that_no_run_has(name: str, folder: Path, capsys) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {name: SETTINGS[name]}))
    said = refused(folder, capsys)
    assert name in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "text", [*TEXTS.values(), " " * 2**21, "\xff"], ids=[*TEXTS, "large", "no UTF-8"]
)
def test_settings_that_are_none(text: str, folder: Path, capsys) -> None:
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert CONFIG in refused(folder, capsys)


def test_a_run_writes_into_its_folder_alone(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Whatever the settings call ``out`` and ``resume``."""
    elsewhere = tmp_path / "elsewhere"
    settings = json.loads((folder / CONFIG).read_text())
    settings |= {"out": str(elsewhere), "resume": str(tmp_path / "other")}
    (folder / CONFIG).write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    cli.main(["run", "--resume", str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder / "result.json").exists()


@pytest.mark.parametrize(
    "name", [CONFIG, LOG, PROGRESS, "result.json", "training.png", "state.safetensors"]
)
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_links_and_pipes_are_refused(
    name: str, kind: str, folder: Path, tmp_path: Path, capsys
) -> None:
    """A link would have the log cut or a plot written wherever it leads; a pipe is read for ever."""
    mine = tmp_path / "mine"
    mine.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"mine")
    before = mine.read_bytes()
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(mine if kind == "link" else tmp_path / "new")
    assert f"'{name}' is {'no plain file' if kind == 'pipe' else 'a link'}" in refused(folder, capsys)
    assert mine.read_bytes() == before
    assert not (tmp_path / "new").exists()


def progress(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    header, leaves = container.read(folder / PROGRESS)
    change(header, leaves)
    container.write(folder / PROGRESS, leaves, header)


HEADERS: dict[str, Any] = {
    "place": [[0, 0], [-1, 0, 0], [99, 0, 0], [0, 99, 0], [0, 0, -1], ["0", 0, 0], [0.5, 0, 0], None, {}, [2**70, 0, 0]],
    "log": [-1, 2**62, 2**70, "3", 1.5, None],
    "seconds": ["x", None, [], {}],
    "machine": [[], None, 3],
    "config": [None, {}, []],
    "results": [[], None, [{}], [None], [1, 2], {}, "x"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in HEADERS.items() for v in vs], ids=repr)
def test_progress_that_no_run_makes(name: str, value: Any, folder: Path, capsys) -> None:
    before = (folder / LOG).read_bytes()
    progress(folder, lambda header, _: header.update({name: value}))
    assert PROGRESS in refused(folder, capsys)
    progress(folder, lambda header, _: header.pop(name))
    assert PROGRESS in refused(folder, capsys)
    assert (folder / LOG).read_bytes() == before, "nothing is cut before all is looked at"


RESULTS: dict[str, list[Any]] = {
    "accuracy_matrix": [[], [[1.0]], "x", None], "drift": ["x", [[0.0]], None], "free_units": [3, [3], [{"a": "b"}]],
    "free_weights": [[], None], "closings": [[[1.0]], "x"], "seconds": [None, "x"], "task_inference": [[0.0] * 9],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in RESULTS.items() for v in vs], ids=repr)
def test_results_that_no_run_has(name: str, value: Any, folder: Path, capsys) -> None:
    progress(folder, lambda header, _: header["results"][0].update({name: value}))
    assert PROGRESS in refused(folder, capsys)


@pytest.mark.parametrize(
    "name", ["logits/0/7", "logits/-1/0", "logits/0/../x", "logits/9/0", "logits", "../x", "params/x"]
)
def test_tensors_that_no_run_has(name: str, folder: Path, capsys) -> None:
    progress(folder, lambda _, leaves: leaves.update({name: torch.zeros(3)}))
    assert f"{name} is not expected" in refused(folder, capsys)


def test_a_machine_by_a_hostile_name_is_shown_as_text(folder: Path, capsys) -> None:
    progress(folder, lambda header, _: header["machine"].update({"torch": "[/red]\x1b[2J"}))
    cli.main(["run", "--resume", str(folder)])
    said = capsys.readouterr().out
    assert "[/red]" in said
    assert "\x1b[2J" not in said


STEP = {
    "task": 0,
    "epoch": 0,
    "step": 1,
    "steps": 2,
    "loss": 1.0,
    "penalty": 0.0,
    "scale": 1.0,
    "accuracy": 0.5,
}
LINES = [
    b"[]",
    b"3",
    b"{",
    DEEP.encode(),
    b"\xff",
    json.dumps(STEP | {"loss": "x"}).encode(),
    json.dumps(STEP | {"task": None}).encode(),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: ascii(line[:20]))
def test_lines_that_no_run_logs(line: bytes, folder: Path, capsys) -> None:
    """Told before anything is learned, not when the plots are drawn."""
    whole = line + b"\n" + json.dumps(STEP).encode()
    (folder / LOG).write_bytes(whole)
    progress(folder, lambda header, _: header.update(log=len(line) + 1))
    assert f"{LOG}, line 1, is not of a run" in refused(folder, capsys)
    assert (folder / LOG).read_bytes() == whole


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", Path(__file__)):
        with pytest.raises(ValueError, match="no run was begun there"):
            resumed(RunConfig(resume=path))
