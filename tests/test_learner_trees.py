"""Modules that take and return trees: graphs, several inputs, nested dicts, dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torchopt
from nets import equal
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch_geometric.nn import GCNConv, SAGEConv

import hatfn
from hatfn.testing import verify_no_forgetting, verify_wiring

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


class Graph(nn.Module):
    """Two layers of a graph network: a class for each node."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.head = layer(5, 24), layer(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.first(x, edge_index).relu()
        return self.head(self.second(x, edge_index).relu())


class TwoInputs(nn.Module):
    """An image and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.numbers, self.head = nn.Linear(12, 24), nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.head((self.image(image.flatten(1)) + self.numbers(numbers)).relu())


class Nested(TwoInputs):
    """A dict of dicts, and one more keyword."""

    def forward(self, features: dict[str, dict[str, Tensor]], weight: Tensor | None = None) -> Tensor:
        logits = super().forward(features["seen"]["image"], features["told"]["numbers"])
        return logits if weight is None else logits * weight[:, None]


@dataclass
class Answer:
    logits: Tensor
    features: Tensor
    note: str


pytree.register_dataclass(Answer, serialized_type_name="hatfn.tests.Answer")


class Answers(TwoInputs):
    """Returns a dataclass that PyTorch's pytree knows."""

    def forward(self, image: Tensor, numbers: Tensor) -> Answer:
        features = (self.image(image.flatten(1)) + self.numbers(numbers)).relu()
        return Answer(self.head(features), features, "an answer")


IMAGE, NUMBERS = torch.randn(12, 3, 2, 2), torch.randn(12, 5)
EDGES = torch.stack([torch.arange(12), (torch.arange(12) * 5 + 1) % 12])
CASES = {
    "GCN": (
        lambda: Graph(partial(GCNConv, add_self_loops=False)),
        (NUMBERS, EDGES),
        {"unbatched": ["1"]},
    ),
    "SAGE": (
        lambda: Graph(SAGEConv),
        {"x": NUMBERS, "edge_index": EDGES},
        {"unbatched": ["edge_index"]},
    ),
    "two inputs": (TwoInputs, (IMAGE, NUMBERS), {}),
    "a dict of dicts": (
        Nested,
        {
            "features": {"seen": {"image": IMAGE}, "told": {"numbers": NUMBERS}},
            "weight": torch.rand(12),
        },
        {"head": "head"},
    ),
    "a dataclass": (Answers, {"image": IMAGE, "numbers": NUMBERS}, {}),
}
Y = torch.arange(12) % 2


def logits(output) -> Tensor:
    return output.logits if isinstance(output, Answer) else output


def taught(hat: hatfn.HAT, state: hatfn.HATState, x, task: int) -> hatfn.HATState:
    state = hat.begin(state, task)
    for _ in range(3):
        state, info = hat.update(state, (x, Y), task, 20.0)
        assert info.ok
    return hat.consolidate(state, task, [(x, Y)])


@pytest.mark.parametrize("case", CASES)
def test_the_life_of_a_module_of_trees(case: str) -> None:
    torch.manual_seed(0)
    make, x, settings = CASES[case]
    module = make()
    wiring = hatfn.trace(module, x, **settings)
    assert wiring.heads[0].weight == "head.weight"
    assert wiring.measures.shared > 0.9, wiring.summary()
    verify_wiring(module, wiring, x)
    hat = hatfn.build(module, wiring, [3, 2], torchopt.adamw(1e-2, weight_decay=0.1))
    state = taught(hat, hat.init(0), x, 0)
    served, weights = hat.forward(state, x, 0), state.params
    state = taught(hat, state, x, 1)
    assert not equal(state.params, weights)
    assert torch.equal(logits(hat.forward(state, x, 0)), logits(served))
    verify_no_forgetting(hat, state, x)

    everything = hat.predict(state, x)
    assert type(everything) is type(served)
    torch.testing.assert_close(logits(everything)[0], logits(served), rtol=1e-4, atol=1e-4)
    assert logits(everything).shape == (2, 12, 3)
    assert hatfn.infer_task(logits(everything)).shape == (12,)
    assert hatfn.infer_task_by_gradient(hat, state, x).shape == (12,)
    scores = hatfn.evaluate(hat, state, [[(x, Y)], [(x, Y)]])
    right = (logits(served).argmax(1) == Y).double().mean().item()
    assert scores.task_incremental[0] == pytest.approx(right)
    assert hatfn.similarity(hat, state, (x, Y)).shape == (2,)

    alone = hatfn.export(hat, state, 0)
    args, kwargs = ((), x) if isinstance(x, dict) else (x, {})
    with torch.no_grad():
        torch.testing.assert_close(logits(alone(*args, **kwargs)), logits(served), rtol=1e-4, atol=1e-4)
    small = hat.compact(state, 0, x)
    torch.testing.assert_close(logits(small(x)), logits(served), rtol=1e-4, atol=1e-4)

    many = hatfn.Replicas(hat)
    states = many.begin(hatfn.replicate(hat, [0, 1]), 0)
    states, info = many.update(states, (x, Y), 0, 20.0)
    assert info.ok.all()
    one = hat.begin(hat.init(1, fresh=True), 0)
    one, alone_info = hat.update(one, (x, Y), 0, 20.0)
    torch.testing.assert_close(info.loss[1], alone_info.loss, rtol=1e-3, atol=1e-4)
    if isinstance(served, Answer):
        assert served.note == "an answer"
        assert torch.equal(alone(*args, **kwargs).features > 0, served.features > 0)


def test_edges_that_lead_with_no_samples_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"as many in each.*unbatched=\[\.\.\.\]"):
        hatfn.trace(Graph(GCNConv), (NUMBERS, EDGES))
    with pytest.raises(ValueError, match=r"unbatched names 'edges', which is no input.*0, 1"):
        hatfn.trace(Graph(GCNConv), (NUMBERS, EDGES), unbatched=["edges"])


def test_parts_of_a_batch_keep_what_all_samples_share() -> None:
    module, x = TwoInputs(), (IMAGE, NUMBERS)
    whole = hatfn.build(module, hatfn.trace(module, x), [2], torchopt.sgd(0.1))
    parts = hatfn.build(module, hatfn.trace(module, x), [2], torchopt.sgd(0.1), accumulate=3)
    states = []
    for hat in (whole, parts):
        state, info = hat.update(hat.begin(hat.init(0), 0), (x, Y), 0, 20.0)
        assert info.logits.shape == (12, 2)
        states.append(state)
    for name in states[0].params:
        torch.testing.assert_close(states[0].params[name], states[1].params[name])


def test_outputs_without_logits_need_a_loss() -> None:
    class Pair(TwoInputs):
        def forward(self, image: Tensor, numbers: Tensor) -> dict[str, object]:
            return {"scores": [super().forward(image, numbers)]}

    module, x = Pair(), (IMAGE, NUMBERS)
    wiring = hatfn.trace(module, x)
    hat = hatfn.build(module, wiring, [2], torchopt.sgd(0.1))
    with pytest.raises(TypeError, match=r"returns a dict with scores.*build\(loss="):
        hat.update(hat.begin(hat.init(0), 0), (x, Y), 0, 20.0)
    hat = hatfn.build(
        module,
        wiring,
        [2],
        torchopt.sgd(0.1),
        loss=lambda output, y: nn.functional.cross_entropy(output["scores"][0], y),
    )
    _, info = hat.update(hat.begin(hat.init(0), 0), (x, Y), 0, 20.0)
    assert info.logits["scores"][0].shape == (12, 2)
