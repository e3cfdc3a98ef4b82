"""Loaders that die or give nothing, and labels and batches that cannot be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchopt
from ledger import fingerprint
from nets import ConvNet, equal, learn, learner
from torch import Tensor, nn

import hatfn

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

X, Y = torch.randn(8, 1, 6, 6), torch.randint(2, (8,))
HAT = learner(ConvNet(), X, optimizer=torchopt.adam(1e-2))
OPEN = HAT.begin(learn(HAT, HAT.init(0), X, 0), 1)
NORM = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def dying(batches: list[Any]) -> Iterator[Any]:
    yield from batches
    raise ConnectionError("the loader died")


LEARNED = HAT.consolidate(OPEN, 1, [])
READERS: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda read: hatfn.evaluate(HAT, LEARNED, [[(X, Y)], read([(X, Y)] * 2), []]),
    "readiness": lambda read: hatfn.readiness(HAT, OPEN, read([(X, Y)] * 2), 1),
    "recalibrate": lambda read: HAT.recalibrate(OPEN, read([X] * 2), 1),
    "recalibrate replicas": lambda read: hatfn.Replicas(HAT).recalibrate(
        hatfn.stack([OPEN, OPEN]), read([X] * 2), 1, shared=True
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_loader_dies(reader: str) -> None:
    """Its own error, and nothing of what was read before it counts."""
    before = [fingerprint(state) for state in (OPEN, LEARNED)]
    with pytest.raises(ConnectionError, match="the loader died"):
        READERS[reader](dying)
    assert [fingerprint(state) for state in (OPEN, LEARNED)] == before
    READERS[reader](list)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("given", ["nothing", "an empty batch"])
def test_a_loader_that_gives_nothing_is_told(reader: str, given: str) -> None:
    def nothing(batches: list[Any]) -> Any:
        if given == "nothing":
            return iter(())
        one = batches[0]
        return [one[:0] if isinstance(one, Tensor) else (one[0][:0], one[1][:0])]

    with pytest.raises(ValueError, match=f"{reader.split(maxsplit=1)[0]}.* Expected at least one"):
        READERS[reader](nothing)


LABELS = [torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", LABELS, ids=str)
@pytest.mark.parametrize(
    "reader",
    {
        "update": lambda y: HAT.update(OPEN, (X, y), 1, 5.0),
        "readiness": lambda y: hatfn.readiness(HAT, OPEN, [(X, y)], 1),
        "evaluate, loader 0": lambda y: hatfn.evaluate(HAT, LEARNED, [[(X, y)], [(X, Y)], []]),
        "begin": lambda y: HAT.begin(LEARNED, 2, init_from="similar", batch=(X, y)),
        "update replicas": lambda y: hatfn.Replicas(HAT).update(
            hatfn.stack([OPEN]), (X, y), 1, 5.0, shared=True
        ),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_labels_of_another_type(
    reader: tuple[str, Callable[[Tensor], Any]], dtype: torch.dtype
) -> None:
    where, read = reader
    with pytest.raises(TypeError, match=f"{where.removesuffix(' replicas')}: .*{dtype}.*int64"):
        read(Y.to(dtype))
    read(Y)


def test_a_single_sample_and_batch_norm() -> None:
    """In training it has no variance over one sample; where it is served it needs none."""
    x = torch.randn(8, 5)
    hat = learner(NORM, x, head="3")
    state = hat.begin(hat.init(0), 1)
    many, states = hatfn.Replicas(hat), hatfn.stack([state])
    before = fingerprint(state)
    for attempt in (
        lambda: hat.update(state, (x[:1], Y[:1]), 1, 5.0),
        lambda: hat.recalibrate(state, [x, x[:1]], 1),
        lambda: many.update(states, (x[:1], Y[:1]), 1, 5.0, shared=True),
    ):
        with pytest.raises(ValueError, match=r"x of shape \(1, 5\).*more than one sample"):
            attempt()
    assert fingerprint(state) == before
    state, info = hat.update(state, (x[:2], Y[:2]), 1, 5.0)
    assert info.ok
    assert hat.forward(hat.consolidate(state, 1), x[:1], 1).shape == (1, 2)
    wide, one = HAT.update(OPEN, (X[:1], Y[:1]), 1, 5.0)  # one image, of many pixels
    assert one.ok
    assert not equal(wide.params, OPEN.params)
