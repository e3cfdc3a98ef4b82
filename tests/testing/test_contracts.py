"""Each contract is broken by small culprits, in each way in which it can be, and the culprit is named."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from hatfn.testing import verify_pure, verify_state_stable, verify_vmap_equals_loop


class State(NamedTuple):
    """A state of somebody else's learner."""

    weights: dict[str, Tensor]
    steps: Tensor


def state() -> State:
    return State({"w": torch.ones(2, 3), "b": torch.zeros(2)}, torch.tensor(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()


def remember(module: nn.Module) -> None:
    module.seen = torch.ones(1)


def recycle() -> Callable[[], Tensor]:
    """Gives ones, always, and clears what it gave before."""
    given = [torch.ones(2)]

    def ones() -> Tensor:
        given.append(torch.ones(2))
        given[-2].zero_()
        return given[-1]

    return ones


def fall(state: State) -> Tensor:
    leaf = state.weights["w"].requires_grad_()
    leaf.sum().backward()
    return leaf


def undone(state: State) -> None:
    state.weights["b"].add_(1).sub_(1)


IMPURE: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "bytes of a leaf": (lambda state: state.weights["b"].add_(1), (state(),), "state.weights['b']"),
    "version only": (undone, (state(),), "state.weights['b']"),
    "gradient": (fall, (State({"w": torch.ones(2).requires_grad_()}, torch.tensor(0)),), "state.weights['w']"),
    "requires_grad": (lambda x: x.requires_grad_(), (torch.ones(2),), "x"),
    "a new key": (lambda state: state.weights.update(c=torch.ones(1)), (state(),), "state.weights['c']"),
    "a lost key": (lambda state: state.weights.pop("b"), (state(),), "state.weights['b']"),
    "a longer list": (lambda log: log.append(1.0), ([1.0],), "log[1]"),
    "a view of it": (lambda x: x[0].zero_(), (torch.ones(2, 2),), "x"),
    "an expanded one": (lambda x, y: y.zero_(), (torch.ones(1).expand(3), torch.ones(1)), "y"),
    "an array": (lambda a: a.fill(3), (np.zeros(2),), "a"),
    "a table": (lambda t: t.insert(0, "new", 1.0), (pd.DataFrame({"x": [1.0]}),), "t"),
    "running statistics": (net().train(), (torch.randn(5, 3),), "self.1.running_mean"),
    "a bound method": (net().train().forward, (torch.randn(5, 3),), "self.1.running_mean"),
    "a parameter": (lambda m: nn.init.zeros_(m[0].weight), (net(),), "m.0.weight"),
    "a buffer": (lambda m: m[1].running_var.mul_(2), (net(),), "m.1.running_var"),
    "a training flag": (lambda m: m[1].train(), (net(),), "m.1.training"),
    "an attribute": (remember, (net(),), "module.seen"),
    "a bound argument": (partial(torch.Tensor.add_, torch.ones(2)), (1,), "args[0]"),
    "PyTorch's draws": (lambda: torch.rand(2), (), "PyTorch's random state"),
    "numpy's draws": (lambda: np.random.rand(), (), "numpy's random state"),
    "Python's draws": (lambda: random.random(), (), "Python's random state"),
    "a closure's count": (count().__next__, (), "gave another result when called again"),
    "a generator's draws": (
        lambda g: torch.rand(2, generator=g), (torch.Generator(),), "gave another result when called again"
    ),
    "one number in a tree": (
        lambda numbers: {"a": torch.ones(2), "b": [next(numbers)]}, (count(),), "gave another result['b'][0]"
    ),
    "a result that is written to": (recycle(), (), "wrote to the first result"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPURE)
def test_what_is_not_pure_is_named(name: str) -> None:
    function, args, culprit = IMPURE[name]
    with pytest.raises(AssertionError, match=re.escape(culprit) + "(,|[.]$| when)"):
        verify_pure(function, *args)


SETTINGS: dict[str, tuple[Callable[[Any], Any], Any, Any, str]] = {
    "dtype": (torch.set_default_dtype, torch.float64, torch.float32, "the default dtype"),
    "device": (torch.set_default_device, "meta", None, "the default device"),
    "gradients": (torch.set_grad_enabled, False, True, "the grad mode"),
    "threads": (torch.set_num_threads, 3, None, "the number of threads"),
    "precision": (torch.set_float32_matmul_precision, "medium", "highest", "the precision of matrix products"),
    "deterministic": (torch.use_deterministic_algorithms, False, True, "the use of deterministic algorithms"),
    "fast path": (torch.backends.mha.set_fastpath_enabled, False, True, "the fast path of attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_moves_is_named(name: str) -> None:
    set_, moved, back, culprit = SETTINGS[name]
    back = torch.get_num_threads() if name == "threads" else back
    try:
        with pytest.raises(
            AssertionError, match=f"set_.* changed {culprit}[.]|use_.* changed {culprit}[.]"
        ):
            verify_pure(set_, moved)
    finally:
        set_(back)


def test_what_is_pure_passes_and_returns_the_first_result() -> None:
    module, x = net(), torch.tensor([[1.0, torch.nan, -0.0]])
    verify_pure(module, x)
    assert verify_pure(lambda x: x, x) is x
    assert verify_pure(torch.func.functional_call, module, {}, (x,)).shape == (1, 4)
    with torch.inference_mode():
        verify_pure(torch.sin, x + 1)
    meta = torch.ones(2, device="meta")
    assert verify_pure(torch.conj, torch.ones(2, dtype=torch.complex64)).is_conj()
    assert verify_pure(torch.neg, meta).is_meta
    assert (
        verify_pure(dict, a=[float("nan")], b=pd.Series([1.0]), c=np.zeros(1), d="text")["d"] == "text"
    )
    with pytest.raises(TypeError, match=r"undone\(\) missing 1 required positional argument"):
        verify_pure(undone)


UNSTABLE: dict[str, tuple[Callable[[State], Any], str]] = {
    "shape": (
        lambda s: s._replace(weights={**s.weights, "w": s.weights["w"][:1]}),
        "state.weights['w'] was float32 (2, 3), became float32 (1, 3).",
    ),
    "dtype": (lambda s: s._replace(steps=s.steps + 0.5), "state.steps was int64 (), became float32 ()."),
    "device": (
        lambda s: s._replace(steps=s.steps.to("meta")),
        "state.steps was int64 (), became int64 () on meta.",
    ),
    "a leaf that goes": (
        lambda s: s._replace(weights={"w": s.weights["w"]}),
        "state.weights['b'] was float32 (2,), became nothing.",
    ),
    "a leaf that comes": (
        lambda s: s._replace(weights={**s.weights, "c": s.steps}),
        "state.weights['c'] was not there, became int64 ().",
    ),
    "a number": (lambda s: s._replace(steps=1), "state.steps was int64 (), became int."),
    "the first of a tuple": (lambda s: (s._replace(steps=s.steps + 0.5), 1), "state.steps was int64 ()"),
    "another class": (lambda s: (s._asdict(), None), "state['weights']['b'] was not there"),
    "an empty branch": (lambda s: s._replace(weights={**s.weights, "c": {}}), "became PyTreeSpec"),
    "many leaves": (lambda s: s._replace(weights=[s.steps] * 9), "and 6 more."),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSTABLE)
def test_a_state_that_changes_its_form_is_named(name: str) -> None:
    function, culprit = UNSTABLE[name]
    with pytest.raises(AssertionError, match=re.escape(culprit)):
        verify_state_stable(function, state())


def test_a_stable_state_passes_with_or_without_an_info() -> None:
    double = verify_state_stable(lambda s: s._replace(steps=s.steps * 2), state())
    assert double.steps == 0
    moved, info = verify_state_stable(
        lambda s, by: (s._replace(steps=s.steps + by), "info"), state(), by=2
    )
    assert (int(moved.steps), info) == (2, "info")


def if_batched(x: Tensor, off: float) -> float:
    """What is wrong by ``off``, under vmap alone."""
    return off if torch._C._functorch.is_batchedtensor(x) else 0.0


@pytest.mark.parametrize(
    ("off", "tolerance", "told"),
    [
        (0.5, {}, r"result\['b'\]\[1\]\[0\] differs by 0.5 \(1 of 3 leaves differ\)"),
        (float("inf"), {}, "result.* differs by inf"),
        (float("nan"), {}, "result.* differs by inf"),
        (2.0**-12, {"rtol": 0}, "result.* differs by 0.000244"),
        (2.0**-12, {"atol": 2.0**-13}, "result.* differs by 0.000244"),
    ],
)
def test_where_vmap_and_the_loop_differ_is_named(off: float, tolerance: dict, told: str) -> None:

    def wrong(x: Tensor) -> dict[str, Any]:
        return {"a": x, "b": (x, [x + if_batched(x, off)])}

    with pytest.raises(AssertionError, match=f"equals_loop: wrong: {told}"):
        verify_vmap_equals_loop(wrong, torch.arange(6.0).reshape(2, 3), **tolerance)


def test_of_several_differences_the_largest_is_named() -> None:
    def off(x: Tensor) -> list[Tensor]:
        return [x + if_batched(x, by) for by in (1, 3, 2)]

    with pytest.raises(AssertionError, match=r"result\[1\] differs by 3 \(3 of 3 leaves"):
        verify_vmap_equals_loop(off, torch.zeros(2))


def test_any_axes_and_trees_can_be_mapped() -> None:
    tree = {"b": torch.randn(4, 2, 3), "a": (torch.randn(3, 2), None)}
    axes = {"b": 1, "a": (-1, None)}

    def product(tree: Any, y: Tensor, c: float) -> dict[str, Tensor]:
        return {"z": tree["b"] @ y + c, "y": tree["a"][0].sum() > y}

    result = verify_vmap_equals_loop(product, tree, torch.randn(3), 2.0, in_dims=(axes, None, None))
    assert result["z"].shape == (2, 4)
    verify_vmap_equals_loop(
        torch.nn.functional.dropout, torch.zeros(3), in_dims=0, randomness="same", rtol=0
    )
    verify_vmap_equals_loop(torch.log, torch.tensor([0.0, -1.0, torch.inf]), rtol=0, atol=0)
