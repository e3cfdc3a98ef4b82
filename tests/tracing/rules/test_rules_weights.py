"""What is shared of weights that are computed before use, and which units graphs keep."""

from __future__ import annotations

import pytest
import torch
import torchopt
from nets import learn
from told import told
from torch import nn
from weight_cases import COMBINED, GRAPHS, WEIGHTS, between

import hatfn

SAID = {
    "weight norm": {"b.parametrizations.weight.original1": "b < a deferred folded", "b.bias": "b"},
    "weight norm of blocks": {"b.bias": "b"},
    "weight norm of columns": {"b.parametrizations.weight.original1": "< a deferred folded"},
    "weight norm of the whole": {"b.parametrizations.weight.original1": "task"},
    "spectral norm": {"b.parametrizations.weight.original": "b < a folded", "b.bias": "b"},
    "renorm": {"b.parametrizations.weight.original": "b < a folded"},
    "renorm of an activation": {"b.weight": "b < a"},
    "max norm by arithmetic": {"b.parametrizations.weight.original": "b < a folded"},
    "low rank": {"w": "u < a folded", "u": "u < v folded", "v": "v"},
    "a bag of words": {"e.weight": "e@1", "b.weight": "b < e"},
}


@pytest.mark.parametrize("name", SAID)
def test_who_gates_a_weight_that_is_computed(name: str) -> None:
    module, x, head = WEIGHTS[name]
    found = told(hatfn.trace(module, x, head=head, strict=True))
    expected = SAID[name]
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", COMBINED)
def test_two_convolutions_that_are_made_one_are_two_layers(name: str) -> None:
    module, x, head = WEIGHTS[f"combined by {name}"]
    wiring = hatfn.trace(module, x, head=head, strict=True)
    assert {role.kind for role in wiring.params.values()} == {"shared", "head"}
    assert set(wiring.groups.values()) == {6, 7}
    assert wiring.params["c.space.weight"].in_units.group == "c.time"
    assert wiring.params["c.time.bias"].out_units.group == "c.time"
    assert wiring.params["b.weight"].in_units.group == wiring.params["c.space.weight"].out_units.group


@pytest.mark.parametrize("name", GRAPHS)
def test_units_pass_along_edges(name: str) -> None:
    module, x, head = WEIGHTS[f"a graph: {name}"]
    found = told(hatfn.trace(module, x, head=head, unbatched=["1"], strict=True))
    assert (found["b.weight"], found["head.weight"]) == ("b < a", "head < b")


def test_a_direction_of_which_all_is_off_is_a_number() -> None:
    """The length of zeros is zero: without care the task's outputs, and an exported module's, are nan."""
    module, x = between(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))), torch.randn(4, 5)
    wiring = hatfn.trace(module, x, head="head")
    hat = hatfn.build(module, wiring, [3, 3], torchopt.sgd(0.1))
    state = hat.init(seed=0)
    state = state._replace(embeddings={**state.embeddings, "a": -torch.ones(2, 8)})
    with pytest.warns(hatfn.HATWarning, match="uses no unit of a"):
        state = hat.consolidate(state, 0)
    served = hat.forward(state, x, 0)
    assert served.isfinite().all()
    assert torch.equal(served[0], served[1]), "nothing of the input passes"
    assert torch.allclose(hatfn.export(hat, state, 0)(x), served)
    assert torch.allclose(hatfn.export(hat, state, 0, compact=True)(x), served)


def test_a_direction_is_learned_by_one_task_and_kept_by_the_next() -> None:
    module, x, head = WEIGHTS["weight norm of blocks"]
    wiring = hatfn.trace(module, x, head=head)
    hat = hatfn.build(module, wiring, [3, 3], torchopt.adamw(1e-2), sparsity=0.0)
    state = learn(hat, hat.init(seed=0), x, 0, steps=3)
    before = hat.forward(state, x, 0)
    learned = state.params
    state = learn(hat, state, x, 1, steps=3)
    name = "b.parametrizations.weight.original1"
    assert not torch.equal(state.params[name], learned[name])
    assert torch.equal(hat.forward(state, x, 0), before)
    assert torch.allclose(hatfn.export(hat, state, 0, compact=True)(x), before, atol=1e-6)
