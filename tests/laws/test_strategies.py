"""What the public strategies draw: all there is, simplest first, printed so that it can be read."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import hypothesis.strategies as st
import optree
import pytest
import torch
from hypothesis import Phase, assume, find, given, settings
from nets import equal, examples

from hatfn.method.masks import binary_gates
from hatfn.testing import strategies as st_hat
from hatfn.testing import verify_pure, verify_state_stable, verify_wiring
from hatfn.testing.cases import ACTIVATIONS, KINDS, NORMS, OPTIMIZERS, Block, Case, learner

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("family", KINDS)
def test_every_choice_is_drawn_and_shrinks_to_itself(family: str) -> None:
    choices = {"kind": KINDS[family], "norm": NORMS[family], "activation": ACTIVATIONS}
    for field, names in choices.items():
        for name in names:

            def has(case: Case, field: str = field, name: str = name) -> bool:
                return any(getattr(block, field) == name for block in case.blocks)

            last = name == [*names][-1]
            phases = [Phase.generate, Phase.shrink] if last else [Phase.generate]
            case = find(st_hat.modules([family]), has, settings=settings(phases=phases, database=None))
            if last:
                assert case == Case(family, (Block(**{"kind": KINDS[family][0], field: name}),))


@given(case=st_hat.modules(dtypes=DTYPES))
@examples(30)
def test_a_module_is_what_it_prints(case: Case) -> None:
    scope = {"Case": Case, "Block": Block, "torch": torch}
    again = eval(repr(case), scope)
    assert again == case
    random = torch.get_rng_state()
    output = again.module(again.x)
    assert torch.equal(torch.get_rng_state(), random)
    assert output.dtype == case.dtype
    assert torch.equal(verify_pure(case.module, case.x), output)


@given(case=st_hat.modules(dtypes=(torch.float32, torch.float64)))
@examples(10)
def test_every_module_has_a_sound_wiring(case: Case) -> None:
    """Whatever is drawn is another network for the rules of the trace."""
    try:
        verify_wiring(case.module, case.wiring, case.x, draws=2)
    except AssertionError as error:  # of a few units some half may pass nothing on
        assume("nothing is proven" not in str(error))
        raise


@given(data=st.data())
@examples(15)
def test_a_state_is_one_that_training_could_have_led_to(data: st.DataObject) -> None:
    hat = data.draw(st_hat.learners(st_hat.modules(dtypes=DTYPES, max_blocks=1)))
    opened = data.draw(st.booleans())
    state = data.draw(st_hat.states(hat, opened=opened))
    assert state.active.sum() == opened
    assert not (state.active & state.learned).any()
    for group, mask in state.masks.items():
        on = state.learned[:, None] & binary_gates(state)[group]
        assert torch.equal(mask, on)
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(state))
    if opened:
        assert torch.equal(state.locked, state.learned)
        task = state.active.tolist().index(True)
        batch = data.draw(st_hat.batches(hat, task))
        moved, info = verify_state_stable(hat.update, state, batch, task, 1.0)
        assert info.ok
        assert not equal(moved, state)
        verify_state_stable(hat.begin, moved, task)


def two_steps(optimizer) -> list[torch.Tensor]:
    """The second update is not the first where there are moments, nor zero where there is decay."""
    params = {"w": torch.tensor([1.0, -2.0])}
    state = optimizer.init(params)
    first, state = optimizer.update({"w": torch.tensor([0.5, 0.0])}, state, params=params)
    second, _ = optimizer.update({"w": torch.tensor([0.25, 0.0])}, state, params=params)
    return [first["w"], second["w"]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_drawn(optimizer: str) -> None:
    wanted = two_steps(OPTIMIZERS[optimizer]())
    hat = find(
        st_hat.learners(st.just(Case("mlp", ()))), lambda hat: equal(two_steps(hat.optimizer), wanted)
    )
    assert hat.classes == (2,)


def test_sequences_masks_and_embeddings_reach_their_ends() -> None:
    wiring = Case("mlp", ()).wiring
    assert find(st_hat.task_sequences(3, min_size=1), lambda order: len(order) == 3 and order[0] == 2)
    assert find(st_hat.masks(wiring, 2), lambda mask: mask["stem"].all())["stem"].shape == (2, 4)
    assert not find(st_hat.masks(wiring, 2), lambda mask: not mask["stem"].any())["stem"].any()
    for wanted in (0.0, 6.0, -6.0):
        found = find(
            st_hat.embeddings(wiring, 1), lambda e, wanted=wanted: bool((e["stem"] == wanted).any())
        )
        assert found["stem"].abs().max() <= 6
    for dtype in DTYPES:
        assert find(st_hat.embeddings(wiring, 1, dtype), lambda e: True)["stem"].dtype == dtype


def test_a_failure_prints_calls_and_no_tensors() -> None:
    @given(data=st.data())
    @settings(max_examples=5, phases=[Phase.generate], database=None)
    def failing(data: st.DataObject) -> None:
        hat = data.draw(st_hat.learners(st.just(Case("mlp", ()))))
        data.draw(st_hat.states(hat))
        raise ValueError

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        failing()
    printed = "\n".join(caught.value.__notes__)
    assert re.search(r"Draw 1: learner\(\s*Case\([^()]*\(\)[^()]*\),\s*\[2\],\s*'sgd'", printed)
    assert re.search(r"Draw 2: random_state\(\s*learner\(", printed)
    assert "tensor(" not in printed


def test_without_hypothesis_there_is_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, hatfn.testing; sys.exit('hypothesis' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    spec = importlib.util.spec_from_file_location("strategies", st_hat.__file__)
    with pytest.raises(ImportError, match=r"pip install 'hatfn\[testing\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_learners_take_settings() -> None:
    hat = learner(Case("mlp", ()), [2, 3], "adam", s_max=50.0)
    assert (hat.hyper["s_max"], hat.classes) == (50.0, (2, 3))
