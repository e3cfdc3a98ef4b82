"""States on disk: the same state comes back, and nothing else ever does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import ConvNet, equal, learn, learner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hatfn
from hatfn import checkpoint
from hatfn.networks import MLP

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X = torch.randn(8, 1, 6, 6)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[hatfn.HAT, hatfn.HATState, Path]:
    hat = learner(ConvNet(), X)
    state = learn(hat, hat.init(0), X, 1)
    path = tmp_path / "state.safetensors"
    hatfn.save(path, state, hat.wiring, {"note": "one task"})
    return hat, state, path


def test_what_is_saved_comes_back(saved) -> None:
    hat, state, path = saved
    loaded = hatfn.load(path, hat.wiring)
    assert equal(loaded._replace(opt_state=()), state._replace(opt_state=()))
    assert torch.equal(hat.forward(loaded, X, 1), hat.forward(state, X, 1))
    assert checkpoint.read_meta(path) == {"note": "one task"}
    learn(hat, loaded, X, 0)  # and it can go on
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_module_without_buffers_comes_back(tmp_path: Path) -> None:
    hat = learner(MLP(5, 3, width=16), torch.randn(1, 5))
    hatfn.save(tmp_path / "s", hat.init(0), hat.wiring)
    assert equal(
        hatfn.load(tmp_path / "s", hat.wiring)._replace(opt_state=()),
        hat.init(0)._replace(opt_state=()),
    )


def test_another_wiring_is_refused(saved) -> None:
    _, _, path = saved
    other = learner(MLP(5, 3, width=16), torch.randn(1, 5))
    with pytest.raises(hatfn.CheckpointError, match="another wiring"):
        hatfn.load(path, other.wiring)


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 0, 3), (2, 3, 4)], ids=str
)
def test_bools_of_any_shape_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    hat = learner(MLP(5, 3, width=16), torch.randn(1, 5))
    odd = torch.rand(shape) < 0.5
    state = hat.init(0)._replace(masks={"a": odd, "b": ~odd, "c": odd.mT if odd.dim() > 1 else odd})
    hatfn.save(tmp_path / "s", state, hat.wiring)
    loaded = hatfn.load(tmp_path / "s", hat.wiring)
    assert equal(loaded._replace(opt_state=()), state._replace(opt_state=()))
    assert all(mask.dtype == torch.bool for mask in loaded.masks.values())


def test_a_bool_takes_a_bit(tmp_path: Path) -> None:
    hat = learner(MLP(64, 3, width=512), torch.randn(1, 64))
    state = hat.init(0)
    hatfn.save(tmp_path / "s", state, hat.wiring)
    entries = sum(p.numel() for p in state.protection.values())
    floats = sum(
        leaf.nbytes
        for tree in (state.params, state.task_params, state.embeddings)
        for leaf in tree.values()
    )
    rest = (tmp_path / "s").stat().st_size - floats
    assert entries / 8 < rest < entries / 8 + 4000, "one bit per shared weight, and a header"


def test_a_file_with_a_byte_for_each_bool_still_loads(saved) -> None:
    hat, state, path = saved
    leaves = {
        f"{field}/{name}" if isinstance(value, dict) else field: leaf.clone()
        for field, value in state._asdict().items() if field != "opt_state"
        for name, leaf in (value if isinstance(value, dict) else {"": value}).items()
    }  # fmt: skip
    save_file(leaves, path, {"format": "1", "wiring": hat.wiring.fingerprint, "meta": "{}"})
    loaded = hatfn.load(path, hat.wiring)
    assert equal(loaded._replace(opt_state=()), state._replace(opt_state=()))


@pytest.mark.parametrize("damage", [
    "missing", "empty", "cut", "no state", "newer", "a part", "a short mask",
    "a long mask", "a mask of another type", "a bit too many", "no list of bits", "a list of other bits",
])  # fmt: skip
def test_damage_is_refused(saved, damage: str) -> None:
    hat, _, path = saved
    data = path.read_bytes()
    leaves, mask = load_file(path), "masks/conv1"  # (3, 8) bools in 3 bytes
    with safe_open(path, "pt") as file:
        header = file.metadata()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "no state":
            save_file(leaves, path)
        case "newer":
            save_file(leaves, path, header | {"format": "99"})
        case "a part":
            del leaves["learned"]
            save_file(leaves, path, header)
        case "a short mask":
            save_file(leaves | {mask: leaves[mask][:2]}, path, header)
        case "a long mask":
            save_file(leaves | {mask: torch.cat([leaves[mask], leaves[mask]])}, path, header)
        case "a mask of another type":
            save_file(leaves | {mask: leaves[mask].float()}, path, header)
        case "a bit too many":
            save_file(leaves | {"learned": leaves["learned"] | 1}, path, header)
        case "no list of bits":
            save_file(leaves, path, {n: v for n, v in header.items() if n != "bits"})
        case "a list of other bits":
            save_file(leaves, path, header | {"bits": "[1, 2]"})
    with pytest.raises(hatfn.CheckpointError, match=str(path)):
        hatfn.load(path, hat.wiring)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    hat, state, path = saved
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        hatfn.save(path, hat.begin(state, 0), hat.wiring)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
