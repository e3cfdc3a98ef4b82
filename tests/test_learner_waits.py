"""A step, an output and all outputs wait for no device; what then cannot be checked shows itself.

A CPU's tensors are declared to be far away here, so that what reads them is seen without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torchopt
from nets import ConvNet, Transformer, equal, learner, mlp
from reads import noted_reads
from torch import Tensor, nn

import hatfn
from hatfn.numerics import concrete

pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")

NETWORKS = {
    "mlp": (mlp, (5,), "4"),
    "conv net": (ConvNet, (1, 6, 6), "head"),
    "transformer": (Transformer, (4, 5), "head"),
}
OPTIMIZERS = {"sgd": lambda: torchopt.sgd(0.1, momentum=0.9), "adam": lambda: torchopt.adam(1e-2)}


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is read for free."""
    monkeypatch.setattr(concrete, "FREE", frozenset())


def made(network: str, optimizer: str = "sgd") -> tuple[hatfn.HAT, hatfn.HATState, Tensor, Tensor]:
    """A learner, a state with tasks 0 and 2 learned and task 1 open, and a batch."""
    make, shape, head = NETWORKS[network]
    torch.manual_seed(0)
    x, y = torch.randn(8, *shape), torch.arange(8) % 2
    hat = learner(make(), x, head=head, optimizer=OPTIMIZERS[optimizer]())
    state = hat.consolidate(hat.consolidate(hat.init(0), 0, []), 2, [])
    return hat, hat.begin(state, 1), x, y


READS: dict[str, Callable[[Tensor], object]] = {
    "tolist": lambda t: t.tolist(),
    "item": lambda t: t[0].item(),
    "bool": lambda t: bool(t[0]),
    "int": lambda t: [1, 2][t[0].long()],
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "numpy": lambda t: t.numpy(),
    "equal": lambda t: torch.equal(t, t),
    "nonzero": lambda t: t.nonzero(),
    "unique": lambda t: t.unique(),
    "a mask": lambda t: t[t > 0],
    "in vmap": lambda t: torch.vmap(lambda v: v + t.sum().item())(t),
    "in a gradient": lambda t: torch.func.grad(lambda v: v.sum() * v[0].item())(t),
}


@pytest.mark.parametrize("kind", READS)
def test_a_read_is_noted(kind: str) -> None:
    with noted_reads() as seen:
        READS[kind](torch.tensor([1.0, 0.0]))
    assert seen


def test_work_is_not_taken_for_a_read() -> None:
    with noted_reads() as seen:
        t = torch.randn(3, 3, requires_grad=True)
        torch.where(t > 0, t, 0).to(torch.float64)[torch.tensor([1, 0])].sum().backward()
        torch.vmap(torch.linalg.vector_norm)(t.detach())
    assert not seen


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_learner_reads_nothing(network: str, optimizer: str) -> None:
    hat, state, x, y = made(network, optimizer)
    scale = torch.tensor(5.0)
    with noted_reads() as seen:
        new, _ = hat.update(state, (x, y), 1, 5.0)
        new, _ = hat.update(new, (x, y), 1, scale)
        new, _ = hat.update(new, (x, y), 1, None)
        hat.forward(new, x, 0), hat.forward(new, x, 1, 5.0), hat.forward(new, x, 1, scale)
        hat.forward(new, x, None), hat.predict(new, x, [0, 2])
        hat.predict(new, x, [2, 0], chunk_size=1), hat.predict(new, x, [0, 2], chunk_size=2)
    assert seen == []


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("network", NETWORKS)
def test_replicas_read_nothing(network: str) -> None:
    hat, state, x, y = made(network)
    many, states = hatfn.Replicas(hat), hatfn.stack([state, state])
    with noted_reads() as seen:
        new, _ = many.update(states, (x, y), 1, 5.0, shared=True)
        new, _ = many.update(new, (x, y), 1, torch.tensor([5.0, 6.0]), shared=True)
        many.forward(new, x, 0), many.forward(new, x, 1, 5.0)
        many.predict(new, x, [0, 2])
    assert seen == []


@pytest.mark.usefixtures("far")
def test_a_task_for_each_sample_is_read_once() -> None:
    """The tasks decide what is computed; on the CPU reading them waits for nothing."""
    hat, state, x, _ = made("mlp")
    tasks = torch.tensor([0, 2, 0, 2, 2, 0, 0, 2])
    with noted_reads() as seen:
        hat.forward(state, x, tasks)
    assert seen.count("cpu") == 1


