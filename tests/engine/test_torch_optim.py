"""An optimiser of torch.optim as a pure pair takes torch's own steps, and changes nothing it is given."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from nets import equal, learner, moved
from torch import Tensor

import hatfn
from hatfn.engine.torch_optim import TorchState, _is_elementwise, _is_position_free
from hatfn.models import MLP
from hatfn.testing import verify_pure

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

SETTINGS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], bool, bool]] = {
    # name: class, settings, whether steps do not depend on the parameters, whether numbers are apart
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, True, True),
    "sgd, dampened": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, True, True),
    "sgd, decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-6}, False, True),
    "adam": (torch.optim.Adam, {"lr": 1e-2}, True, True),
    "adam, fused": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "fused": True}, True, True),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}, False, True),
    "nadam": (torch.optim.NAdam, {}, True, True),
    "radam": (torch.optim.RAdam, {}, True, True),
    "rprop": (torch.optim.Rprop, {}, True, True),
    "rmsprop": (torch.optim.RMSprop, {"centered": True}, True, True),
    "adagrad": (torch.optim.Adagrad, {}, True, True),
    "adafactor": (torch.optim.Adafactor, {}, False, False),
}


def draw(*lead: int) -> dict[str, Tensor]:
    return {"w": torch.randn(*lead, 3, 4).double(), "b": torch.randn(*lead, 3).double()}


def shapes(tree: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in optree.tree_leaves(tree)]


@pytest.mark.parametrize("name", SETTINGS)
def test_it_takes_the_steps_of_torch(name: str) -> None:
    kind, settings, position_free, elementwise = SETTINGS[name]
    assert _is_position_free(kind, settings) == position_free
    assert _is_elementwise(kind, settings) == elementwise
    optimizer, params = hatfn.from_torch(kind, **settings), draw()
    theirs = {key: value.clone().requires_grad_() for key, value in params.items()}
    reference, state = kind(list(theirs.values()), **settings), optimizer.init(params)
    for _ in range(4):
        gradients = draw()
        for key, param in theirs.items():
            param.grad = gradients[key].clone()
        reference.step()
        updates, new = verify_pure(optimizer.update, gradients, state, params=params)
        assert shapes(new) == shapes(state)
        params, state = {key: params[key] + updates[key] for key in params}, new
    for key, param in theirs.items():
        torch.testing.assert_close(params[key], param.detach(), rtol=1e-12, atol=1e-12)


def test_fused_kernels_see_what_lies_in_parts_of_memory() -> None:
    """They read from end to end, whatever the strides: gradients of groups are parts of one tensor."""
    optimizer = hatfn.from_torch(torch.optim.Adam, lr=1e-2, fused=True)
    whole = torch.randn(4, 6)
    parts = {"w": whole[:, 1:3]}
    ours, _ = optimizer.update(parts, optimizer.init(parts), params=parts)
    dense = {"w": parts["w"].clone(memory_format=torch.contiguous_format)}
    theirs, _ = optimizer.update(dense, optimizer.init(dense), params=dense)
    assert equal(ours, theirs)


@pytest.mark.parametrize("name", ["sgd", "adam, fused", "adafactor"])
def test_replicas_take_each_its_own_steps(name: str) -> None:
    """Also after a step that one of them refused, whose count then is another."""
    kind, settings, *_ = SETTINGS[name]
    optimizer, params = hatfn.from_torch(kind, **settings), draw(3)
    one = {key: value[0] for key, value in params.items()}
    states = torch.func.vmap(lambda _: optimizer.init(one))(torch.zeros(3))
    singles = [optimizer.init(one) for _ in range(3)]
    for step in range(3):
        gradients = draw(3)
        updates, new = optimizer.stacked(gradients, states, params=params)
        if step == 1:  # the second replica stays as it was
            new = optree.tree_map(lambda new, old: torch.stack([new[0], old[1], new[2]]), new, states)
        for i in range(3):
            mine = {key: value[i] for key, value in params.items()}
            alone, single = optimizer.update(
                {key: value[i] for key, value in gradients.items()}, singles[i], params=mine
            )
            for key, update in alone.items():
                torch.testing.assert_close(updates[key][i], update, rtol=1e-12, atol=1e-12)
            if (step, i) != (1, 1):
                singles[i] = single
        states = new
    assert isinstance(states, TorchState)


def test_a_replica_that_refuses_a_step_stays_behind() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 8, 5), torch.randint(2, (2, 8))
    spoiled = x.clone()
    spoiled[1] = torch.nan
    optimizer = hatfn.from_torch(torch.optim.Adam, lr=1e-2, fused=True)
    hat = learner(MLP(5, 3, width=16), x[0], optimizer=optimizer)
    many = hatfn.Replicas(hat)
    states = many.begin(hatfn.replicate(hat, [0, 1]), 0)
    states, first = many.update(states, (spoiled, y), 0, 10.0)
    states, second = many.update(states, (x, y), 0, 10.0)
    assert first.ok.tolist() == [True, False]
    assert second.ok.tolist() == [True, True]
    for i in range(2):
        alone = hat.begin(hat.init(i, fresh=True), 0)
        for batch in ((spoiled[i], y[i]), (x[i], y[i])):
            alone, _ = hat.update(alone, batch, 0, 10.0)
        mine = hatfn.replica(states, i)
        torch.testing.assert_close(mine.params, alone.params)
        assert mine.opt_state.begun
        assert equal(mine.opt_state.kept[0]["step"], alone.opt_state.kept[0]["step"])


def test_moments_are_saved(tmp_path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randint(2, (8,))
    hat = learner(MLP(5, 3, width=16), x, optimizer=hatfn.from_torch(torch.optim.RAdam, lr=1e-2))
    state, _ = hat.update(hat.begin(hat.init(0), 0), (x, y), 0, 10.0)
    hatfn.save(tmp_path / "state", state, hat)
    loaded = hatfn.load(tmp_path / "state", hat)
    assert equal(loaded, state)
    after, _ = hat.update(state, (x, y), 0, 20.0)
    assert moved(state, after)
    assert equal(hat.update(loaded, (x, y), 0, 20.0)[0], after)


def test_vmap_is_refused_in_words() -> None:
    optimizer, params = hatfn.from_torch(torch.optim.Adam), draw(2)
    states = torch.func.vmap(optimizer.init)(params)
    with pytest.raises(ValueError, match=r"vmap cannot batch torch.optim's Adam.*hatfn\.Replicas"):
        torch.func.vmap(lambda g, s, p: optimizer.update(g, s, params=p))(params, states, params)
