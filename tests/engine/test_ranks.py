"""Processes that train together: two of them take the steps of one with the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import torch
from nets import ConvNet, equal, learner, mlp
from optimizers import OPTIMIZERS
from torch import distributed as dist
from torch import multiprocessing, nn

import hatfn
from hatfn.engine.ranks import Ranks, RanksDifferError, joined
from hatfn.state import HATState

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 14, 5, generator=GENERATOR)
Y = torch.randint(2, (3, 14), generator=GENERATOR)
IMAGES = torch.randn(14, 1, 6, 6, generator=GENERATOR)
CUT = 9  # of 14 samples: the first process has nine, the second five


def share(ranks: Ranks, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return x if ranks.size == 1 else x.split([CUT, x.shape[dim] - CUT], dim)[ranks.rank]


def make(module: Callable[[], nn.Module], x: torch.Tensor, ranks: Ranks, **settings: Any) -> hatfn.HAT:
    torch.manual_seed(0)
    head = {"head": "4"} if module is mlp else {}
    return learner(module(), x[:1], ranks=ranks, **head, **settings)


def train(ranks: Ranks, optimizer: str = "decay", **settings: int) -> HATState:
    """Two tasks alone and two together, each process on its share."""
    hat = make(mlp, X[0], ranks, optimizer=OPTIMIZERS[optimizer](), max_norm=1.0, **settings)
    state = hat.init(0)
    for task in (0, 1):
        state = hat.begin(state, task)
        for step, (x, y) in enumerate(zip(X, Y, strict=True)):
            state, info = hat.update(state, (share(ranks, x), share(ranks, y)), task, 10.0 * (step + 1))
            assert info.ok
            ranks.check_same(state, "test")
        state = hat.consolidate(state, task)
    state = hat.begin(state, [0, 2])
    x, y = share(ranks, X[:2], 1), share(ranks, Y[:2], 1)
    state, _ = hat.update(state, (x, y), [0, 2], 50.0)
    for task in (0, 2):
        state = hat.consolidate(state, task)
    return state


def refuse(ranks: Ranks) -> bool:
    """One process has a NaN: none of them takes the step."""
    hat = make(mlp, X[0], ranks)
    state = hat.begin(hat.init(0), 0)
    x = X[0].clone()
    if ranks.rank == 1:
        x[0, 0] = torch.nan
    new, info = hat.update(state, (x, Y[0]), 0, 10.0)
    return equal(new, state) and not info.ok


def statistics(ranks: Ranks) -> list[HATState]:
    """Each process's own until the task is closed."""
    hat = make(ConvNet, IMAGES, ranks)
    state = hat.begin(hat.init(0), 0)
    batch = share(ranks, IMAGES), share(ranks, Y[0])
    state, _ = hat.update(state, batch, 0, 10.0)
    again = hat.recalibrate(state, [batch[0]], 0)
    ranks.check_same(again, "recalibrated")
    seen = hatfn.readiness(hat, again, [batch], 0)
    assert len(set(map(float, ranks.gather(seen.gap)))) == 1
    return [state, hat.consolidate(state, 0), again]


def differ(ranks: Ranks) -> str:
    """What is said of states that are not the same."""
    hat = make(mlp, X[0], ranks)
    state = hat.init(0)
    params = {name: value + ranks.rank * (name == "2.weight") for name, value in state.params.items()}
    with pytest.raises(RanksDifferError) as caught:
        ranks.check_same(state._replace(params=params), "run: task 3")
    return str(caught.value)


def measure(ranks: Ranks) -> hatfn.Evaluation:
    """Each process reads its share of every task; the second has none of the last task's batches."""
    hat = make(mlp, X[0], ranks)
    state = hat.consolidate(hat.consolidate(hat.init(0), 0), 2)
    loaders = [
        [(x, y) for i, (x, y) in enumerate(zip(X.flatten(0, 1).split(n), Y.flatten().split(n), strict=True))
         if i % ranks.size == ranks.rank]
        for n in (5, 7, 42)
    ]  # fmt: skip
    return hatfn.evaluate(hat, state, loaders)


def _process(rank: int, job: Callable[[Ranks], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    assert joined() == Ranks(rank, 2)
    torch.save(job(joined()), f"{folder}/{rank}")
    dist.destroy_process_group()


def both(job: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """What two processes return."""
    multiprocessing.spawn(_process, (job, str(folder)), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=False) for rank in (0, 1)]


def everything(ranks: Ranks) -> dict[str, Any]:
    jobs = {"refuse": refuse, "statistics": statistics, "differ": differ, "measure": measure}
    trained = {name: functools.partial(train, optimizer=name) for name in ("decay", "adam")}
    trained["in parts"] = functools.partial(train, accumulate=2)
    return {name: job(ranks) for name, job in (trained | jobs).items()}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both processes; to start them costs more than all that they do."""
    return both(everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("job", ["decay", "adam", "in parts"])
def test_two_processes_end_where_one_with_the_whole_batch_does(seen, job: str) -> None:
    first, second = (one[job] for one in seen)
    assert equal(first, second)
    alone, start = (
        train(Ranks(), "adam" if job == "adam" else "decay"),
        make(mlp, X[0], Ranks()).init(0),
    )
    assert not equal(alone.params, start.params)
    for leaf, other in zip(optree.tree_leaves(first), optree.tree_leaves(alone), strict=True):
        torch.testing.assert_close(leaf, other, atol=1e-5, rtol=1e-5)


def test_a_step_that_one_refuses_is_refused_by_both(seen) -> None:
    assert seen[0]["refuse"]
    assert seen[1]["refuse"]


def test_statistics_are_averaged_when_a_task_is_closed(seen) -> None:
    (open0, closed0, again0), (open1, closed1, again1) = (one["statistics"] for one in seen)
    assert equal(closed0, closed1)
    assert equal(again0, again1)
    name = "norm1.running_mean"
    own = [state.task_buffers[name][0] for state in (open0, open1)]
    assert not torch.equal(*own)
    torch.testing.assert_close(closed0.task_buffers[name][0], (own[0] + own[1]) / 2)
    assert equal(open0.params, open1.params)


def test_states_that_differ_are_told_by_the_first_leaf(seen) -> None:
    for one in seen:
        assert "run: task 3: params/2.weight of process 0 differs from that of [1]" in one["differ"]


def test_accuracies_are_those_of_one_process(seen) -> None:
    alone = measure(Ranks())
    for one in seen:
        for mine, theirs in zip(alone, one["measure"], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert 0 < alone.task_incremental[0] < 1


def test_replicas_train_in_one_process() -> None:
    hat = make(mlp, X[0], Ranks(0, 2))
    states = hatfn.replicate(hat, [0, 1])
    many = hatfn.Replicas(hat)
    with pytest.raises(ValueError, match=r"ranks.size=2.*own seeds"):
        many.update(many.begin(states, 0), (X[0], Y[0]), 0, 5.0, shared=True)
