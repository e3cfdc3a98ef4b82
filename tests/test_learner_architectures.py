"""Twelve kinds of architecture learn two tasks with everything that moves weights; none forgets."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import given, settings
from nets import learn

import hatfn
from hatfn.testing import verify_no_forgetting


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")  # the smallest groups are soon used up
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_architecture_forgets(kind: str) -> None:
    hat, x = build(kind, [4, 3])
    state = learn(hat, hat.init(seed=0), x, 0, steps=3)
    logits, weights = hat.forward(state, x, 0), state.params
    state = learn(hat, state, x, 1, steps=3, carry=True)
    assert torch.equal(hat.forward(state, x, 0), logits)
    assert any(not torch.equal(state.params[name], weight) for name, weight in weights.items())
    verify_no_forgetting(hat, state, x)


LEARNERS: dict[str, tuple[hatfn.HAT, torch.Tensor]] = {}
"""Traced once for all examples of a property."""


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
@pytest.mark.parametrize("kind", ARCHITECTURES)
@given(data=st.data())
@settings(max_examples=4)
def test_predict_is_the_loop_over_tasks(kind: str, data: st.DataObject) -> None:
    """For random masks, norms, tasks, batches and chunks, in float64."""
    if kind not in LEARNERS:
        LEARNERS[kind] = build(kind, [4, 3, 2], torch.float64)
    hat, x = LEARNERS[kind]
    tasks = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    chunk_size = data.draw(st.none() | st.integers(1, len(tasks)))
    density = data.draw(st.floats(0.2, 1))
    x = x[: data.draw(st.integers(1, len(x)))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def shake(tree: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: leaf * (0.5 + torch.rand(leaf.shape, generator=generator, dtype=torch.float64))
            if leaf.is_floating_point() else leaf
            for name, leaf in tree.items()
        }  # fmt: skip

    state = hat.init(seed=0)
    state = state._replace(
        embeddings={
            group: density - torch.rand(e.shape, generator=generator, dtype=torch.float64)
            for group, e in state.embeddings.items()
        },
        task_params=shake(state.task_params),
        task_buffers=shake(state.task_buffers),
    )
    for task in range(3):
        state = hat.consolidate(state, task)
    logits = hat.predict(state, x, tasks, chunk_size)
    assert logits.shape == (len(tasks), len(x), 4)
    for row, task in zip(logits, tasks, strict=True):
        alone = hat.forward(state, x, task)
        torch.testing.assert_close(row[:, : hat.classes[task]], alone, rtol=1e-9, atol=1e-9)
        assert (row[:, hat.classes[task] :] == -torch.inf).all()
