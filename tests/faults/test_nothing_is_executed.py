"""No pickle, no code: bytes of strangers are never executed."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from nets import learner
from strangers import Payload, refused

import hatfn
from hatfn.experiments.run.folder import CONFIG, LOG, PROGRESS
from hatfn.experiments.streams import make_stream
from hatfn.models import MLP
from hatfn.storage import checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore::hatfn.HATWarning"), pytest.mark.usefixtures("wide")]

ROOT = Path(hatfn.__file__).parent
X = torch.randn(6, 5)
HAT = learner(MLP(5, 3, width=8), X, optimizer=torchopt.adam(1e-2))
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


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


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
