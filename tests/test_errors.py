"""Bad input: where, what was expected, what came and how to mend it; and the caller loses nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from nets import ConvNet, equal, learn, learner, mlp
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import hatfn
from hatfn import schedule
from hatfn.networks import MLP

X, Y = torch.randn(8, 5), torch.randint(2, (8,))
MODULE = MLP(5, 3, width=16)
WIRING = hatfn.trace(MODULE, X[:1])
HAT = learner(MODULE, X)  # classes 3, 2, 3
START = HAT.init(0)
OPEN = HAT.begin(START, 1)
LEARNED = HAT.consolidate(OPEN, 1)
ADAM = torchopt.adam(1e-3)
IMAGES = torch.randn(2, 1, 8, 8)
MAPS = hatfn.build(
    nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)),
    hatfn.trace(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)), IMAGES),
    None, ADAM,
)  # fmt: skip
LOGITS, ROWS = torch.randn(2, 8, 3), torch.tensor([0, 1] * 4)


def build(**wrong: Any) -> hatfn.HAT:
    settings = {"module": MODULE, "wiring": WIRING, "classes": [3, 2], "optimizer": ADAM} | wrong
    return hatfn.build(**settings)


def compact_words() -> object:
    words = nn.Sequential(nn.Embedding(7, 16), nn.Flatten(), nn.Linear(32, 3))
    hat = learner(words, torch.tensor([[1, 2]]), head="2")
    return hat.compact(hat.consolidate(hat.init(0), 0), 0)


BAD: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    # name: the call, the error, words its message must hold: where, expected, got, how to mend
    "task out of range": (
        lambda: HAT.begin(START, 3), ValueError, ["begin", "task=3", "from 0 to 2", "3 tasks", "build()"]),
    "negative task": (
        lambda: HAT.update(OPEN, (X, Y), -1, 1.0), ValueError, ["update", "task=-1", "0 to 2", "negative"]),
    "a float task": (
        lambda: HAT.forward(LEARNED, X, 1.0), TypeError, ["forward", "task=1.0", "float", "task=0"]),
    "a string task": (
        lambda: HAT.consolidate(OPEN, "1"), TypeError, ["consolidate", "task='1'", "str", "int"]),
    "a boolean task": (
        lambda: HAT.begin(START, True), TypeError, ["begin", "task=True", "bool"]),
    "a tensor of tasks": (
        lambda: HAT.begin(START, torch.tensor([0, 1])), TypeError, ["begin", "Tensor", "int"]),
    "a task in a list of tasks": (
        lambda: HAT.predict(LEARNED, X, tasks=[1, 7]), ValueError, ["predict", "task=7", "0 to 2"]),
    "a list of tasks for the samples": (
        lambda: HAT.forward(LEARNED, X, [1] * 8), TypeError,
        ["forward", "list", "(8,)", "hat.forward(state, x, task=torch.tensor([0, 1, ...]))"]),
    "too few tasks for the samples": (
        lambda: HAT.forward(LEARNED, X, torch.tensor([1, 1])), ValueError,
        ["forward", "(2,)", "8 samples", "(8,)"]),
    "float tasks for the samples": (
        lambda: HAT.forward(LEARNED, X, torch.ones(8)), TypeError, ["forward", "float32", "int64"]),
    "a sample's task out of range": (
        lambda: HAT.forward(LEARNED, X, torch.full((8,), 7)), ValueError, ["forward", "task=7", "0 to 2"]),
    "a negative task of a sample": (
        lambda: HAT.forward(LEARNED, X, torch.full((8,), -1)), ValueError, ["forward", "task=-1", "0 to 2"]),
    "a sample's task never learned": (
        lambda: HAT.forward(LEARNED, X, torch.tensor([1] * 7 + [2])), ValueError,
        ["forward", "task 2", "never learned"]),
    "a task that is not open": (
        lambda: HAT.update(OPEN, (X, Y), 0, 1.0), ValueError,
        ["update", "task 0 is not open", "[1]", "hat.begin(state, 0)"]),
    "no task is open": (
        lambda: HAT.update(LEARNED, (X, Y), 1, 1.0), ValueError, ["update", "none", "hat.begin(state, 1)"]),
    "a task never learned": (
        lambda: HAT.forward(OPEN, X, 1), ValueError,
        ["forward", "task 1", "never learned", "hat.consolidate(state, 1)", "scale"]),
    "predict a task never learned": (
        lambda: HAT.predict(LEARNED, X, tasks=[1, 2]), ValueError, ["predict", "task 2", "never learned"]),
    "predict nothing": (
        lambda: HAT.predict(START, X), ValueError, ["predict", "no tasks", "consolidate"]),
    "a compact task never learned": (
        lambda: HAT.compact(OPEN, 1), ValueError, ["compact", "task 1", "never learned", "hat.consolidate(state, 1)"]),
    "a compact task that does not exist": (
        lambda: HAT.compact(LEARNED, 4), ValueError, ["compact", "task=4", "0 to 2"]),
    "a compact input of wrong dimensions": (
        lambda: HAT.compact(LEARNED, 1, X[0]), ValueError, ["compact", "(5,)", "(B, 5)", "x[None]"]),
    "a compact input that does not fit": (
        lambda: HAT.compact(LEARNED, 1, X[:, :4]), ValueError, ["compact", "fails on x", "(B, 5)"]),
    "a compact module of integers without an input": (
        compact_words, ValueError, ["compact", "random numbers", "hat.compact(state, task, x=batch)"]),
    "a subnetwork's input of wrong dimensions": (
        lambda: HAT.compact(LEARNED, 1)(X[0]), ValueError, ["Subnet", "(5,)", "(B, 5)", "x[None]"]),
    "an exported task never learned": (
        lambda: hatfn.export(HAT, OPEN, 1), ValueError, ["export", "task 1", "never learned", "hat.consolidate(state, 1)"]),
    "an exported task that does not exist": (
        lambda: hatfn.export(HAT, LEARNED, 4), ValueError, ["export", "task=4", "0 to 2"]),
    "exporting a list of tasks": (
        lambda: hatfn.export(HAT, LEARNED, [1]), TypeError, ["export", "task=[1]", "list", "task=0"]),
    "an export's input of wrong dimensions": (
        lambda: hatfn.export(HAT, LEARNED, 1, compact=True, x=X[0]), ValueError, ["export", "(5,)", "(B, 5)", "x[None]"]),
    "adopting numbers": (
        lambda: hatfn.adopt(HAT, MODULE.state_dict()), TypeError, ["adopt", "OrderedDict", "nn.Module", "hatfn.adopt(hat, "]),
    "adopting another architecture": (
        lambda: hatfn.adopt(HAT, mlp()), ValueError,
        ["adopt", "another architecture", "0.bias", "module (16,)", "learner None"]),
    "adopting another width": (
        lambda: hatfn.adopt(HAT, MLP(5, 3, width=8)), ValueError,
        ["adopt", "head.weight", "module ('classes', 8)", "learner ('classes', 16)", "that was traced"]),
    "adopting another constant": (
        lambda: hatfn.adopt(learner(Shifted(0.0), X), Shifted(1.0)), ValueError,
        ["adopt", "buffer shift", "Trace the module"]),
    "labels outside the task": (
        lambda: HAT.update(OPEN, (X, Y + 1), 1, 1.0), ValueError,
        ["update", "labels from", "to 2", "2 classes", "0 to 1", "y - first_class"]),
    "negative labels": (
        lambda: HAT.update(OPEN, (X, Y - 1), 1, 1.0), ValueError, ["labels from -1", "0 to 1"]),
    "labels of another type": (
        lambda: HAT.update(OPEN, (X, Y.int()), 1, 1.0), TypeError, ["int32", "int64", "y.long()"]),
    "labels as floats": (
        lambda: HAT.update(OPEN, (X, Y.float()), 1, 1.0), TypeError, ["float32", "int64", "y.long()"]),
    "labels that do not match": (
        lambda: HAT.update(OPEN, (X, Y[:3]), 1, 1.0), ValueError, ["8 samples", "(3,)"]),
    "a batch that is no pair": (
        lambda: HAT.update(OPEN, X, 1, 1.0), TypeError, ["update", "Tensor", "pair", "(x, y)"]),
    "a batch of arrays": (
        lambda: HAT.update(OPEN, (X.numpy(), Y.numpy()), 1, 1.0), TypeError, ["ndarray", "as_tensor"]),
    "an empty batch": (
        lambda: HAT.update(OPEN, (X[:0], Y[:0]), 1, 1.0), ValueError, ["update", "empty", "at least one"]),
    "wrong dimensions": (
        lambda: HAT.forward(LEARNED, X[0], 1), ValueError, ["forward", "(5,)", "(B, 5)", "x[None]"]),
    "wrong features": (
        lambda: HAT.forward(LEARNED, X[:, :4], 1), ValueError, ["(8, 4)", "(B, 5)", "traced"]),
    "wrong features to train on": (
        lambda: HAT.update(OPEN, (X[:, :4], Y), 1, 1.0), ValueError, ["(8, 4)", "(B, 5)"]),
    "recalibrating a task that is not open": (
        lambda: HAT.recalibrate(LEARNED, [X], 1), ValueError, ["recalibrate", "task 1 is not open"]),
    "no tensor": (
        lambda: HAT.forward(LEARNED, X.tolist(), 1), TypeError, ["forward", "list", "tensor"]),
    "scale of zero": (
        lambda: HAT.update(OPEN, (X, Y), 1, 0.0), ValueError, ["update", "scale=0.0", "(0, s_max=400.0]"]),
    "negative scale": (
        lambda: HAT.forward(OPEN, X, 1, -3.0), ValueError, ["forward", "scale=-3.0", "invert"]),
    "scale of nan": (
        lambda: HAT.update(OPEN, (X, Y), 1, math.nan), ValueError, ["scale=nan", "schedule"]),
    "scale above s_max": (
        lambda: HAT.update(OPEN, (X, Y), 1, 401.0), ValueError, ["scale=401.0", "s_max=400.0"]),
    "a tensor scale above s_max": (
        lambda: HAT.update(OPEN, (X, Y), 1, torch.tensor(401.0)), ValueError, ["401", "s_max=400.0"]),
    "a string scale": (
        lambda: HAT.update(OPEN, (X, Y), 1, "big"), TypeError, ["scale='big'", "number", "None"]),
    "locking the open task": (
        lambda: HAT.begin(LEARNED, 0, locked=[0, 1]), ValueError, ["begin", "task 0", "locked=[1]"]),
    "locking a number": (
        lambda: HAT.begin(LEARNED, 0, locked=1), TypeError, ["begin", "locked=1", "list", "[0, 1]"]),
    "locking what does not exist": (
        lambda: HAT.begin(LEARNED, 0, locked=[5]), ValueError, ["begin", "task=5", "0 to 2"]),
    "torch's optimiser": (
        lambda: build(optimizer=torch.optim.Adam(MODULE.parameters())), TypeError,
        ["build", "Adam", "(init, update)", "torchopt.adam(1e-3)"]),
    "torchopt's optimiser class": (
        lambda: build(optimizer=torchopt.Adam(MODULE.parameters(), 1e-3)), TypeError, ["torchopt.adam(1e-3)"]),
    "an optimiser by name": (
        lambda: build(optimizer="adam"), TypeError, ["build", "str", "torchopt.adam(1e-3)"]),
    "an optimiser with hidden state": (
        lambda: build(optimizer=torchopt.sgd(0.1, momentum=0.9, dampening=0.5)), ValueError,
        ["build", "dampening"]),
    "an optimiser with numbers in its state": (
        lambda: build(optimizer=torchopt.radam(1e-3)), TypeError, ["build", "number", "radam"]),
    "a wiring of another module": (
        lambda: build(module=MLP(5, 3, width=8)), ValueError, ["build", "another module", "head.weight", "(3, 8)", "(3, 16)"]),
    "no wiring": (
        lambda: build(wiring=X), TypeError, ["build", "Tensor", "hatfn.trace(module, x)"]),
    "no classes for a traced classifier": (
        lambda: build(classes=None), ValueError, ["build", "classes=None", "head.weight", "head=()"]),
    "a budget above one": (
        lambda: build(quota=1.5), ValueError, ["build", "quota=1.5", "from 0 to 1"]),
    "sparsity of too few tasks": (
        lambda: build(sparsity=[1.0]), ValueError, ["build", "sparsity has 1", "2 tasks"]),
    "a negative seed": (
        lambda: HAT.init(-1), ValueError, ["init", "seed=-1", "at least 0"]),
    "a seed that is no number": (
        lambda: HAT.init(None), TypeError, ["init", "NoneType", "seed=0"]),
    "a task to forget that is not there": (
        lambda: HAT.forget(LEARNED, [0, 3]), ValueError, ["forget", "task=3", "3 tasks"]),
    "forgotten and locked": (
        lambda: HAT.forget(LEARNED, 1, locked=[0, 1]), ValueError, ["forget", "task 1", "locked=[0]"]),
    "a task to keep that is not there": (
        lambda: HAT.prune(LEARNED, "1"), TypeError, ["prune", "'1'", "int"]),
    "grown without classes": (
        lambda: hatfn.grow(HAT, LEARNED, num_tasks=2), ValueError, ["grow", "classes=[3, 2, 3]", "classes=[2]"]),
    "grown with classes of none": (
        lambda: hatfn.grow(MAPS, MAPS.init(0), classes=[2]), ValueError, ["grow", "no classes", "num_tasks=1"]),
    "grown by nothing": (
        lambda: hatfn.grow(HAT, LEARNED, classes=[]), ValueError, ["grow", "classes=[]"]),
    "readiness without data": (
        lambda: hatfn.readiness(HAT, OPEN, [], 1), ValueError, ["readiness", "no batch", "(x, y)"]),
    "similarity of nothing learned": (
        lambda: hatfn.similarity(HAT, START, (X, Y)), ValueError, ["similarity", "no tasks", "consolidate"]),
    "a warm start from what is not learned": (
        lambda: HAT.begin(LEARNED, 2, init_from=0), ValueError, ["begin", "task 0", "never learned"]),
    "a warm start without data": (
        lambda: HAT.begin(LEARNED, 2, init_from="similar"), ValueError, ["begin", "batch=(x, y)"]),
    "classes as a number": (
        lambda: build(classes=10), TypeError, ["build", "classes=10", "[2, 2, 2]"]),
    "a task without classes": (
        lambda: build(classes=[2, 0]), ValueError, ["build", "[2, 0]", "positive"]),
    "no tasks": (
        lambda: build(classes=[]), ValueError, ["build", "classes=[]"]),
    "both classes and num_tasks": (
        lambda: build(num_tasks=3), ValueError, ["num_tasks=3", "no num_tasks"]),
    "a head that was not traced": (
        lambda: build(wiring=hatfn.trace(MODULE, X, head=())), ValueError, ["build", "head='head'"]),
    "features that are images": (
        lambda: hatfn.build(nn.Conv2d(1, 4, 3), hatfn.trace(nn.Conv2d(1, 4, 3), torch.zeros(1, 1, 8, 8)),
                            [2], ADAM),
        ValueError, ["(B, 4, 6, 6)", "(B, D)", "head='fc'"]),
    "s_max of zero": (
        lambda: build(s_max=0.0), ValueError, ["build", "s_max=0.0", "above 1"]),
    "negative sparsity": (
        lambda: build(sparsity=-1.0), ValueError, ["build", "sparsity=-1.0"]),
    "an unknown init": (
        lambda: build(init="zeros"), ValueError, ["build", "init='zeros'", "normal"]),
    "an unknown protection": (
        lambda: build(protection="none"), ValueError, ["build", "protection='none'", "exact"]),
    "a head that is not there": (
        lambda: hatfn.trace(MODULE, X, head="fc"), ValueError, ["trace", "head='fc'", "MLP", "head"]),
    "a head that is tied": (
        lambda: hatfn.trace(Tied(), X[:, :4], head="head"), ValueError, ["trace", "head.weight", "used elsewhere"]),
    "a head that is no layer": (
        lambda: hatfn.trace(mlp(), X, head="1"), ValueError, ["trace", "head='1'"]),
    "trace without input": (
        lambda: hatfn.trace(MODULE, (1, 5)), TypeError, ["trace", "tuple", "torch.zeros"]),
    "trace of an input that does not fit": (
        lambda: hatfn.trace(MODULE, torch.zeros(1, 4)), hatfn.TraceError, ["trace", "MLP", "(2, 4)"]),
    "trace of what cannot be exported": (
        lambda: hatfn.trace(Branching(), X[:1]), hatfn.TraceError, ["trace", "Branching", "export"]),
    "trace of a number read from a tensor": (
        lambda: hatfn.trace(Reading(), X[:1]), hatfn.TraceError, ["trace", "item", "shapes and constants"]),
    "trace of a parameter that is written": (
        lambda: hatfn.trace(nn.Embedding(5, 8, max_norm=0.5), torch.tensor([[1, 2]])), hatfn.TraceError,
        ["trace", "changes its parameter weight", "max_norm"]),
    "trace of a head with a computed weight": (
        lambda: hatfn.trace(nn.Sequential(weight_norm(nn.Linear(5, 3))), X, head="0"), ValueError,
        ["trace", "head='0'"]),
    "a buffer that is not what it was": (
        lambda: hatfn.build(Shifted(1.0), hatfn.trace(Shifted(0.0), X, head="head"), [3, 2], ADAM),
        ValueError, ["build", "buffer shift", "Trace the module as it is now"]),
    "a parameter of integers": (
        lambda: hatfn.build(Counting(), hatfn.trace(Counting(), X, head="head"), [3, 2], ADAM),
        TypeError, ["build", "count", "int64", "buffer"]),
    "strict trace": (
        lambda: hatfn.trace(Unknown(), X[:1], strict=True), hatfn.TraceError, ["cumsum", "strict"]),
    "schedule without a scale": (
        lambda: schedule.linear(0.5), ValueError, ["schedule", "s_max=0.5", "above 1"]),
    "schedule with a wrong r": (
        lambda: schedule.exponential(400.0, r=2.0), ValueError, ["r=2.0", "(0, 1]"]),
    "schedule with a wrong s_min": (
        lambda: schedule.cosine(10.0, s_min=20.0), ValueError, ["s_min=20.0", "s_max=10.0"]),
    "an unknown way to infer": (
        lambda: hatfn.infer_task(LOGITS, "margin"), ValueError, ["infer_task", "'margin'", "'energy'"]),
    "logits of one task": (
        lambda: hatfn.infer_task(LOGITS[0]), ValueError, ["infer_task", "(8, 3)", "(T, B, C)", "logits[None]"]),
    "logits of no task": (
        lambda: hatfn.infer_task(LOGITS[:0]), ValueError, ["infer_task", "(0, 8, 3)"]),
    "logits of a module with several outputs": (
        lambda: hatfn.infer_task((LOGITS, LOGITS)), TypeError, ["infer_task", "tuple", "logits[0]"]),
    "logits that are classes": (
        lambda: hatfn.infer_task(LOGITS.long()), TypeError, ["infer_task", "int64", "logits.float()"]),
    "a task without any class": (
        lambda: hatfn.infer_task(LOGITS.index_fill(0, torch.tensor(1), -math.inf)), ValueError,
        ["infer_task", "all -inf", "finite"]),
    "logits that are not finite": (
        lambda: hatfn.infer_task(LOGITS * math.nan, "entropy"), ValueError, ["infer_task", "nan"]),
    "rows that are floats": (
        lambda: hatfn.classify(LOGITS, ROWS.float()), TypeError, ["classify", "float32", "infer_task(logits)"]),
    "too few rows": (
        lambda: hatfn.classify(LOGITS, ROWS[:3]), ValueError, ["classify", "(3,)", "(8,)"]),
    "rows out of range": (
        lambda: hatfn.classify(LOGITS, ROWS + 1), ValueError, ["classify", "[1, 2]", "from 0 to 1"]),
    "too few offsets": (
        lambda: hatfn.classify(LOGITS, ROWS, [0]), ValueError, ["classify", "1 offsets", "2 rows"]),
    "a gradient per what": (
        lambda: hatfn.infer_task_by_gradient(HAT, LEARNED, X, per="task"), ValueError,
        ["infer_task_by_gradient", "per='task'", "'sample'", "'batch'"]),
    "a gradient over a task never learned": (
        lambda: hatfn.infer_task_by_gradient(HAT, LEARNED, X, [0, 1]), ValueError,
        ["infer_task_by_gradient", "task 0", "never learned"]),
    "a gradient over nothing": (
        lambda: hatfn.infer_task_by_gradient(HAT, START, X), ValueError,
        ["infer_task_by_gradient", "no tasks", "consolidate"]),
    "a gradient of a map": (
        lambda: hatfn.infer_task_by_gradient(MAPS, MAPS.consolidate(MAPS.init(0), 0), IMAGES), ValueError,
        ["infer_task_by_gradient", "(2, 1, 8, 8)", "(B, classes)"]),
    "evaluating with one loader": (
        lambda: hatfn.evaluate(HAT, LEARNED, iter([(X, Y)])), TypeError,
        ["evaluate", "list_iterator", "one for each task", "[loader_0, loader_1, ...]"]),
    "too few loaders": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[(X, Y)]] * 2), ValueError, ["evaluate", "2 loaders", "3 tasks"]),
    "too many loaders": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[(X, Y)]] * 4), ValueError, ["evaluate", "4 loaders", "3 tasks"]),
    "an empty loader": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[], [], []]), ValueError, ["evaluate", "loader 1", "no batch"]),
    "a loader of inputs": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[], [X], []]), TypeError,
        ["evaluate, loader 1", "Tensor", "pair", "(x, y)"]),
    "labels of another length": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[], [(X, Y[:3])], []]), ValueError,
        ["evaluate, loader 1", "8 samples", "(3,)"]),
    "labels counted over all tasks": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[], [(X, Y + 3)], []]), ValueError,
        ["evaluate, loader 1", "labels from", "0 to 1", "counted within the task"]),
    "one-hot labels": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[], [(X, torch.ones(8, 2))], []]), TypeError,
        ["evaluate, loader 1", "(8, 2)", "float32", "int64"]),
    "evaluating by an unknown method": (
        lambda: hatfn.evaluate(HAT, LEARNED, [[], [(X, Y)], []], method="margin"), ValueError, ["'margin'", "'max'"]),
    "evaluating a map": (
        lambda: hatfn.evaluate(MAPS, MAPS.consolidate(MAPS.init(0), 0), [[(IMAGES, Y[:2])]]), ValueError,
        ["evaluate", "(1, 2, 1, 8, 8)", "(T, B, C)"]),
    "sparsity over what": (
        lambda: hatfn.sparsity({"a": Y.float()}, {"a": Y.float()}, over="units"), ValueError,
        ["over='units'", "groups"]),
}  # fmt: skip


class Tied(nn.Module):
    """A head whose weight is also another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x))


