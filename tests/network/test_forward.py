"""The gated network is the module, gated: against the module itself, and against gated activations."""

from __future__ import annotations

import copy

import pytest
import torch
import torchopt
from nets import MODULES, ConvNet, Transformer, equal, learn, learner, mlp, moved
from torch import Tensor, nn
from torch.func import functional_call, grad

import hatfn
from hatfn.network.call import call
from hatfn.network.network import make_network
from hatfn.numerics.arguments import Inputs

# Dense and small networks have no unit to spare; test_capacity.py has the warnings that say so.
pytestmark = pytest.mark.filterwarnings("ignore::hatfn.HATWarning")


@pytest.mark.parametrize("name", MODULES)
def test_dense_embeddings_at_s_max_are_the_module_to_the_bit(name: str) -> None:
    make, inputs = MODULES[name]
    module, x = make().eval(), inputs()
    hat = hatfn.build(module, hatfn.trace(module, x[:1]), [3, 2], torchopt.sgd(0.1), init="dense")
    state = hat.init(seed=0)
    expected = module(x)
    assert torch.equal(hat.forward(state, x, task=0, scale=400.0), expected)
    assert torch.equal(hat.forward(state, x, task=None), expected)
    assert torch.equal(hat.forward(hat.consolidate(state, 0), x, task=0), expected)
    assert hat.forward(state, x, task=1, scale=400.0).shape == (len(x), 2)


def test_no_task_is_the_module_with_the_shared_weights_of_the_state() -> None:
    module, x = ConvNet().eval(), torch.randn(4, 1, 6, 6)
    hat = learner(module, x)
    state = learn(hat, hat.init(0), x, task=1)
    assert not equal(state.params, hat.init(0).params)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers()) | state.params
    assert torch.equal(hat.forward(state, x, None), functional_call(module, tensors, (x,)))


