"""Transformers as they come: trees of inputs, ModelOutputs, classifiers found, old outputs to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchopt
from nets import equal
from torch import Tensor, nn
from transformers_cases import MODELS, WORDS, transformer

import hatfn
from hatfn.testing import verify_no_forgetting

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

Y = torch.tensor([0, 1, 1, 0])


def built(name: str, dropout: float = 0.1) -> tuple[nn.Module, hatfn.HAT, dict[str, Tensor]]:
    module, x = transformer(name)
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = dropout
    wiring = hatfn.trace(module, x)
    assert [head.weight for head in wiring.heads] == [f"{MODELS[name][2]}.weight"]
    hat = hatfn.build(module, wiring, [3, 2], torchopt.adamw(1e-2, weight_decay=0.1))
    return module, hat, x


def taught(
    hat: hatfn.HAT,
    state: hatfn.HATState,
    x: dict[str, Tensor],
    task: int,
    carry: bool = False,
    batches=None,
) -> hatfn.HATState:
    state = hat.begin(state, task, carry=carry)
    for step in range(3):
        state, info = hat.update(state, (x, Y), task, 10.0 * (step + 1))
        assert info.ok
    return hat.consolidate(state, task, [(x, Y)] if batches is None else batches)


@pytest.mark.parametrize("name", MODELS)
def test_two_tasks_of_a_transformer(name: str) -> None:
    module, hat, x = built(name)
    with torch.no_grad():
        kind = type(module(**x))
    state = taught(hat, hat.init(0), x, 0)
    before, weights = hat.forward(state, x, 0), state.params
    assert type(before) is kind
    assert before.logits.shape == (4, 3)
    state = taught(hat, state, x, 1, carry=True)
    after = hat.forward(state, x, 0)
    assert torch.equal(after.logits, before.logits)
    assert not equal(state.params, weights)
    everything = hat.predict(state, x)
    assert type(everything) is kind
    for task, width in ((0, 3), (1, 2)):
        alone = hat.forward(state, x, task).logits
        torch.testing.assert_close(everything.logits[task][:, :width], alone, rtol=1e-4, atol=1e-4)
    assert (everything.logits[1][:, 2] == -torch.inf).all()
    verify_no_forgetting(hat, state, x)


@pytest.mark.parametrize("name", WORDS)
def test_a_padded_token_changes_no_bit(name: str) -> None:
    _, hat, x = built(name)
    state = taught(hat, hat.init(0), x, 0)
    padded = x["attention_mask"] == 0
    other = x | {"input_ids": torch.where(padded, 7, x["input_ids"])}
    if name in ("gpt2", "llama"):  # these look for the last word that is no padding
        other = x | {"attention_mask": x["attention_mask"]}
    assert torch.equal(hat.forward(state, other, 0).logits, hat.forward(state, x, 0).logits)
    seen = x | {"input_ids": torch.where(padded, x["input_ids"], 7)}
    assert not torch.equal(hat.forward(state, seen, 0).logits, hat.forward(state, x, 0).logits)


@pytest.mark.parametrize("name", ["bert", "convnext"])
def test_the_life_of_a_transformer(name: str, tmp_path: Path) -> None:
    module, hat, x = built(name, dropout=0.0)
    state = taught(hat, hat.init(0), x, 0)
    served = hat.forward(state, x, 0).logits

    hatfn.save(tmp_path / "state.safetensors", state, hat)
    loaded = hatfn.load(tmp_path / "state.safetensors", hat)
    assert torch.equal(hat.forward(loaded, x, 0).logits, served)

    alone = hatfn.export(hat, state, 0)
    assert type(alone) is type(module)
    assert alone.config.num_labels == 3
    with torch.no_grad():
        torch.testing.assert_close(alone(**x).logits, served, rtol=1e-4, atol=1e-4)
    small = hat.compact(state, 0, x)
    torch.testing.assert_close(small(x).logits, served, rtol=1e-4, atol=1e-4)

    many = hatfn.Replicas(hat)
    states = hatfn.replicate(hat, [0, 1])
    states = many.begin(states, 0)
    for step in range(3):
        states, info = many.update(states, (x, Y), 0, 10.0 * (step + 1))
        assert info.ok.all()
    states = many.consolidate(states, 0, [])
    one = taught(hat, hat.init(1, fresh=True), x, 0, batches=[])
    torch.testing.assert_close(
        many.forward(states, x, 0).logits[1], hat.forward(one, x, 0).logits, rtol=1e-3, atol=1e-3
    )


WRONG = {
    "a missing mask": (
        lambda x: {"input_ids": x["input_ids"]},
        ValueError,
        "'attention_mask' is missing",
    ),
    "an unknown key": (
        lambda x: x | {"labels": Y},
        ValueError,
        "'labels' is not an input of the traced module",
    ),
    "a mask for fewer": (
        lambda x: x | {"attention_mask": x["attention_mask"][:2]},
        ValueError,
        r"attention_mask has shape \(2, 8\) and input_ids \(4, 8\)",
    ),
    "a flat mask": (
        lambda x: x | {"attention_mask": x["attention_mask"][0]},
        ValueError,
        r"attention_mask has shape \(8,\). Expected \(B, 8\)",
    ),
    "words of real numbers": (
        lambda x: x | {"input_ids": x["input_ids"].float()},
        TypeError,
        r"input_ids is torch.float32. Expected torch.int64",
    ),
    "a list": (
        lambda x: x | {"input_ids": x["input_ids"].tolist()},
        (TypeError, ValueError),
        "input_ids",
    ),
    "a tensor alone": (lambda x: x["input_ids"], (TypeError, ValueError), "input_ids, attention_mask"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_inputs_that_do_not_fit_are_refused_by_name(kind: str) -> None:
    _, hat, x = built("bert")
    change, error, message = WRONG[kind]
    state = hat.begin(hat.init(0), 0)
    for call in (
        lambda bad: hat.update(state, (bad, Y), 0, 5.0),
        lambda bad: hat.forward(state, bad, 0, 5.0),
        lambda bad: hat.predict(state, bad, []),
    ):
        with pytest.raises(error, match=message):
            call(change(x))


def test_what_is_none_is_left_out() -> None:
    _, hat, x = built("bert")
    state = hat.consolidate(hat.init(0), 0)
    given = hat.forward(state, x | {"token_type_ids": None}, 0)
    assert torch.equal(given.logits, hat.forward(state, x, 0).logits)
