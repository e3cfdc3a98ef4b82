"""Files that an older version saved: they load, serve what they served, and training goes on.

In tests/data/, saved by hatfn at 21b5ccd from the learners that are built here: two tasks learned, four steps
each, and the third opened and trained for one step, by Adam. The logits that this version gave lie beside them.
"""

from __future__ import annotations

from pathlib import Path

import optree
import pytest
import torch
import torchopt
from nets import equal, moved
from safetensors.torch import load_file
from torch import Tensor, nn

import hatfn

DATA = Path(__file__).parents[1] / "data"
EXPECTED = load_file(DATA / "expected.safetensors")
DRAW = torch.Generator().manual_seed(4)
X, Y = torch.randn(5, 1, 6, 6, generator=DRAW), torch.tensor([0, 1, 0, 1, 1])


def body() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(),
    )  # fmt: skip


def own() -> nn.Sequential:
    return body().append(nn.Linear(8, 3))


MODULES = {"own-head": (own, "7"), "head-behind": (body, None)}


def built(name: str) -> hatfn.HAT:
    make, head = MODULES[name]
    module = make()
    gate = None if head else False  # versions before 0.2 left the features before a head open
    wiring = hatfn.trace(module, X[:1], head=head, output_gate=gate)
    return hatfn.build(module, wiring, [3, 2, 2], torchopt.adam(1e-2))


def test_what_an_old_file_needs_is_said() -> None:
    module = body()
    hat = hatfn.build(module, hatfn.trace(module, X[:1]), [3, 2, 2], torchopt.adam(1e-2))
    with pytest.raises(hatfn.CheckpointError, match=r"hatfn\.trace\(module, x, output_gate=False\)"):
        hatfn.load(DATA / "head-behind.safetensors", hat)


def close(logits: Tensor, expected: str) -> None:
    """To rounding: on the machine that made them they are equal to the bit, others have other kernels."""
    torch.testing.assert_close(logits, EXPECTED[expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_learned_tasks_are_served_as_they_were(name: str) -> None:
    hat = built(name)
    state = hatfn.load(DATA / f"{name}.safetensors", hat)
    assert state.learned.tolist() == [True, True, False]
    assert state.active.tolist() == [False, False, True]
    for task in (0, 1):
        close(hat.forward(state, X, task), f"{name}/{task}")
        fresh = hat.forward(hat.consolidate(hat.init(0), task, []), X, task)
        assert not torch.allclose(fresh, EXPECTED[f"{name}/{task}"], rtol=1e-2), "as untrained"


@pytest.mark.parametrize("name", MODULES)
def test_a_wiring_alone_will_do(name: str) -> None:
    hat = built(name)
    state, whole = (hatfn.load(DATA / f"{name}.safetensors", reader) for reader in (hat.wiring, hat))
    assert equal(state, whole._replace(opt_state=()))
    for task in (0, 1):
        close(hat.forward(state, X, task), f"{name}/{task}")


@pytest.mark.parametrize("name", MODULES)
def test_training_goes_on_with_the_moments_that_were_saved(name: str) -> None:
    hat = built(name)
    state = hatfn.load(DATA / f"{name}.safetensors", hat)
    new = hat.begin(hat.init(0), 2).opt_state
    assert optree.tree_structure(state.opt_state) == optree.tree_structure(new)
    assert {int(count.max()) for count in optree.tree_leaves(state.opt_state[0].count)} == {1}
    after, info = hat.update(state, (X, Y), 2, 40.0)
    assert info.ok
    assert moved(state, after)
    close(hat.forward(after, X, 2, scale=50.0), f"{name}/next")
    anew, _ = hat.update(state._replace(opt_state=new), (X, Y), 2, 40.0)
    other = hat.forward(anew, X, 2, scale=50.0)
    assert not torch.allclose(other, EXPECTED[f"{name}/next"], rtol=1e-3), "moments make a difference"


@pytest.mark.parametrize("name", MODULES)
def test_what_was_noted_is_read(name: str) -> None:
    assert hatfn.read_meta(DATA / f"{name}.safetensors") == {"made by": "hatfn at 21b5ccd"}
