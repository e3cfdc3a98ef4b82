"""Who uses what, who reuses whose units, and what a state weighs."""

from __future__ import annotations

import optree
import timm
import torch
import torchopt
from nets import learner

import hatfn
from hatfn.experiments.bench import cases as bench_cases
from hatfn.models import MLP

X = torch.randn(8, 5)


def masked(hat: hatfn.HAT, state: hatfn.HATState, task: int, units: dict[str, list[int]]):
    """The state with a task's embeddings such that exactly some units are on."""
    embeddings = {}
    for group, e in state.embeddings.items():
        on = torch.isin(torch.arange(e.shape[1]), torch.tensor(units.get(group, []), dtype=torch.long))
        embeddings[group] = e.index_copy(0, torch.tensor([task]), (on * 2.0 - 1)[None])
    return state._replace(embeddings=embeddings)


def test_overlap_counts_the_units_two_tasks_share() -> None:
    hat = learner(MLP(5, 3, width=64), X)
    state = hat.init(0)
    chosen = {0: ([0, 1, 2], [0]), 2: ([1, 2, 3, 4], [5, 6])}
    for task, (first, second) in chosen.items():
        state = masked(hat, state, task, {"hidden.0": first, "hidden.1": second})
        state = hat.consolidate(state, task)
    table = hatfn.overlap(state, hat.wiring)
    assert table.columns.tolist() == [0, 2]
    assert table.loc["hidden.0"].to_numpy().tolist() == [[3, 2], [2, 4]]
    assert table.loc["hidden.1"].to_numpy().tolist() == [[1, 0], [0, 2]]
    assert table.groupby("task").sum().to_numpy().tolist() == [[4, 2], [2, 6]]
    assert hatfn.overlap(hat.init(0), hat.wiring).empty


def bytes_held(state: hatfn.HATState) -> int:
    """What the allocations behind the leaves amount to, each counted once."""
    storages = [leaf.untyped_storage() for leaf in optree.tree_leaves(state)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_of_an_mlp_by_hand() -> None:
    state = learner(MLP(7, 2, width=16), torch.randn(4, 7)).init(0)
    memory = hatfn.memory(state)
    shared, head, units = 16 * 7 + 16 + 16 * 16 + 16, 16 * 3 + 3, 32
    assert memory.to_dict() == {
        "params": 4 * shared,
        "protection": shared,  # one byte per shared weight
        "task_params": 3 * 4 * head,
        "task_buffers": 0,
        "embeddings": 3 * 4 * units,
        "masks": 3 * units,
        "opt_state": 4 * (shared + head + units),  # momentum of the weights and of one task's own
        # Flags and settings per task, settings, seed and fresh, the cumulative mask.
        "rest": 3 * (3 + 2 * 8) + 3 * 8 + 9 + units,
    }
    assert memory.sum() == bytes_held(state)


def test_memory_of_resnet18s_by_hand() -> None:
    module, tasks = timm.create_model("resnet18s", num_classes=10), 5
    x = torch.randn(1, 3, 32, 32)
    hat = hatfn.build(module, hatfn.trace(module, x), [10] * tasks, torchopt.adam(1e-3))
    state = bench_cases.with_density(hat, 0.2, seed=0)
    memory = hatfn.memory(state)
    convs = sum(p.numel() for p in module.parameters() if p.dim() == 4)
    norms = sum(p.numel() for p in module.parameters() if p.dim() == 1) - 10
    count = sum(name.endswith("num_batches_tracked") for name, _ in module.named_buffers())
    head, units = 512 * 10 + 10, sum(hat.wiring.groups.values())
    assert convs + norms + head == sum(p.numel() for p in module.parameters())
    assert memory.drop("opt_state").to_dict() == {
        "params": 4 * convs,
        "protection": convs,
        "task_params": tasks * 4 * (norms + head),
        "task_buffers": tasks * (4 * norms + 8 * count),  # mean and variance, as many as the affine
        "embeddings": tasks * 4 * units,
        "masks": tasks * units,
        "rest": tasks * (3 + 2 * 8) + 3 * 8 + 9 + units,
    }
    moments = 2 * 4 * (convs + norms + head + units)
    steps = len(hat.wiring.params) + len(hat.wiring.groups)  # torchopt counts them for each leaf
    assert memory["opt_state"] == moments + 8 * steps
    assert memory.sum() == bytes_held(state)
