"""Wrong calls: a right call of each public function, in which one argument is replaced by a wrong one."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchopt
from nets import learner
from torch import nn

import hatfn
from hatfn import testing
from hatfn.evaluation import metrics
from hatfn.method import schedule
from hatfn.models import MLP


class Wrong(NamedTuple):
    """A call with one wrong argument.

    Attributes:
        function: its name in :data:`RIGHT`.
        parameter: the argument that is wrong.
        value: the wrong value.
        error: the class of the error.
        words: words that its message must have: where, what came, what was expected, how to mend.
        given: other arguments that differ from the right call.
    """

    function: str
    parameter: str
    value: Any
    error: type[Exception]
    words: tuple[str, ...]
    given: dict[str, Any]

    def call(self) -> object:
        function, right = RIGHT[self.function]
        argument = (
            self.value
            if isinstance(self.value, dict) and self.parameter in ("hyper", "settings")
            else {self.parameter: self.value}
        )
        return function(**right | self.given | argument)


def wrong(
    function: str, parameter: str, value: Any, error: type[Exception], *words: str, **given: Any
) -> Wrong:
    return Wrong(function, parameter, value, error, words, given)


X, Y = torch.randn(8, 5), torch.tensor([0, 1] * 4)  # every class occurs
MODULE = MLP(5, 3, width=16)
WIRING = hatfn.trace(MODULE, X[:1])
HAT = learner(MODULE, X)  # classes 3, 2, 3
START = HAT.init(0)
OPEN = HAT.begin(START, 1)
OTHER = learner(MLP(5, 3, width=8), X).init(0)
MANY, STATES = hatfn.Replicas(HAT), hatfn.replicate(HAT, [0, 1, 2])
OPENED = MANY.begin(STATES, 1)
XS, YS = X.expand(3, 8, 5), Y.expand(3, 8)
ADAM = torchopt.adam(1e-3)
IMAGES = torch.randn(2, 1, 8, 8)
MAP = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
MAPS = hatfn.build(MAP, hatfn.trace(MAP, IMAGES), None, ADAM)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", hatfn.HATWarning)  # a task may use all units
    LEARNED, CLOSED = HAT.consolidate(OPEN, 1), MANY.consolidate(OPENED, 1)
    MAPPED = MAPS.consolidate(MAPS.init(0), 0)
LOGITS, ROWS = torch.randn(2, 8, 3), torch.tensor([0, 1] * 4)
UNITS = {"a": torch.rand(4)}
MATRIX, ROW = np.ones((3, 3)) / 2, np.ones(3) / 2
FILE = Path(__file__).parent / "no such folder" / "state"
BATCH, BATCHES, LOADERS = (X, Y), (XS, YS), [[], [(X, Y)], []]

RIGHT: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "HAT.init": (HAT.init, {"seed": 0}),
    "HAT.begin": (HAT.begin, {"state": LEARNED, "task": 2}),
    "HAT.update": (HAT.update, {"state": OPEN, "batch": BATCH, "task": 1, "scale": 1.0}),
    "HAT.recalibrate": (HAT.recalibrate, {"state": OPEN, "batches": [X], "task": 1}),
    "HAT.consolidate": (HAT.consolidate, {"state": OPEN, "task": 1}),
    "HAT.forward": (HAT.forward, {"state": LEARNED, "x": X, "task": 1}),
    "HAT.predict": (HAT.predict, {"state": LEARNED, "x": X}),
    "HAT.forget": (HAT.forget, {"state": LEARNED, "task": 1}),
    "HAT.prune": (HAT.prune, {"state": LEARNED, "keep": 0}),
    "HAT.compact": (HAT.compact, {"state": LEARNED, "task": 1}),
    "HAT.gates": (HAT.gates, {"embeddings": OPEN.embeddings, "scale": 5.0}),
    "replica": (hatfn.replica, {"states": CLOSED, "index": 0}),
    "stack": (hatfn.stack, {"states": [LEARNED, LEARNED]}),
    "Replicas.begin": (MANY.begin, {"states": CLOSED, "task": 2}),
    "Replicas.update": (MANY.update, {"states": OPENED, "batch": BATCHES, "task": 1, "scale": 1.0}),
    "Replicas.recalibrate": (MANY.recalibrate, {"states": OPENED, "batches": [XS], "task": 1}),
    "Replicas.consolidate": (MANY.consolidate, {"states": OPENED, "task": 1}),
    "Replicas.forward": (MANY.forward, {"states": CLOSED, "x": X, "task": 1}),
    "Replicas.predict": (MANY.predict, {"states": CLOSED, "x": X}),
    "Subnet": (HAT.compact(LEARNED, 1), {"x": X}),
    "trace": (hatfn.trace, {"module": MODULE, "x": X[:1]}),
    "manual_wiring": (
        hatfn.manual_wiring, {"module": MODULE, "x": X, "layers": {"hidden.0": ("a", None)}, "head": "head"}),
    "build": (hatfn.build, {"module": MODULE, "wiring": WIRING, "classes": [3, 2], "optimizer": ADAM}),
    "from_torch": (hatfn.from_torch, {"kind": torch.optim.Adam, "lr": 1e-3}),
    "replicate": (hatfn.replicate, {"hat": HAT, "seeds": [0, 1]}),
    "adopt": (hatfn.adopt, {"hat": HAT, "module": MODULE}),
    "gate": (hatfn.gate, {"embedding": X, "scale": 5.0}),
    "compensate": (
        hatfn.compensate, {"gradients": UNITS, "embeddings": UNITS, "scale": 1.0, "s_max": 400.0}),
    "protect": (hatfn.protect, {"tree": UNITS, "protection": UNITS}),
    "clamp_embeddings": (hatfn.clamp_embeddings, {"embeddings": UNITS, "limit": 6.0}),
    "sparsity": (hatfn.sparsity, {"gates": UNITS, "cumulative": UNITS}),
    "schedule.linear": (schedule.linear, {"s_max": 400.0}),
    "schedule.exponential": (schedule.exponential, {"s_max": 400.0}),
    "schedule.cosine": (schedule.cosine, {"s_max": 400.0}),
    "schedule.constant": (schedule.constant, {"s_max": 400.0}),
    "linear's": (schedule.linear(400.0), {"progress": 0.5}),
    "exponential's": (schedule.exponential(400.0), {"progress": 0.5}),
    "cosine's": (schedule.cosine(400.0), {"progress": 0.5}),
    "export": (hatfn.export, {"hat": HAT, "state": LEARNED, "task": 1}),
    "grow": (hatfn.grow, {"hat": HAT, "state": LEARNED, "classes": [2]}),
    "readiness": (hatfn.readiness, {"hat": HAT, "state": OPEN, "batches": [BATCH], "task": 1}),
    "similarity": (hatfn.similarity, {"hat": HAT, "state": LEARNED, "batch": BATCH}),
    "infer_task": (hatfn.infer_task, {"logits": LOGITS}),
    "infer_task_by_gradient": (hatfn.infer_task_by_gradient, {"hat": HAT, "state": LEARNED, "x": X}),
    "classify": (hatfn.classify, {"logits": LOGITS, "rows": ROWS}),
    "select": (hatfn.select, {"wiring": HAT.wiring, "groups": ["hidden.0"]}),
    "cross_entropy": (hatfn.cross_entropy, {"output": LOGITS[0], "y": Y}),
    "evaluate": (hatfn.evaluate, {"hat": HAT, "state": LEARNED, "loaders": LOADERS}),
    "memory": (hatfn.memory, {"state": LEARNED}),
    "usage": (hatfn.usage, {"state": LEARNED, "wiring": WIRING}),
    "overlap": (hatfn.overlap, {"state": LEARNED, "wiring": WIRING}),
    "free_weights": (metrics.free_weights, {"state": LEARNED, "wiring": WIRING}),
    "accuracy": (metrics.accuracy, {"logits": LOGITS[0], "labels": Y}),
    "average_accuracy": (metrics.average_accuracy, {"matrix": MATRIX}),
    "backward_transfer": (metrics.backward_transfer, {"matrix": MATRIX}),
    "forgetting": (metrics.forgetting, {"matrix": MATRIX}),
    "forward_transfer": (metrics.forward_transfer, {"matrix": MATRIX, "reference": ROW}),
    "forgetting_ratio": (metrics.forgetting_ratio, {"accuracies": ROW, "chance": ROW / 2, "joint": ROW}),
    "drift": (metrics.drift, {"before": X, "after": X}),
    "save": (hatfn.save, {"path": Path(__file__).parent / "never written", "state": LEARNED, "hat": HAT}),
    "load": (hatfn.load, {"path": FILE, "hat": HAT}),
    "read_meta": (hatfn.read_meta, {"path": FILE}),
    "verify_wiring": (testing.verify_wiring, {"module": MODULE, "wiring": WIRING, "x": X}),
    "verify_no_forgetting": (testing.verify_no_forgetting, {"hat": HAT, "state": LEARNED, "x": X}),
}  # fmt: skip
"""A right call of every public function; calls that read files would be right if the file existed."""

# Tests also check the types of leaf functions; unwrap them, so that calls give the errors that users get.
RIGHT = {name: (inspect.unwrap(function), given) for name, (function, given) in RIGHT.items()}


def public() -> dict[str, Any]:
    """Every public function and method."""
    found: dict[str, Any] = {}
    for package in (hatfn, testing):
        found |= {name: getattr(package, name) for name in package.__all__}
    for prefix, owner in (
        ("HAT.", hatfn.HAT), ("Replicas.", hatfn.Replicas), ("schedule.", schedule), ("", metrics),
    ):  # fmt: skip
        own = {name: value for name, value in vars(owner).items() if name[0] != "_"}
        module = owner if inspect.ismodule(owner) else inspect.getmodule(owner)
        found |= {
            f"{prefix}{n}": value for n, value in own.items() if inspect.getmodule(value) is module
        }
    found["Subnet"] = hatfn.Subnet.__call__
    return {name: value for name, value in found.items() if inspect.isfunction(value)}