class Reading(nn.Module):
    """A number that is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.layer.bias.sum().item()


class Shifted(nn.Module):
    """A constant that the trace reads."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.full((8,), shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) + self.shift)


class Counting(nn.Module):
    """A parameter that cannot be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.count = nn.Parameter(torch.tensor([1]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * self.count


class Branching(nn.Module):
    """A branch on a value: export cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Unknown(nn.Module):
    """An operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).cumsum(1)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_clear_error(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_nothing_is_lost() -> None:
    kept = HAT.begin(START, 1)
    for call, error, _ in BAD.values():
        with pytest.raises(error):
            call()
    assert equal(kept, OPEN)


@pytest.mark.parametrize("task", [np.int64(1), torch.tensor(1), np.array(1)], ids=repr)
def test_other_integers_are_tasks(task: Any) -> None:
    state = HAT.begin(START, task)
    state, info = HAT.update(state, (X, Y), task, 1.0)
    assert info.ok
    assert HAT.forward(HAT.consolidate(state, task), X, task).shape == (8, 2)


def test_exhausted_capacity_names_the_group() -> None:
    hat = learner(MLP(5, 3, width=16), X, init="dense")
    with pytest.warns(hatfn.HATWarning, match="consolidate: task 0 leaves"):
        state = hat.consolidate(hat.begin(hat.init(0), 0), 0)
    with pytest.warns(
        hatfn.HATWarning, match=r"begin: no free capacity for task 1 in hidden\.0, hidden\.1"
    ):
        hat.begin(state, 1)


def test_a_dead_group_is_named() -> None:
    state = OPEN._replace(embeddings=OPEN.embeddings | {"hidden.1": -torch.ones(3, 16)})
    with pytest.warns(hatfn.HATWarning, match=r"consolidate: task 1 uses no unit of hidden\.1"):
        HAT.consolidate(state, 1)


def test_more_tasks_than_units_is_named() -> None:
    module = ConvNet()
    with pytest.warns(hatfn.HATWarning, match=r"build: 9 tasks, but fewer units in conv1 \(8\)"):
        learner(module, torch.randn(1, 1, 6, 6), classes=[2] * 9)


def test_a_good_life_warns_of_nothing() -> None:
    hat = learner(MLP(5, 3, width=64), X, init="sparse", classes=[2, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(hat, learn(hat, hat.init(0), X, 0), X, 1)
