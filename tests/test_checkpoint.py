"""States on disk: the same state comes back, and nothing else ever does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import ConvNet, equal, learn, learner
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


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "no state", "newer", "a part"])
def test_damage_is_refused(saved, damage: str) -> None:
    hat, _, path = saved
    data = path.read_bytes()
    leaves = load_file(path)
    header = {"format": "1", "wiring": hat.wiring.fingerprint, "meta": "{}"}
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
