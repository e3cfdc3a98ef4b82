"""States of strangers, with all checksums right: nothing in them is obeyed or believed."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from nets import equal, learn, learner
from safetensors.torch import save
from strangers import DEEP, TEXTS

import hatfn
from hatfn.models import MLP
from hatfn.storage import checkpoint, container

pytestmark = [pytest.mark.filterwarnings("ignore::hatfn.HATWarning"), pytest.mark.usefixtures("wide")]

X = torch.randn(6, 5)
HAT = learner(MLP(5, 3, width=8), X, optimizer=torchopt.adam(1e-2))
STATE = learn(HAT, HAT.init(0), X, 0)


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
