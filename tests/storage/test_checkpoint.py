"""States on disk: the same state comes back, and nothing else ever does."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, equal, learn, learner, moved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hatfn
from hatfn.models import MLP
from hatfn.storage import checkpoint, container

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X = torch.randn(8, 1, 6, 6)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[hatfn.HAT, hatfn.HATState, Path]:
    hat = learner(ConvNet(), X)
    state = learn(hat, hat.init(0), X, 1)
    path = tmp_path / "state.safetensors"
    hatfn.save(path, state, hat, {"note": "one task"})
    return hat, state, path


def test_what_is_saved_comes_back(saved) -> None:
    hat, state, path = saved
    loaded = hatfn.load(path, hat)
    assert equal(loaded, state), "moments included"
    assert torch.equal(hat.forward(loaded, X, 1), hat.forward(state, X, 1))
    assert checkpoint.read_meta(path) == {"note": "one task"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("together", [0, [0, 2]], ids=["one task", "two together"])
def test_training_goes_on_as_if_nothing_had_been(saved, together: Any, tmp_path: Path) -> None:
    """In the middle of a task, with momentum: the next steps are the same to the bit."""
    hat, state, _ = saved
    y = torch.randint(2, (8,))
    batch = (X, y) if together == 0 else (torch.stack([X, X]), torch.stack([y, y]))
    state = hat.begin(state, together)
    for _ in range(2):
        state, _ = hat.update(state, batch, together, 20.0)
    hatfn.save(tmp_path / "s", state, hat)
    loaded = hatfn.load(tmp_path / "s", hat)
    after, _ = hat.update(state, batch, together, 30.0)
    assert moved(state, after)
    assert equal(hat.update(loaded, batch, together, 30.0)[0], after)


def test_a_wiring_alone_will_do(saved) -> None:
    """For those who have no learner: everything but the moments."""
    hat, state, path = saved
    loaded = hatfn.load(path, hat.wiring)
    assert equal(loaded, state._replace(opt_state=()))
    hatfn.save(path, state, hat.wiring)
    assert equal(hatfn.load(path, hat.wiring), state._replace(opt_state=()))
    with pytest.warns(hatfn.HATWarning, match="no optimizer state of this optimizer"):
        again = hatfn.load(path, hat)
    assert equal(again._replace(opt_state=()), state._replace(opt_state=()))
    learn(hat, again, X, 0)


def test_a_module_without_buffers_comes_back(tmp_path: Path) -> None:
    hat = learner(MLP(5, 3, width=16), torch.randn(1, 5), optimizer=torchopt.adam(1e-3))
    hatfn.save(tmp_path / "s", hat.init(0), hat)
    assert equal(hatfn.load(tmp_path / "s", hat), hat.init(0))


def test_moments_of_another_optimiser_start_anew(saved) -> None:
    hat, state, path = saved
    other = replace(hat, optimizer=learner(ConvNet(), X, optimizer=torchopt.adam(1e-3)).optimizer)
    with pytest.warns(hatfn.HATWarning, match="no optimizer state of this optimizer"):
        loaded = hatfn.load(path, other)
    assert equal(loaded._replace(opt_state=()), state._replace(opt_state=()))
    learn(other, loaded, X, 0)


def test_of_another_learner_is_refused(saved, tmp_path: Path) -> None:
    _, _, path = saved
    other = learner(MLP(5, 3, width=16), torch.randn(1, 5))
    with pytest.raises(hatfn.CheckpointError, match="another wiring"):
        hatfn.load(path, other)
    with pytest.raises(hatfn.CheckpointError, match=r"classes=\[3, 2, 3\], the given one has \[3, 2\]"):
        hatfn.load(path, learner(ConvNet(), X, classes=[3, 2]))
    with pytest.raises(
        hatfn.CheckpointError, match=r"protection.* torch.bool, expected .* torch.float32"
    ):
        hatfn.load(path, learner(ConvNet(), X, protection="paper"))
    container.write(tmp_path / "other", {}, {"kind": "sketch"})
    with pytest.raises(hatfn.CheckpointError, match="holds 'sketch'"):
        hatfn.load(tmp_path / "other", other)


def test_the_header_says_whose_it_is(saved) -> None:
    hat, _, path = saved
    header = container.read_header(path)
    assert header["wiring"] == hat.wiring.fingerprint
    assert header["classes"] == [3, 2, 3]
    with safe_open(path, "pt") as file:
        assert file.metadata()["hatfn"]


class Away(Tensor):
    """A tensor on CUDA, as far as one can be had without: its numbers come by a copy to the CPU only."""

    def __new__(cls, here: Tensor) -> Away:
        return Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device="cuda"
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].here)
        if function is torch.ops.aten._to_copy.default and kwargs["device"] == torch.device("cpu"):
            return args[0].here.clone()
        raise RuntimeError(f"{function} on CUDA, which is not there")


def test_a_state_on_cuda_is_loaded_where_the_learner_is(saved, tmp_path: Path) -> None:
    hat, state, path = saved
    away: hatfn.HATState = optree.tree_map(Away, state)
    assert {leaf.device.type for leaf in optree.tree_leaves(away)} == {"cuda"}
    hatfn.save(tmp_path / "away", away, hat, {"note": "one task"})
    assert b"cuda" not in (tmp_path / "away").read_bytes(), "a file knows of no device"
    loaded = hatfn.load(tmp_path / "away", hat)
    assert equal(loaded, state)
    assert {leaf.device.type for leaf in optree.tree_leaves(loaded)} == {"cpu"}
    far = optree.tree_map(lambda leaf: leaf.to("meta"), state)
    found = optree.tree_leaves(checkpoint.restored(path, container.read(path)[1], far, hat))
    assert {leaf.device.type for leaf in found} == {"meta"}, "and the other way round"


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 0, 3), (2, 3, 4)], ids=str
)
def test_bools_of_any_shape_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    odd = torch.rand(shape) < 0.5
    tensors = {"a": odd, "b": ~odd, "c": odd.mT if odd.dim() > 1 else odd}
    container.write(tmp_path / "s", tensors, {})
    _, loaded = container.read(tmp_path / "s")
    assert equal(loaded, tensors)
    assert all(mask.dtype == torch.bool for mask in loaded.values())


def test_a_bool_takes_a_bit(tmp_path: Path) -> None:
    hat = learner(MLP(64, 3, width=512), torch.randn(1, 64), optimizer=torchopt.sgd(0.1))
    state = hat.init(0)
    hatfn.save(tmp_path / "s", state, hat)
    entries = sum(p.numel() for p in state.protection.values())
    floats = sum(
        leaf.nbytes
        for tree in (state.params, state.task_params, state.embeddings)
        for leaf in tree.values()
    )
    rest = (tmp_path / "s").stat().st_size - floats
    assert entries / 8 < rest < entries / 8 + 5000, "one bit per shared weight, and a header"


@pytest.mark.parametrize("name", ["missing", "empty", "a folder", "other tensors", "a pickle", "text"])
def test_what_is_no_state_is_refused(saved, name: str) -> None:
    hat, state, path = saved
    path.unlink()
    match name:
        case "empty":
            path.write_bytes(b"")
        case "a folder":
            path.mkdir()
        case "other tensors":
            save_file({"w": torch.zeros(3)}, path)
        case "a pickle":
            torch.save(state, path)
        case "text":
            path.write_text("{}" * 100)
    with pytest.raises(hatfn.CheckpointError, match=str(path)):
        hatfn.load(path, hat)
    with pytest.raises(hatfn.CheckpointError, match=str(path)):
        checkpoint.read_meta(path)


@pytest.mark.parametrize("version", ["1", "2", "4", "99", "", "three"])
def test_another_format_is_refused_by_name(saved, version: str) -> None:
    hat, _, path = saved
    leaves, metadata = opened(path)
    save_file(leaves, path, metadata | {"format": version, "hatfn": "9.8.7"})
    with pytest.raises(hatfn.CheckpointError, match=rf"format '{version}', written by hatfn 9\.8\.7"):
        hatfn.load(path, hat)


def opened(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


@pytest.mark.parametrize("wrong", ["a leaf less", "a leaf more", "a shape", "a type", "no learned"])
def test_wrong_content_with_right_checksums_is_refused(saved, wrong: str) -> None:
    """As somebody who writes such files by other means might produce."""
    hat, _, path = saved
    header, leaves = container.read(path)
    match wrong:
        case "a leaf less":
            del leaves["params/conv2.weight"]
        case "a leaf more":
            leaves["params/conv9.weight"] = torch.zeros(3)
        case "a shape":
            leaves["embeddings/conv1"] = leaves["embeddings/conv1"][:, :4].clone()
        case "a type":
            leaves["masks/conv1"] = leaves["masks/conv1"].float()
        case "no learned":
            del leaves["learned"]
    container.write(path, leaves, header)
    with pytest.raises(hatfn.CheckpointError, match="does not fit the learner"):
        hatfn.load(path, hat)


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_in_header(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(8 + int.from_bytes(data[:8], "little"))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def grow(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.randint(1, 64))


def zero(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))


def swap(data: bytearray, rng: random.Random) -> None:
    size = rng.randint(1, 64)
    a, b = sorted(rng.sample(range(0, len(data) - size, size), 2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def claim(data: bytearray, rng: random.Random) -> None:
    data[:8] = rng.choice([2**62, 2**40, len(data), 2**63 + 5, 0, 1]).to_bytes(8, "little")


Leaves = dict[str, torch.Tensor]


def swap_leaves(leaves: Leaves, fields: dict[str, str], rng: random.Random) -> None:
    a = rng.choice(sorted(leaves))
    b = rng.choice([n for n in sorted(leaves) if leaves[n].shape == leaves[a].shape])
    leaves[a], leaves[b] = leaves[b].clone(), leaves[a].clone()


def wrong_type(leaves: Leaves, fields: dict[str, str], rng: random.Random) -> None:
    name = rng.choice(sorted(leaves))
    leaves[name] = leaves[name].to(rng.choice([torch.float16, torch.float64, torch.int32, torch.uint8]))


def wrong_shape(leaves: Leaves, fields: dict[str, str], rng: random.Random) -> None:
    name = rng.choice(sorted(leaves))
    leaf = leaves[name]
    leaves[name] = rng.choice([leaf.flatten(), leaf[None], torch.cat([leaf.flatten()] * 2)]).clone()


def drop_leaf(leaves: Leaves, fields: dict[str, str], rng: random.Random) -> None:
    del leaves[rng.choice(sorted(leaves))]


def add_leaf(leaves: Leaves, fields: dict[str, str], rng: random.Random) -> None:
    leaves[rng.choice(["more", "params/more", "opt_state[9]"])] = torch.zeros(rng.randint(0, 4))


def wrong_field(leaves: Leaves, fields: dict[str, str], rng: random.Random) -> None:
    name = rng.choice(sorted(fields))
    fields[name] = rng.choice(["", "{}", "[]", "null", fields[name][1:], fields[name] + " "])


def another_header(leaves: Leaves, fields: dict[str, str], rng: random.Random) -> None:
    header = json.loads(fields["header"])
    header["classes"] = rng.choice([None, [3, 2, 2], [3, 2], "3", {}])
    fields["header"] = json.dumps(header)


BYTES: tuple[Callable[..., None], ...] = (flip, flip_in_header, cut, grow, zero, swap, claim)
PARTS: tuple[Callable[..., None], ...] = (
    swap_leaves, wrong_type, wrong_shape, drop_leaf, add_leaf, wrong_field, another_header,
)  # fmt: skip


def test_a_thousand_corruptions_never_give_a_wrong_state(saved) -> None:
    """Each is refused, or what is loaded is what was saved."""
    hat, state, path = saved
    whole = path.read_bytes()
    leaves, fields = opened(path)
    refused: Counter[str] = Counter()
    for number in range(1000):
        rng = random.Random(number)
        kind = (BYTES + PARTS)[number % len(BYTES + PARTS)]
        if kind in BYTES:
            data = bytearray(whole)
            kind(data, rng)
            path.write_bytes(data)
        else:
            new, said = dict(leaves), dict(fields)
            kind(new, said, rng)
            save_file(new, path, said)
        try:
            loaded = hatfn.load(path, hat)
        except hatfn.CheckpointError:
            refused[kind.__name__] += 1
        else:
            assert equal(loaded, state), f"{kind.__name__}, seed {number}: a wrong state"
    assert set(refused) == {kind.__name__ for kind in BYTES + PARTS}
    assert refused.total() > 900, "most of what was tried was no change at all"


def test_wrong_arguments(saved, tmp_path: Path) -> None:
    hat, state, path = saved
    with pytest.raises(TypeError, match="Expected the learner"):
        hatfn.load(path, ConvNet())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected the learner"):
        hatfn.save(tmp_path / "s", state, {"hat": hat})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"replica\(states, i\)"):
        hatfn.save(tmp_path / "s", hatfn.replicate(hat, [0, 1]), hat)
    with pytest.raises(ValueError, match="Expected"):
        hatfn.save(tmp_path / "s", state, hatfn.grow(hat, state, classes=[2])[0])
    assert not (tmp_path / "s").exists()
