"""A compiled step is the step: to rounding in what it trains, to the bit in what it must not touch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torchopt
from nets import ConvNet, Fn, Recurrent, Transformer, equal, learn, learner, mlp
from optimizers import OPTIMIZERS
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hatfn
from hatfn.engine.ranks import Ranks
from hatfn.method.protection import LOCKS
from hatfn.models import MLP
from hatfn.replicas import replica, stack
from hatfn.testing import verify_no_forgetting, verify_pure

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

NETWORKS = {
    "mlp": (lambda: MLP(5, 3, width=16), (5,)),
    "conv net": (ConvNet, (1, 6, 6)),
    "transformer": (Transformer, (4, 5)),
    "recurrent": (Recurrent, (3, 5)),
}
PARTS = ["update", "step"]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor compiles C++ on a CPU"
)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and run as they are: what Inductor makes of them is for a few other tests."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, leaves: graph)


def twins(network: str, part: Any, **settings: Any) -> tuple[hatfn.HAT, hatfn.HAT, Tensor]:
    """A learner, the same with compiled steps, and inputs."""
    make, shape = NETWORKS[network]
    module, x = make().double(), torch.randn(12, *shape).double()
    plain, compiled = (learner(module, x, **settings, compile=p) for p in (None, part))
    return plain, compiled, x


def close(ours: Any, theirs: Any) -> None:
    """The same numbers, but for rounding."""
    for a, b in zip(optree.tree_leaves(ours), optree.tree_leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_the_step(network: str, part: str) -> None:
    plain, compiled, x = twins(network, part)
    states = [plain.init(0)] * 2
    for task in (1, 0):
        ours, theirs = (
            learn(hat, s, x, task) for hat, s in zip((compiled, plain), states, strict=True)
        )
        assert not equal(ours.params, states[0].params)
        close(ours, theirs)
        states = [ours, theirs]
    verify_no_forgetting(compiled, states[0], x)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("optimizer", "lock"), [*zip(["decay", "adam", "adamw", "rmsprop"], LOCKS, strict=True)]
)
def test_with_every_optimizer_and_lock(optimizer: str, lock: str, part: str) -> None:
    """Also with several tasks at once, in parts, clipped, without compensation and under binary gates."""
    plain, compiled, x = twins(
        "mlp",
        part,
        optimizer=OPTIMIZERS[optimizer](),
        protection=lock,
        max_norm=0.01,
        accumulate=3,
        compensation=None if lock == "paper" else "s_max",
    )
    start = plain.begin(learn(plain, plain.init(0), x, 1), [0, 2])
    pair, y = torch.stack([x, -x]), torch.randint(3, (2, 12))
    for scale in (5.0, torch.tensor(5.0), None):
        ours, told = verify_pure(compiled.update, start, (pair, y), [0, 2], scale)
        theirs, expected = plain.update(start, (pair, y), [0, 2], scale)
        assert told.ok
        assert not equal(ours.params, start.params)
        close((ours, told), (theirs, expected))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("part", PARTS)
def test_replicas(part: str) -> None:
    """Of other sparsities, scales and rates; one of them meets a nan and stays."""
    plain, compiled, _ = twins("conv net", part, optimizer=torchopt.adam(1e-2))
    states = hatfn.replicate(plain, range(3), sparsity=[0.1, 0.5, 2.0], lr=[1.0, 0.5, 2.0])
    x, y = torch.randn(3, 8, 1, 6, 6).double(), torch.randint(2, (3, 8))
    scale = torch.tensor([5.0, 10.0, 20.0])
    for shared in (False, True):
        batch = (x[0], y[0]) if shared else (x, y)
        ours, theirs = (
            hatfn.Replicas(hat).update(hatfn.Replicas(hat).begin(states, 1), batch, 1, scale, shared)
            for hat in (compiled, plain)
        )
        close(ours, theirs)
    x[1, 0] = torch.nan
    begun = hatfn.Replicas(compiled).begin(states, 1)
    after, info = hatfn.Replicas(compiled).update(begun, (x, y), 1, scale)
    assert info.ok.tolist() == [True, False, True]
    assert equal(replica(after, 1), replica(begun, 1))
    assert not equal(after.params, begun.params)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("part", "graphs"), [("update", 1), ("step", 4)])
def test_graphs_are_made_once(part: str, graphs: int) -> None:
    """What follows the gradient knows neither the batch nor the task; the gradient knows its shape."""
    _, hat, x = twins("mlp", part)
    state = hat.init(0)
    for task in range(3):  # of 3, 2 and 3 classes
        for size in (12, 8):
            state = learn(hat, state, x[:size], task)
    assert len(hat.graphs) == graphs
    other = replace(hat, loss=lambda logits, y: 2 * nn.functional.cross_entropy(logits, y))
    state = hat.begin(state, 0, locked=[])
    batch = x, torch.randint(3, (12,))
    doubled, once = (h.update(state, batch, 0, 5.0)[1].loss for h in (other, hat))
    assert torch.equal(doubled, 2 * once)
    assert (len(hat.graphs), len(other.graphs)) == (graphs, 1)  # each has its own


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("part", PARTS)
def test_a_step_that_is_batched_or_differentiated_is_not_compiled(part: str) -> None:
    plain, compiled, x = twins("mlp", part)
    start, y = plain.begin(plain.init(0), 0), torch.randint(3, (12,))
    states = stack([start, start])
    ours, theirs = (
        torch.vmap(hat.update, in_dims=(0, None, None, None))(states, (x, y), 0, 5.0)
        for hat in (compiled, plain)
    )
    assert equal(ours, theirs)
    assert not equal(ours[0].params, states.params)
    slopes = [
        torch.func.grad(lambda scale, hat=hat: hat.update(start, (x, y), 0, scale)[1].penalty)(
            torch.tensor(5.0)
        )
        for hat in (compiled, plain)
    ]
    assert slopes[0] == slopes[1] != 0
    assert not len(compiled.graphs)


@needs_compiler
@pytest.mark.parametrize(
    ("network", "part", "settings"),
    [
        ("mlp", "step", {"optimizer": torchopt.adamw(1e-2, weight_decay=1e-2)}),
        ("conv net", "step", {}),
        ("transformer", "update", {"optimizer": torchopt.adam(1e-2)}),
    ],
)
def test_compiled_indeed(network: str, part: str, settings: dict[str, Any]) -> None:
    plain, compiled, x = twins(network, part, **settings)
    start = learn(plain, plain.init(0), x, 1)
    ours, theirs = (learn(hat, start, x, 0) for hat in (compiled, plain))
    assert not equal(ours.params, start.params)
    for old in (1, 0):
        assert torch.equal(plain.forward(ours, x, old), compiled.forward(ours, x, old))
    assert torch.equal(plain.forward(ours, x, 1), plain.forward(start, x, 1))
    verify_no_forgetting(compiled, ours, x)
    close(ours, theirs)
    opened = compiled.begin(ours, 0)
    bad = x.clone()
    bad[0] = torch.nan
    after, info = verify_pure(compiled.update, opened, (bad, torch.zeros(12).long()), 0, 80.0)
    assert not info.ok
    assert equal(after, opened)


@needs_compiler
def test_dropout_draws_from_the_global_seed_and_anew_in_every_step() -> None:
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    hat = learner(net, x, head="3", compile="step")
    start, losses = hat.begin(hat.init(0), 0), []
    for seed in (0, 0, None):
        if seed is not None:
            torch.manual_seed(seed)
        losses.append(hat.update(start, (x, y), 0, 5.0)[1].loss.item())
    assert losses[0] == losses[1] != losses[2]


def wrong(**settings: Any) -> hatfn.HAT:
    return learner(mlp(), torch.randn(2, 5), head="4", **settings)


@pytest.mark.parametrize("part", [True, "all", 1])
def test_an_unknown_part_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="compile="):
        wrong(compile=part)


@pytest.mark.parametrize("part", PARTS)
def test_what_no_graph_can_hold_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="Expected functions made of operators alone"):
        wrong(compile=part, optimizer=hatfn.from_torch(torch.optim.Adam, lr=1e-3))
    with pytest.raises(ValueError, match="2 processes"):
        wrong(compile=part, ranks=Ranks(0, 2))


def test_checkpointed_activations_go_with_the_update_alone() -> None:
    module = Fn(
        lambda m, x: m.head(torch.relu(m.first(x))), first=nn.Linear(5, 8), head=nn.Linear(8, 3)
    )
    module.grad_checkpointing = True
    with pytest.raises(ValueError, match="compile='update'"):
        learner(module, torch.randn(2, 5), compile="step")
    assert learner(module, torch.randn(2, 5), compile="update").compile


def test_a_loss_that_reads_numbers_is_told() -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        mean = nn.functional.cross_entropy(logits, y)
        return mean if mean.item() < 100 else mean * 0

    hat, x = wrong(compile="step", loss=loss), torch.randn(4, 5)
    state = hat.begin(hat.init(0), 0)
    with pytest.raises(RuntimeError, match="cannot be captured as a graph"):
        hat.update(state, (x, torch.zeros(4).long()), 0, 5.0)
    hat = wrong(compile="update", loss=loss)  # of the loss it compiles nothing


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no such file: g++")

    monkeypatch.setattr("torch._inductor.compile", fail)
    hat, x = wrong(compile="update"), torch.randn(4, 5)
    state = hat.begin(hat.init(0), 0)
    with pytest.raises(RuntimeError, match=r"no such file: g\+\+.*compile=None"):
        hat.update(state, (x, torch.zeros(4).long()), 0, 5.0)


@pytest.mark.usefixtures("uncompiled")
def test_the_log_tells_that_a_step_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    _, compiled, x = twins("mlp", "update")
    state = compiled.begin(compiled.init(0), 0)
    y = torch.zeros(len(x), dtype=torch.int64)
    with caplog.at_level("INFO", logger="hatfn"):
        for _ in range(2):
            state, _ = compiled.update(state, (x, y), 0, 5.0)
    told = [record.getMessage()[:9] for record in caplog.records if record.name.startswith("hatfn")]
    assert told == ["compiling", "compiled "]


@needs_compiler
def test_a_graph_is_found_on_disk_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name in ("fxgraph_cache_miss", "fxgraph_cache_hit"):
        before = counters["inductor"][name]
        _, compiled, x = twins("mlp", "update", optimizer=torchopt.sgd(0.1))
        state = compiled.begin(compiled.init(0), 0)
        compiled.update(state, (x, torch.zeros(len(x), dtype=torch.int64)), 0, 5.0)
        assert counters["inductor"][name] == before + 1
