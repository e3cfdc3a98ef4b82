"""Gates on some groups alone: a frozen transformer with adapters."""

from __future__ import annotations

import optree
import pytest
import torch
import torchopt
from nets import equal, mlp
from peft import LoraConfig, get_peft_model
from transformers_cases import transformer

import hatfn
from hatfn.testing import verify_no_forgetting, verify_wiring

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
Y = torch.tensor([0, 1, 1, 0])


def size(tensors: object) -> int:
    return sum(leaf.nbytes for leaf in optree.tree_leaves(tensors))


def test_adapters_of_a_frozen_transformer_learn_and_forget_nothing() -> None:
    base, x = transformer("bert")
    lora = LoraConfig(r=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    module = get_peft_model(base, lora)
    traced = hatfn.trace(module, x)
    adapters = [group for group in traced.groups if "lora" in group]
    assert len(adapters) == 11
    wiring = hatfn.select(traced, adapters)
    assert [*wiring.groups.values()] == [8] * 11
    hat = hatfn.build(module, wiring, [3, 2, 3], torchopt.adam(1e-2))
    state = hat.init(0)
    assert {name.split(".")[-3] for name in state.params} == {"lora_A", "lora_B"}
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    held = {*state.params, *state.task_params, *state.protection}
    assert not held & frozen
    assert not any("word_embeddings" in name for name in held)
    assert hat.network.untrained.keys() == frozen - {*hat.network.heads}
    assert size(state) <= 6 * size(state.params)

    outputs = {}
    for task in range(3):
        state = hat.begin(state, task)
        before = state
        for _ in range(3):
            state, info = hat.update(state, (x, Y), task, 20.0)
            assert info.ok
        state = hat.consolidate(state, task)
        assert not equal(before.params, state.params)
        outputs[task] = hat.forward(state, x, task).logits
        for old, output in outputs.items():
            assert torch.equal(hat.forward(state, x, old).logits, output)
    verify_no_forgetting(hat, state, x)


def test_units_without_a_gate_are_on_in_every_task() -> None:
    module, x = mlp(), torch.randn(6, 5)
    whole = hatfn.trace(module, x)
    part = hatfn.select(whole, ["2"])
    assert dict(part.groups) == {"2": whole.groups["2"]}
    kinds = {name: role.kind for name, role in part.params.items()}
    assert kinds == {
        "0.weight": "task", "0.bias": "task", "2.weight": "shared", "2.bias": "shared",
        "4.weight": "head", "4.bias": "head",
    }  # fmt: skip
    verify_wiring(module, part, x)
    assert dict(part.headless.groups) == {"2": 16}


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (["9"], ValueError, "select: '9' is no group.*'0', '2'"),
        ([], ValueError, "groups is empty"),
        ("2", TypeError, "select: groups='2'"),
    ],
)
def test_groups_that_are_none(groups, error, message: str) -> None:
    with pytest.raises(error, match=message):
        hatfn.select(hatfn.trace(mlp(), torch.randn(1, 5)), groups)
