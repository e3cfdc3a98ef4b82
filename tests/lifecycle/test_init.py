"""A first state: a function of the seed, and of nothing else."""

from __future__ import annotations

import optree
import torch
from nets import ConvNet, equal, learner

from hatfn.models import MLP


def test_init_is_a_function_of_the_seed() -> None:
    hat = learner(ConvNet(), torch.randn(2, 1, 6, 6))
    before = torch.get_rng_state()
    assert equal(hat.init(3), hat.init(3))
    assert equal(hat.init(3, fresh=True), hat.init(3, fresh=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not equal(hat.init(3).embeddings, hat.init(4).embeddings)
    assert equal(hat.init(3).params, hat.init(4).params)
    assert not equal(hat.init(3, fresh=True).params, hat.init(4, fresh=True).params)


def test_per_task_values_do_not_share_storage() -> None:
    state = learner(ConvNet(), torch.randn(2, 1, 6, 6)).init(0)
    for leaf in optree.tree_leaves((state.task_params, state.task_buffers, state.embeddings)):
        assert leaf.is_contiguous(), "an expanded leaf would be one storage for all tasks"


def test_a_fresh_network_is_not_the_modules() -> None:
    x = torch.randn(8, 5)
    hat = learner(MLP(5, 3, width=16), x)
    assert not equal(hat.init(3, fresh=True).params, hat.init(3).params)
    assert hat.init(3, fresh=True).fresh.item() is True
    assert hat.init(3).fresh.item() is False