@pytest.fixture(params=["at hand", "far away"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both kinds of device."""
    if request.param == "far away":
        monkeypatch.setattr(concrete, "FREE", frozenset())


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_numbers_on_both_kinds_of_device(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hat, state, x, y = made(network)
    tasks = torch.tensor([0, 2, 0, 2, 2, 0, 0, 2])
    scale = torch.tensor(5.0)  # far away a number becomes a tensor, which a product rounds otherwise

    def everything() -> tuple:
        new, info = hat.update(state, (x, y), 1, scale)
        assert info.ok
        return new, tuple(info), hat.forward(new, x, 0), hat.forward(new, x, tasks)

    near = everything()
    monkeypatch.setattr(concrete, "FREE", frozenset())
    assert equal(everything(), near)


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize(
    ("task", "scale", "label"),
    [(0, 5.0, 0), (0, None, 0), (1, 401.0, 0), (1, torch.tensor(401.0), 0), (1, torch.tensor(-1.0), 0),
     (1, torch.tensor(torch.nan), 0), (1, 5.0, 2), (1, 5.0, -1)],
)  # fmt: skip
def test_a_step_that_a_check_would_refuse_is_refused_by_the_device(
    task: int, scale: float | Tensor | None, label: int
) -> None:
    """A task that is not open, a scale above s_max, labels that the task has no class for."""
    hat, state, x, y = made("conv net")
    new, info = hat.update(state, (x, y.clone().index_fill_(0, torch.tensor(3), label)), task, scale)
    assert not info.ok
    assert equal(new, state)
    assert hat.update(state, (x, y), 1, 400.0)[1].ok


@pytest.mark.usefixtures("far")
def test_replicas_are_refused_one_by_one() -> None:
    hat, state, x, y = made("mlp")
    many, states = hatfn.Replicas(hat), hatfn.stack([state, hat.begin(state, 2)])
    assert many.update(states, (x, y), 1, 5.0, shared=True)[1].ok.tolist() == [True, False]
    both = hatfn.stack([state, state])
    scale = torch.tensor([401.0, 5.0])
    assert many.update(both, (x, y), 1, scale, shared=True)[1].ok.tolist() == [False, True]
    assert not many.update(both, (x, y + 1), 1, 5.0, shared=True)[1].ok.any()


@pytest.mark.usefixtures("far")
def test_outputs_that_a_check_would_refuse_are_nan() -> None:
    hat, state, x, _ = made("conv net")
    assert hat.forward(state, x, 1).isnan().all(), "open, not learned"
    assert hat.forward(state, x, 0).isfinite().all()
    assert hat.forward(state, x, 0, 401.0).isnan().all()
    each = hat.forward(state, x, torch.arange(8) % 3)
    assert each.isnan().any(-1).tolist() == [task == 1 for task in torch.arange(8) % 3]
    assert hat.predict(state, x, [0, 1, 2]).isnan().flatten(1).any(1).tolist() == [False, True, False]
    many = hatfn.Replicas(hat)
    states = hatfn.stack([state, hat.consolidate(state, 1, [])])
    assert many.forward(states, x, 1).isnan().flatten(1).any(1).tolist() == [True, False]
    assert many.predict(states, x, [1]).isnan().flatten(1).any(1).tolist() == [True, False]


@pytest.mark.usefixtures("anywhere")
def test_what_needs_no_number_is_refused_everywhere() -> None:
    hat, state, x, y = made("mlp")
    for scale in (-1.0, 0.0, torch.inf, True, "5"):
        with pytest.raises((TypeError, ValueError), match="scale="):
            hat.update(state, (x, y), 1, scale)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\)"):
        hat.forward(state, x, 0, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="out of range"):
        hat.forward(state, x, torch.full((8,), 3))
    with pytest.raises(ValueError, match="out of range"):
        hat.predict(state, x, [0, 3])


@pytest.mark.usefixtures("anywhere")
def test_what_may_wait_is_checked_everywhere() -> None:
    """What runs once for a task reads what it must."""
    hat, state, x, y = made("mlp")
    with pytest.raises(ValueError, match="task 0 is not open"):
        hat.recalibrate(state, [x], 0)
    with pytest.raises(ValueError, match="no binary gates"):
        hat.compact(state, 1)
    with pytest.raises(ValueError, match="the task has 2 classes"):
        hat.consolidate(state, 1, [(x, y + 1)])
    assert len(hat.predict(state, x)) == 2, "all learned tasks"


@pytest.mark.usefixtures("anywhere")
def test_labels_that_the_loss_leaves_out_are_right() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 1, 6, 6), torch.arange(2).repeat(4, 6, 3)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    hat = hatfn.build(net, hatfn.trace(net, x[:1], head="2"), [2, 3], torchopt.sgd(0.1))
    state = hat.begin(hat.init(0), 0)
    y[:, 0, 0] = -100
    _, info = hat.update(state, (x, y), 0, 5.0)
    assert info.ok
    assert torch.equal(info.loss, nn.functional.cross_entropy(info.logits, y))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_gpu_is_not_waited_for(network: str, optimizer: str) -> None:
    make, shape, head = NETWORKS[network]
    x, y = torch.randn(8, *shape, device="cuda"), torch.arange(8, device="cuda") % 2
    hat = learner(make().cuda(), x, head=head, optimizer=OPTIMIZERS[optimizer]())
    state = hat.begin(hat.consolidate(hat.consolidate(hat.init(0), 0, []), 2, []), 1)
    tasks, wrong = torch.tensor([0, 2, 0, 2, 2, 0, 0, 2]), y + 1

    def everything() -> tuple:
        new, info = hat.update(state, (x, y), 1, 5.0)
        _, refused = hat.update(state, (x, wrong), 1, 5.0)
        outputs = (
            hat.forward(new, x, 0), hat.forward(new, x, 1, 5.0), hat.forward(new, x, None),
            hat.forward(new, x, tasks), hat.predict(new, x, [0, 2]), hat.predict(new, x, [2, 0]),
        )  # fmt: skip
        return info.ok, refused.ok, outputs

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ok, refused, outputs = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ok
    assert not refused
    assert all(logits.isfinite().any() for logits in outputs)
