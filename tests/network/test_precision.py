"""Arithmetic in bfloat16: weights and promises stay as they are."""

from __future__ import annotations

import pytest
import torch
import torchopt
from nets import ConvNet, Transformer, learn, learner, mlp, moved
from torch import nn

import hatfn
from hatfn.testing import verify_no_forgetting

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

CASES = {
    "mlp": (mlp(), torch.randn(8, 5), "4"),
    "conv net": (ConvNet(), torch.randn(8, 1, 6, 6), "head"),
    "transformer": (Transformer(), torch.randn(8, 4, 5), "head"),
}
LOW = {"optimizer": torchopt.adam(1e-2), "precision": torch.bfloat16}


@pytest.mark.parametrize("case", CASES)
def test_nothing_drifts_and_all_numbers_stay_float32(case: str) -> None:
    module, x, head = CASES[case]
    hat = learner(module, x, head=head, **LOW)
    first = learn(hat, hat.init(0), x, 0)
    logits = hat.forward(first, x, 0)
    later = learn(hat, first, x, 1)
    assert torch.equal(hat.forward(later, x, 0), logits)
    assert verify_no_forgetting(hat, later, x).tested
    assert {leaf.dtype for leaf in later.params.values()} == {logits.dtype} == {torch.float32}
    assert any(not torch.equal(later.params[name], first.params[name]) for name in first.params)
    torch.testing.assert_close(
        hat.predict(later, x)[0, :, : logits.shape[1]], logits, atol=0.1, rtol=0.1
    )


@pytest.mark.parametrize("case", CASES)
def test_the_arithmetic_is_bfloat16(case: str) -> None:
    module, x, head = CASES[case]
    hat = learner(module, x, head=head, **LOW)
    state = hat.consolidate(hat.init(0), 0)
    full = learner(module, x, head=head, optimizer=LOW["optimizer"]).forward(state, x, 0)
    low = hat.forward(state, x, 0)
    torch.testing.assert_close(low, full, atol=0.1, rtol=0.1)
    assert torch.equal(low, low.bfloat16().float())
    assert not torch.equal(full, full.bfloat16().float())


@pytest.mark.parametrize("case", CASES)
def test_replicas_compute_in_bfloat16(case: str) -> None:
    module, x, head = CASES[case]
    y, logits = torch.arange(8) % 2, []
    for settings in (LOW, {}):
        hat = learner(module, x, head=head, **settings)
        many, states = hatfn.Replicas(hat), hatfn.replicate(hat, [0, 1])
        begun = many.begin(states, 0)
        states, info = many.update(begun, (x, y), 0, 5.0, shared=True)
        assert info.ok.all()
        assert moved(begun, states)
        logits += [info.logits, many.forward(states, x, 0, 5.0)]
    for low, full in (logits[::2], logits[1::2]):
        assert (low - full).abs().max() > 1e-4  # of numbers near 1, float32 knows 1e-7
        torch.testing.assert_close(low, full, atol=0.2, rtol=0.2)


def test_another_precision_is_refused() -> None:
    net = nn.Linear(2, 2)
    wiring = hatfn.trace(net, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"precision=torch.float64.*module\.double\(\)"):
        hatfn.build(net, wiring, None, torchopt.sgd(0.1), precision=torch.float64)
