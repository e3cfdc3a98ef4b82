"""The pieces of an update, each against its formula or its brute-force definition."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from drawn import ANY, FLOATS, MASKS, arrays
from hypothesis import given
from torch import Tensor

import hatfn
from hatfn.method import transforms
from hatfn.state import Trainable


@given(gradient=arrays(ANY), held=MASKS)
def test_protect_lets_nothing_through(gradient: Tensor, held: Tensor) -> None:
    out = hatfn.protect({"w": gradient}, {"w": held})["w"]
    assert (out[held] == 0).all()
    assert torch.equal(out[~held].nan_to_num(7.0), gradient[~held].nan_to_num(7.0))


@given(gradient=arrays(FLOATS), p=arrays(st.floats(0, 1, width=32)))
def test_soft_protection_is_a_factor(gradient: Tensor, p: Tensor) -> None:
    torch.testing.assert_close(hatfn.protect({"w": gradient}, {"w": p})["w"], gradient * (1 - p))


def test_what_is_held_for_good_drops_what_is_not_finite() -> None:
    gradient = torch.tensor([torch.nan, torch.inf, 1.0])
    for held in (torch.ones(3), torch.ones(3, dtype=torch.bool)):
        assert torch.equal(hatfn.protect({"w": gradient}, {"w": held})["w"], torch.zeros(3))


def test_numbers_above_zero_are_taken_and_no_others() -> None:
    units = {"a": torch.tensor([-2.0, 0.25, 2.0])}
    assert hatfn.clamp_embeddings(units, 0.5)["a"].tolist() == [-0.5, 0.25, 0.5]
    assert hatfn.compensate(units, units, 0.5, 0.5)["a"].isfinite().all()
    for wrong in (0.0, -0.5):
        with pytest.raises(ValueError, match="limit"):
            hatfn.clamp_embeddings(units, wrong)
        with pytest.raises(ValueError, match="scale"):
            hatfn.compensate(units, units, wrong, 400.0)
        with pytest.raises(ValueError, match="s_max"):
            hatfn.compensate(units, units, 1.0, wrong)


@given(g=arrays(FLOATS), e=arrays(st.floats(-6, 6, width=32)), s=st.floats(0.01, 400), factor=FLOATS)
def test_compensation_is_its_formula(g: Tensor, e: Tensor, s: float, factor: float) -> None:
    ours = hatfn.compensate({"a": g.double()}, {"a": e.double()}, s, 400.0, factor)["a"]
    for got, gradient, value in zip(ours.flatten(), g.flatten(), e.flatten(), strict=True):
        soft = math.cosh(min(max(s * float(value), -50), 50)) + 1
        expected = float(gradient) * factor / s * soft / (math.cosh(float(value)) + 1)
        assert math.isclose(float(got), expected, rel_tol=1e-6, abs_tol=1e-30)
    paper = hatfn.compensate({"a": g.double()}, {"a": e.double()}, s, 400.0)["a"]
    torch.testing.assert_close(
        paper, hatfn.compensate({"a": g.double()}, {"a": e.double()}, s, 400.0, 400.0)["a"]
    )


def test_compensation_undoes_the_annealing() -> None:
    """The compensated gradient through sigmoid(s e) is s_max times the one through sigmoid(e)."""
    e = torch.linspace(-0.03, 0.03, 7, dtype=torch.float64, requires_grad=True)
    (steep,) = torch.autograd.grad(hatfn.gate(e, 400.0).sum(), e)
    (plain,) = torch.autograd.grad(hatfn.gate(e, 1.0).sum(), e)
    ours = hatfn.compensate({"a": steep}, {"a": e.detach()}, 400.0, 50.0)["a"]
    torch.testing.assert_close(ours, 50.0 * plain)


@given(a=arrays(FLOATS), b=arrays(FLOATS), limit=st.floats(0.1, 1000))
def test_clip_bounds_the_norm_of_the_whole_tree(a: Tensor, b: Tensor, limit: float) -> None:
    clipped, norm = transforms.clip_by_norm({"a": a, "b": b}, limit)
    whole = torch.cat([a.flatten(), b.flatten()])
    torch.testing.assert_close(norm, whole.norm())
    after = torch.cat([clipped["a"].flatten(), clipped["b"].flatten()])
    assert after.norm() <= limit * (1 + 1e-5)
    if norm < limit * 0.99:
        assert torch.equal(after, whole)
    else:  # the direction stays
        torch.testing.assert_close(after * norm, whole * after.norm(), rtol=1e-3, atol=1e-2)
    assert transforms.clip_by_norm({"a": a}, None)[0]["a"] is a


@given(old=arrays(FLOATS), update=arrays(ANY), held=MASKS, rate=st.floats(0.1, 2))
def test_protected_entries_stay_whatever_the_update(
    old: Tensor, update: Tensor, held: Tensor, rate: float
) -> None:
    before, updates = (Trainable({"w": w}, {"n": w}, {"g": w}) for w in (old, update))
    factor = torch.tensor(rate).double()
    out = transforms.apply_updates(before, updates, factor, {"w": held})
    assert torch.equal(out.params["w"][held], old[held])
    moved = torch.addcmul(old, update, torch.tensor(rate))
    for leaf, loose in ((out.params["w"], ~held), (out.task_params["n"], slice(None))):
        assert torch.equal(leaf[loose].nan_to_num(7.0), moved[loose].nan_to_num(7.0))
    soft = transforms.apply_updates(before, updates, factor, {"w": held.float()})
    assert torch.equal(soft.params["w"].nan_to_num(7.0), out.params["w"].nan_to_num(7.0))


@given(new=arrays(ANY), old=arrays(FLOATS), ok=st.booleans())
def test_a_refused_step_is_the_old_state(new: Tensor, old: Tensor, ok: bool) -> None:
    pick = transforms.choose(torch.tensor(ok), {"a": new}, {"a": old})["a"]
    flags = torch.tensor([ok, not ok])
    both = torch.vmap(lambda flag: transforms.choose(flag, {"a": new}, {"a": old})["a"])(flags)
    for got, want in ((pick, ok), (both[0], ok), (both[1], not ok)):
        assert torch.equal(got.nan_to_num(7.0), (new if want else old).nan_to_num(7.0))


def test_what_has_no_floating_numbers_is_finite() -> None:
    assert transforms.finite({"count": torch.tensor(3)})


@given(leaf=arrays(ANY))
def test_finite_sees_every_number(leaf: Tensor) -> None:
    tree = {"a": torch.ones(2), "b": leaf, "count": torch.tensor(3)}
    if leaf.isfinite().all() and leaf.double().abs().sum() < 1e38:
        assert transforms.finite(tree)
    if not leaf.isfinite().all():
        assert not transforms.finite(tree)


@given(e=arrays(FLOATS), limit=st.floats(0.1, 10))
def test_embeddings_are_clamped(e: Tensor, limit: float) -> None:
    assert hatfn.clamp_embeddings({"a": e}, limit)["a"].abs().max() <= limit * (1 + 1e-6)
