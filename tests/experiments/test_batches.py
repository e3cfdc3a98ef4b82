"""Which images a run trains on, and in which batches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.measure import CALIBRATION_IMAGES, representative
from hatfn.experiments.run.setup import batches, training_part
from hatfn.experiments.streams import Part, make_stream


@given(count=st.integers(2, 200), size=st.integers(2, 64))
def test_an_epoch_is_every_image_once_and_no_batch_of_one(count: int, size: int) -> None:
    data = Part(torch.arange(count), torch.arange(count))
    parts = list(batches(data, size, torch.Generator().manual_seed(0)))
    assert torch.cat([part.y for part in parts]).sort().values.tolist() == list(range(count))
    assert max(len(part.y) for part in parts) <= size
    assert min(len(part.y) for part in parts) >= min(2, size // 2)


def test_test_images_take_no_part_in_a_search() -> None:
    task = make_stream("split-digits", None, 0)[0]
    held = training_part(RunConfig(evaluate_on="validation"), task)
    full = training_part(RunConfig(), task)
    assert len(full.y) == len(task.train.y) + len(task.validation.y)
    assert torch.equal(held.x, task.train.x)


def test_a_task_is_closed_on_batches_of_all_its_classes() -> None:
    """Although its images come class after class, as from generators and folders."""
    y = torch.arange(5).repeat_interleave(200)
    some = representative(Part(torch.arange(1000), y), 32, seed=0)
    rows = torch.cat([x for x, _ in some])
    assert len(rows) == len(rows.unique()) == CALIBRATION_IMAGES
    for x, labels in some:
        assert torch.equal(labels, y[x])
        assert len(labels.unique()) == 5
    odd = representative(Part(torch.arange(33), torch.zeros(33)), 32, seed=0)
    assert [len(x) for x, _ in odd] == [32], "one image has no variance"
