"""No public function changes a tensor it was given, nor the module, nor any global state."""

from __future__ import annotations

import inspect

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, equal, learner, mlp

import hatfn
from hatfn import testing
from hatfn.evaluation import metrics
from hatfn.method.sparsity import sparsity
from hatfn.numerics.ownership import empty
from hatfn.state import HATState

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

MODULE = ConvNet()
X, Y = torch.randn(8, 1, 6, 6), torch.randint(2, (8,))
HAT = learner(MODULE, X)
OPEN = HAT.begin(HAT.consolidate(HAT.init(0), 0), 1)
LEARNED = HAT.consolidate(OPEN, 1)
MANY, STATES = hatfn.Replicas(HAT), hatfn.replicate(HAT, [2, 3])
UNITS = {"fc": torch.randn(6)}
GATES = {"fc": torch.rand(6)}
LOGITS = HAT.predict(LEARNED, X)
BEHIND = learner(mlp(classes=12), torch.randn(8, 5), head=())

CALLS = {
    "trace": (hatfn.trace, (MODULE, X[:1]), {"head": "head"}),
    "manual_wiring": (
        hatfn.manual_wiring, (MODULE, X, {"conv1": ("stream", None), "norm1": "stream"}),
        {"head": "head", "verify": False},
    ),
    "build": (hatfn.build, (MODULE, HAT.wiring, [3, 2]), {"optimizer": torchopt.adam(1e-3)}),
    "from_torch": (hatfn.from_torch, (torch.optim.Adam,), {"lr": 1e-3}),
    "gate": (hatfn.gate, (UNITS["fc"], 3.0), {}),
    "hard_gate": (hatfn.hard_gate, (UNITS["fc"],), {}),
    "select": (hatfn.select, (HAT.wiring, [*HAT.wiring.groups][:1]), {}),
    "cross_entropy": (hatfn.cross_entropy, (LOGITS[0], Y), {}),
    "HAT.loss_of": (HAT.loss_of, (0,), {}),
    "HAT.labels": (HAT.labels, (0,), {}),
    "sparsity": (sparsity, (GATES, {"fc": torch.rand(6) > 0.5}), {}),
    "protect": (hatfn.protect, (UNITS, {"fc": torch.rand(6) > 0.5}), {}),
    "compensate": (hatfn.compensate, (GATES, UNITS, 3.0, 400.0), {}),
    "clamp_embeddings": (hatfn.clamp_embeddings, (UNITS, 0.5), {}),
    "usage": (hatfn.usage, (LEARNED, HAT.wiring), {}),
    "infer_task": (hatfn.infer_task, (LOGITS, "entropy"), {}),
    "infer_task_by_gradient": (hatfn.infer_task_by_gradient, (HAT, LEARNED, X), {}),
    "infer_task_by_gradient batch": (
        hatfn.infer_task_by_gradient, (HAT, LEARNED, X), {"per": "batch"}),
    "classify": (hatfn.classify, (LOGITS, torch.tensor([1, 0] * 4), [0, 3]), {}),
    "evaluate": (hatfn.evaluate, (HAT, LEARNED, [[(X, Y)], [(X, Y)], []]), {}),
    "memory": (hatfn.memory, (LEARNED,), {}),
    "drift": (metrics.drift, (X, X + 1), {}),
    "accuracy": (metrics.accuracy, (torch.randn(8, 2), Y), {}),
    "free_weights": (metrics.free_weights, (LEARNED, HAT.wiring), {}),
    "verify_wiring": (testing.verify_wiring, (MODULE, HAT.wiring, X), {}),
    "verify_no_forgetting": (testing.verify_no_forgetting, (HAT, LEARNED, X), {}),
    "replicate": (hatfn.replicate, (HAT, [0, 1]), {"lr": [0.5, 1.0]}),
    "replica": (hatfn.replica, (STATES, 0), {}),
    "stack": (hatfn.stack, ([LEARNED, OPEN],), {}),
    "Replicas": (MANY.begin, (STATES, 0), {}),
    "Replicas.update": (MANY.update, (MANY.begin(STATES, 1), (X, Y), 1, 5.0), {"shared": True}),
    "Replicas.recalibrate": (MANY.recalibrate, (MANY.begin(STATES, 1), [X], 1), {"shared": True}),
    "Replicas.consolidate": (MANY.consolidate, (STATES, 0), {}),
    "Replicas.forward": (MANY.forward, (STATES, X, 0, 5.0), {}),
    "Replicas.predict": (MANY.predict, (MANY.consolidate(STATES, 0), X), {}),
    "HAT.init": (HAT.init, (0,), {"fresh": True}),
    "HAT.begin": (HAT.begin, (LEARNED, 2), {}),
    "HAT.begin again": (HAT.begin, (LEARNED, 0), {"locked": [1], "carry": True}),
    "HAT.update": (HAT.update, (OPEN, (X, Y), 1, 5.0), {}),
    "HAT.update hard": (HAT.update, (OPEN, (X, Y), 1, None), {}),
    "HAT.begin together": (HAT.begin, (LEARNED, [0, 2]), {}),
    "HAT.update together": (
        HAT.update, (HAT.begin(LEARNED, [0, 2]), (torch.stack([X, X]), torch.stack([Y, Y])), [0, 2], 5.0), {},
    ),
    "HAT.gates": (HAT.gates, (OPEN.embeddings, 5.0), {}),
    "HAT.gates_of": (HAT.gates_of, (LEARNED, 1, 5.0), {}),
    "HAT.used": (HAT.used, (OPEN,), {}),
    "HAT.recalibrate": (HAT.recalibrate, (OPEN, [X, X], 1), {}),
    "HAT.consolidate": (HAT.consolidate, (OPEN, 1, [(X, Y)]), {}),
    "HAT.forward": (HAT.forward, (LEARNED, X, 1), {}),
    "HAT.forward soft": (HAT.forward, (LEARNED, X, 1, 5.0), {}),
    "HAT.forward each": (HAT.forward, (LEARNED, X, torch.tensor([1, 0] * 4)), {}),
    "HAT.forward plain": (HAT.forward, (LEARNED, X, None), {}),
    "HAT.compact": (HAT.compact, (LEARNED, 1), {}),
    "HAT.compact on an input": (HAT.compact, (LEARNED, 1), {"x": X}),
    "Subnet": (HAT.compact(LEARNED, 1), (X,), {}),
    "export": (hatfn.export, (HAT, LEARNED, 1), {}),
    "export compact": (hatfn.export, (HAT, LEARNED, 1), {"compact": True, "x": X}),
    "export with a head behind": (hatfn.export, (BEHIND, BEHIND.consolidate(BEHIND.init(0), 0), 0), {}),
    "adopt": (hatfn.adopt, (HAT, ConvNet(classes=7)), {}),
    "HAT.forget": (HAT.forget, (LEARNED, 1), {}),
    "HAT.forget several": (HAT.forget, (LEARNED, [0, 1]), {"dry_run": True}),
    "HAT.prune": (HAT.prune, (LEARNED, 1), {}),
    "HAT.protect": (HAT.protect, (OPEN, LEARNED), {}),
    "HAT.flags": (HAT.flags, (OPEN, [1]), {}),
    "HAT.begin similar": (HAT.begin, (LEARNED, 2), {"init_from": "similar", "batch": (X, Y)}),
    "grow": (hatfn.grow, (HAT, OPEN, [2, 7]), {}),
    "readiness": (hatfn.readiness, (HAT, OPEN, [(X, Y)], 1), {}),
    "similarity": (hatfn.similarity, (HAT, LEARNED, (X, Y)), {}),
    "overlap": (hatfn.overlap, (LEARNED, HAT.wiring), {}),
    "HAT.predict": (HAT.predict, (LEARNED, X), {"chunk_size": 1}),
}  # fmt: skip
NOT_CALLED = {
    "HAT", "HATState", "HATWarning", "Info", "Evaluation", "Forgotten", "Readiness", "TraceError", "CheckpointError", "Wiring",  # types
    "schedule", "testing", "metrics", "protection", "ranks", "save", "load", "read_meta",  # numbers only; modules; files, see test_checkpoint.py
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_public_function_is_pure(name: str) -> None:
    function, args, kwargs = CALLS[name]
    result = testing.verify_pure(
        lambda hat, module, args, kwargs: function(*args, **kwargs), HAT, MODULE, args, kwargs
    )
    # Nothing is purer than what does nothing.
    news = [
        new for new in (result, *(result if type(result) is tuple else ())) if isinstance(new, HATState)
    ]
    for old in (arg for arg in args if isinstance(arg, HATState)):
        assert kwargs.get("dry_run") or not any(equal(old, new) for new in news)


def test_every_public_function_is_called_above() -> None:
    called = {name.split()[0].removeprefix("HAT.") for name in CALLS}
    methods = {n for n, f in inspect.getmembers(hatfn.HAT, inspect.isfunction) if n[0] != "_"}
    assert set(hatfn.__all__) | methods <= called | NOT_CALLED


def test_a_learner_outlives_changes_to_the_module() -> None:
    module = ConvNet()
    hat = learner(module, X)
    before = hat.init(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    module.train()
    assert all(torch.equal(before.params[name], value) for name, value in hat.init(0).params.items())


def test_import_registers_networks_only_when_asked() -> None:
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    code = "import hatfn, timm; assert not timm.is_model('resnet18s')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


INNER = ("HAT.gates", "HAT.gates_of", "HAT.used", "HAT.protect", "HAT.flags")
"""What the learner's own functions call, after a check of the state."""


@pytest.mark.parametrize("name", [name for name in CALLS if name not in INNER])
def test_every_public_function_refuses_a_spent_state(name: str) -> None:
    function, args, kwargs = CALLS[name]
    found = []

    def spent(leaf: object) -> object:
        if not isinstance(leaf, HATState):
            return leaf
        copy = optree.tree_map(torch.clone, leaf)
        empty(copy)
        found.append(copy)
        return copy

    args = optree.tree_map(spent, args, is_leaf=lambda leaf: isinstance(leaf, HATState))
    if found:
        with pytest.raises(ValueError, match="the state is spent"):
            function(*args, **kwargs)
