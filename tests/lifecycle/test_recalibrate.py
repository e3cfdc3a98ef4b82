"""Running statistics: re-estimated under binary gates, and of the open task alone."""

from __future__ import annotations

import optree
import pytest
import torch
from nets import ConvNet, equal, learner, moved
from torch import Tensor, nn

from hatfn.models import MLP

# Learners this small use up their units; test_silent.py has the warnings that say so.
pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


def test_recalibration_is_the_mean_over_batches_under_binary_gates() -> None:
    x, y = torch.randn(16, 1, 6, 6), torch.randint(2, (16,))
    hat = learner(ConvNet(), x)
    begun = state = hat.begin(hat.init(0), 1)
    for _ in range(3):
        state, _ = hat.update(state, (x, y), 1, scale=2.0)
    assert moved(begun, state)
    after = hat.recalibrate(state, x.split(4), 1)
    first = nn.functional.conv2d(x, state.params["conv1.weight"], padding=1)
    batches = first.split(4)
    mean = torch.stack([part.mean((0, 2, 3)) for part in batches]).mean(0)
    var = torch.stack([part.var((0, 2, 3)) for part in batches]).mean(0)
    torch.testing.assert_close(after.task_buffers["norm1.running_mean"][1], mean)
    torch.testing.assert_close(after.task_buffers["norm1.running_var"][1], var)
    assert not torch.equal(
        after.task_buffers["norm2.running_var"], state.task_buffers["norm2.running_var"]
    )
    for name, leaf in state.task_buffers.items():
        assert torch.equal(after.task_buffers[name][[0, 2]], leaf[[0, 2]])
    assert equal(after._replace(task_buffers={}), state._replace(task_buffers={}))
    broken = hat.recalibrate(state, [x * torch.inf], 1)
    assert equal(broken, state)
    plain = learner(MLP(5, 3, width=16), torch.randn(1, 5))
    begun = plain.begin(plain.init(0), 0)
    assert equal(plain.recalibrate(begun, [torch.randn(4, 5)], 0), begun)


def test_recalibration_leaves_frozen_norms_and_other_tasks_alone() -> None:
    class Half(nn.Module):
        """The first norm stays in eval mode, whatever train() says."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.n0, self.b, self.n = (
                nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8),
            )  # fmt: skip
            self.head = nn.Linear(8, 3)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.n0.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.n(self.b(self.n0(self.a(x)).relu())).relu())

    x = torch.randn(12, 5)
    hat = learner(Half(), x)
    assert {name.split(".")[0] for name in hat.wiring.buffers} == {"n"}
    state = hat.init(0)
    state = hat.consolidate(hat.recalibrate(hat.begin(state, 0), [x], 0), 0)
    before = hat.forward(state, x, 0)
    state = hat.recalibrate(hat.begin(state, 1), [3 * x + 1], 1)
    assert torch.equal(hat.forward(state, x, 0), before)
    stacked = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), hat.begin(state, 1))
    both = torch.vmap(lambda s: hat.recalibrate(s, [x], 1))(stacked)
    alone = hat.recalibrate(hat.begin(state, 1), [x], 1)
    torch.testing.assert_close(
        both.task_buffers["n.running_var"][0], alone.task_buffers["n.running_var"]
    )
