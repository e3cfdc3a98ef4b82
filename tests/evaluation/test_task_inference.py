"""Which task is it: against the formulas by hand, and the gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from nets import MODULES, ConvNet, Transformer, learn
from torch import Tensor

import hatfn
from hatfn.evaluation.task_inference import SCORES, entropy
from hatfn.network.outputs import forward_mixed
from hatfn.numerics.arguments import Inputs

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def padded(seed: int, classes: list[int], samples: int, spread: float) -> Tensor:
    """Random logits (T, B, C), -inf where a task has no such class."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(len(classes), samples, max(classes), generator=generator).double()
    for task, own in enumerate(classes):
        logits[task, :, own:] = -torch.inf
    return logits


def by_hand(logits: list[float], method: str) -> float:
    """The formulas, in Python, on the classes that are there."""
    there = [z for z in logits if z != -math.inf]
    total = math.fsum(math.exp(z) for z in there)
    p = [math.exp(z) / total for z in there]
    return {
        "max": max(there),
        "softmax": max(p),
        "entropy": math.fsum(q * math.log(q) for q in p if q),
        "energy": math.log(total),
    }[method]


@given(
    seed=st.integers(0, 2**31),
    classes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    samples=st.integers(1, 4),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    method=st.sampled_from(list(SCORES)),
)
def test_the_inferred_task_has_the_best_score_by_hand(
    seed: int, classes: list[int], samples: int, spread: float, method: str
) -> None:
    logits = padded(seed, classes, samples, spread)
    rows = hatfn.infer_task(logits, method)
    assert rows.shape == (samples,)
    assert rows.dtype == torch.int64
    for sample, row in enumerate(rows.tolist()):
        scores = [by_hand(own, method) for own in logits[:, sample].tolist()]
        assert scores[row] >= max(scores) - 1e-12


@pytest.mark.parametrize("method", SCORES)
def test_the_methods_tell_tasks_apart(method: str) -> None:
    logits = torch.tensor([[9.0, 8.9, 8.9], [4.0, -9.0, -9.0], [3.0, 0.5, 2.0], [8.95, 8.95, 8.95]])
    winners = {"max": 0, "softmax": 1, "entropy": 1, "energy": 3}
    assert hatfn.infer_task(logits[:, None], method).tolist() == [winners[method]]
    if method == "max":  # the first of equals
        assert hatfn.infer_task(logits[[2, 0, 0], None], method).tolist() == [1]


def test_a_probability_that_rounds_to_one_is_still_compared() -> None:
    logits = torch.tensor([[[25.0, 0.0]], [[30.0, 0.0]], [[20.0, 0.0]]])
    assert logits.softmax(-1)[:2, 0, 0].tolist() == [1.0, 1.0]
    assert [hatfn.infer_task(logits, method).item() for method in ("softmax", "entropy")] == [1, 1]


@pytest.mark.parametrize("method", SCORES)
def test_many_seeds_at_once(method: str) -> None:
    logits = torch.stack([padded(seed, [3, 1, 2], 4, 1.0) for seed in range(3)])
    together = torch.vmap(lambda one: hatfn.infer_task(one, method))(logits)
    assert torch.equal(together, torch.stack([hatfn.infer_task(one, method) for one in logits]))
    classes = torch.vmap(lambda one, rows: hatfn.classify(one, rows, [0, 3, 4]))(logits, together)
    alone = [hatfn.classify(one, rows, [0, 3, 4]) for one, rows in zip(logits, together, strict=True)]
    assert torch.equal(classes, torch.stack(alone))


@given(seed=st.integers(0, 2**31), classes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_class_is_of_its_task(seed: int, classes: list[int]) -> None:
    logits = padded(seed, classes, 6, 1.0)
    rows = torch.randint(len(classes), (6,), generator=torch.Generator().manual_seed(seed))
    offsets = [sum(classes[:task]) for task in range(len(classes))]
    within, overall = hatfn.classify(logits, rows), hatfn.classify(logits, rows, offsets)
    for sample, row in enumerate(rows.tolist()):
        own = logits[row, sample].tolist()
        assert within[sample] == own.index(max(own))
        assert within[sample] < classes[row]
        assert overall[sample] == offsets[row] + within[sample]


def three_tasks(make, inputs) -> tuple[hatfn.HAT, hatfn.HATState, Tensor]:
    """A learner of three learned tasks in float64, whose inputs are float64 too."""
    module, x = make().double(), inputs().double()
    hat = hatfn.build(module, hatfn.trace(module, x[:1]), [3, 2, 3], torchopt.sgd(0.1))
    state = hat.init(0)
    for task in range(3):
        state = hat.consolidate(state, task)
    return hat, state, x


@pytest.mark.parametrize("name", ["mlp", "alexnet", "conv net", "transformer", "lstm"])
def test_the_gradient_is_the_finite_difference(name: str) -> None:
    hat, state, x = three_tasks(*MODULES[name])
    tasks, step = [2, 0, 1], 1e-5
    alpha, slopes = torch.full((3,), 1 / 3, dtype=torch.float64), []
    even = {key: leaf[tasks].double().mean(0, keepdim=True) for key, leaf in state.task_buffers.items()}
    held = state._replace(  # running statistics are constants: the same in every task
        task_buffers={key: leaf.expand(3, *leaf.shape[1:]) for key, leaf in even.items()}
    )
    for task in range(3):
        shift = step * torch.eye(3, dtype=torch.float64)[task]
        up, down = (
            entropy(forward_mixed(hat.network, held, Inputs((x,)), tasks, alpha + sign * shift))
            for sign in (1, -1)
        )
        slopes.append((up - down) / (2 * step))
    expected = torch.stack(slopes, 1)
    assert expected.abs().min() > 1e-9
    rows = hatfn.infer_task_by_gradient(hat, state, x, tasks)
    assert torch.equal(rows, expected.argmin(1))
    together = hatfn.infer_task_by_gradient(hat, state, x, tasks, per="batch")
    assert torch.equal(together, expected.mean(0).argmin().expand(len(x)))
    for i in range(len(x)):
        one = hatfn.infer_task_by_gradient(hat, state, x[i : i + 1], tasks, per="batch")
        assert torch.equal(one, rows[i : i + 1])


@pytest.mark.parametrize("make", [ConvNet, Transformer])
def test_all_weight_on_one_task_is_that_task(make) -> None:
    inputs = (lambda: torch.randn(4, 1, 6, 6)) if make is ConvNet else (lambda: torch.randn(4, 4, 5))
    hat, state, x = three_tasks(make, inputs)
    state = learn(hat, state, x, 0)
    output = forward_mixed(hat.network, state, Inputs((x,)), [1, 0], torch.tensor([0.0, 1.0]).double())
    assert output.shape == (4, 5)
    torch.testing.assert_close(output[:, 2:] / 2, hat.forward(state, x, 0))
    assert output[:, :2].eq(0).all()


def test_one_task_is_always_the_one() -> None:
    hat, state, x = three_tasks(*MODULES["mlp"])
    for per in ("sample", "batch"):
        assert hatfn.infer_task_by_gradient(hat, state, x, [1], per).eq(0).all()
    assert hatfn.infer_task(hat.predict(state, x, [1])).eq(0).all()