def _gated_mlp(module: nn.Sequential, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """The papers' formulation: activations times gates, h = a * relu(W x + b)."""
    h = gates["0"] * torch.relu(module[0](x))
    h = gates["2"] * torch.relu(module[2](h))
    return module[4](h)


def _gated_conv(module: ConvNet, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """Both convolutions feed one stream, so that one gate switches a channel of the block."""
    a = gates["conv1"][:, None, None]
    h = a * torch.relu(module.norm1(module.conv1(x)))
    h = torch.relu(h + a * module.norm2(module.conv2(h)))
    return module.head(h.mean((2, 3)))


def _gated_transformer(module: Transformer, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """Gates on what each layer puts out, before any nonlinearity: equal for any gate."""
    stream, width = gates["embed"], len(gates["embed"])
    x = stream * module.embed(x) + stream * module.position
    batch, tokens, _ = x.shape
    qkv = gates["qkv"] * module.qkv(stream * module.norm1(x))
    qkv = qkv.reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
    mixed = nn.functional.scaled_dot_product_attention(*qkv)
    x = x + stream * module.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
    h = nn.functional.gelu(gates["fc1"] * module.fc1(stream * module.norm2(x)))
    x = x + stream * module.fc2(h)
    return module.head(x.mean(1))


ACTIVATION_GATED = {
    "mlp": (lambda: mlp(), "4", _gated_mlp, lambda: torch.randn(6, 5)),
    "conv net": (ConvNet, "head", _gated_conv, lambda: torch.randn(6, 1, 6, 6)),
    "transformer": (Transformer, "head", _gated_transformer, lambda: torch.randn(6, 4, 5)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("scale", [1.0, 5.0, 400.0], ids="s={}".format)
@pytest.mark.parametrize("name", ACTIVATION_GATED)
def test_embedding_gradients_are_those_of_gated_activations(
    name: str, scale: float, training: bool
) -> None:
    make, head, gated, inputs = ACTIVATION_GATED[name]
    module, x = make().double().train(training), inputs().double()
    y = torch.randint(3, (len(x),))
    wiring = hatfn.trace(module, x[:1], head=head)
    network = make_network(module, wiring, None)
    params = {key: network.initial[key] for key in wiring.params}
    buffers = {key: network.initial[key] for key in wiring.buffers}
    embeddings = {g: torch.randn(units).double() for g, units in wiring.groups.items()}

    reference = copy.deepcopy(module)
    for child in reference.modules():
        if isinstance(child, nn.BatchNorm2d) and training:  # the loss does not read its statistics
            child.running_mean = child.running_var = child.num_batches_tracked = None

    def by_weights(e: dict[str, Tensor]) -> Tensor:
        gates = {g: hatfn.gate(v, scale) for g, v in e.items()}
        logits, _ = call(
            network,
            network.train if training else network.evaluate,
            params,
            buffers,
            gates,
            Inputs((x,)),
        )
        return nn.functional.cross_entropy(logits, y)

    def by_activations(e: dict[str, Tensor]) -> Tensor:
        gates = {g: hatfn.gate(v, scale) for g, v in e.items()}
        return nn.functional.cross_entropy(gated(reference, x, gates), y)

    torch.testing.assert_close(by_weights(embeddings), by_activations(embeddings))
    ours, theirs = grad(by_weights)(embeddings), grad(by_activations)(embeddings)
    assert any(g.abs().max() > 0 for g in ours.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", MODULES)
def test_predict_is_the_loop_over_tasks(name: str) -> None:
    make, inputs = MODULES[name]
    module, x = make(), inputs()
    hat = hatfn.build(module, hatfn.trace(module, x[:1]), [3, 2, 3], torchopt.sgd(0.1))
    state = hat.init(seed=0)
    for task in range(3):
        state = hat.consolidate(state, task)
    logits = hat.predict(state, x)
    assert logits.shape == (3, len(x), 3)
    for task in range(3):
        alone = hat.forward(state, x, task)
        torch.testing.assert_close(logits[task, :, : hat.classes[task]], alone, rtol=1e-5, atol=1e-5)
    assert logits[1, :, 2].eq(-torch.inf).all()
    chunked = hat.predict(state, x, tasks=[2, 0], chunk_size=1)
    torch.testing.assert_close(chunked, logits[[2, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 5.0], ids=["binary", "soft"])
@pytest.mark.parametrize("name", MODULES)
def test_a_task_for_each_sample_is_the_loop_to_the_bit(name: str, scale: float | None) -> None:
    make, inputs = MODULES[name]
    module, x = make(), torch.cat([inputs(), inputs()])
    hat = hatfn.build(module, hatfn.trace(module, x[:1]), [3, 2, 3, 3], torchopt.sgd(0.1))
    state = hat.init(seed=0)
    for task in range(3):
        state = hat.consolidate(state, task)
    tasks = torch.tensor([2, 0, 1, 2, 1, 0, 2, 2])[: len(x)]
    logits = hat.forward(state, x, tasks, scale)
    assert logits.shape == (len(x), 3)
    for task in range(3):
        rows, classes = tasks == task, hat.classes[task]
        alone = hat.forward(state, x[rows], task, scale)
        assert torch.equal(logits[rows, :classes], alone)
        assert logits[rows, classes:].eq(-torch.inf).all()
        other = hat.forward(state, x[rows], (task + 1) % 3, scale)
        width = min(alone.shape[1], other.shape[1])
        assert not torch.equal(alone[:, :width], other[:, :width])
    assert torch.equal(hat.forward(state, x, torch.tensor(1)), hat.forward(state, x, 1))
    assert hat.forward(state, x[:0], tasks[:0], scale).shape == (0, 3)


class Several(nn.Module):
    """Scores and a map of scores, from two classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(1, 8, 3, padding=1)
        self.head, self.map = nn.Linear(8, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.trunk(x))
        return {"scores": self.head(x.mean((2, 3))), "map": self.map(x)}


@pytest.mark.parametrize("classes", [[3, 2, 3], None])
def test_several_outputs_of_a_task_for_each_sample(classes: list[int] | None) -> None:
    module, x = Several(), torch.randn(5, 1, 6, 6)
    heads = ("head", "map") if classes else ()
    wiring = hatfn.trace(module, x[:1], head=heads)
    tasks = {} if classes else {"num_tasks": 3}
    hat = hatfn.build(module, wiring, classes, torchopt.sgd(0.1), **tasks)
    state = hat.init(0)
    for task in range(3):
        state = hat.consolidate(state, task)
    tasks = torch.tensor([1, 0, 1, 2, 1])
    each = hat.forward(state, x, tasks)
    assert each["scores"].shape == (5, 3)
    assert each["map"].shape == (5, 3, 6, 6)
    for task in range(3):
        alone, rows = hat.forward(state, x[tasks == task], task), tasks == task
        for name, logits in alone.items():
            own = logits.shape[1]
            assert own == (classes[task] if classes else 3)
            assert torch.equal(each[name][rows, :own], logits)
            assert each[name][rows, own:].eq(-torch.inf).all()
    together = hat.predict(state, x)
    for name, logits in each.items():
        torch.testing.assert_close(together[name][tasks, torch.arange(5)], logits)


def test_a_head_is_put_behind_a_module_without_one() -> None:
    trunk, x = (
        nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU()),
        torch.randn(4, 5),
    )
    wiring = hatfn.trace(trunk, x[:1], output_gate=True)
    hat = hatfn.build(trunk, wiring, [3, 2], torchopt.adam(1e-2))
    state = learn(hat, hat.init(0), x, task=1)
    assert state.task_params["head.weight"].shape == (2, 3, 6)
    assert hat.forward(state, x, task=1).shape == (4, 2)
    assert torch.equal(hat.forward(hat.init(0), x, None), trunk(x))


def test_gates_on_input_and_output_without_heads() -> None:
    module, x = nn.Linear(2, 1), torch.randn(4, 2)
    wiring = hatfn.trace(module, x[:1], input_gate=True, output_gate=True)
    assert dict(wiring.groups) == {"input": 2, "weight": 1}
    hat = hatfn.build(
        module, wiring, None, torchopt.sgd(0.1), loss=nn.functional.mse_loss, init="dense"
    )
    state = hat.begin(hat.init(0), 0)
    assert torch.equal(hat.forward(state, x, 0, scale=400.0), module(x))
    off = state._replace(embeddings=state.embeddings | {"input": torch.tensor([[1.0, -1.0]])})
    expected = module(x * torch.tensor([1.0, 0.0]))
    assert torch.equal(hat.forward(off, x, 0, scale=400.0), expected)
    after, info = hat.update(state, (x, torch.randn(4, 1)), 0, scale=1.0)
    assert info.ok
    assert moved(state, after)


def test_output_units_stay_ungated_unless_asked() -> None:
    module, x = nn.Linear(2, 1), torch.randn(4, 2)
    assert not hatfn.trace(module, x).groups
    assert dict(hatfn.trace(module, x, output_gate=True).groups) == {"weight": 1}


class Keeping(nn.Module):
    """As LeViT keeps its table of biases once it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.table, self.kept = nn.Parameter(torch.randn(8)), {}

    def train(self, mode: bool = True) -> nn.Module:
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table.exp() if self.training else self.kept.setdefault("table", self.table.exp())
        return self.head(torch.relu(self.norm(self.fc(x)) + table))


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")
def test_what_a_module_keeps_from_one_task_never_reaches_another() -> None:
    module, x = Keeping().eval(), torch.randn(6, 5)
    module(x)  # something is kept, with a derivative, before the trace
    hat = learner(module, x)
    assert hat.wiring.remembers
    assert not hatfn.trace(ConvNet(), torch.randn(1, 1, 6, 6)).remembers
    state = hat.init(0)
    tables = {"table": torch.randn(3, 8)}
    state = state._replace(task_params=state.task_params | tables)
    for task in (0, 1, 2):
        state = hat.consolidate(hat.recalibrate(hat.begin(state, task), [x], task), task)
    alone = [learner(module, x).forward(state, x, task) for task in range(3)]
    together = hat.predict(state, x)
    for task in (0, 1, 2, 0):
        assert torch.equal(hat.forward(state, x, task), alone[task])
        classes = hat.classes[task]
        torch.testing.assert_close(together[task, :, :classes], alone[task], rtol=1e-5, atol=1e-5)
    assert not torch.equal(alone[0], alone[2])
