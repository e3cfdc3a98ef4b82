"""A learner's copy of a module: a later change of the user's own module moves no output."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchopt
from nets import equal
from torch import Tensor, nn

import hatfn
from hatfn.checks.capacity import HATWarning

GLOBAL: dict[str, nn.Module | Tensor] = {}


class Body(nn.Module):
    """Calls ``b`` in a way that each test chooses."""

    def __init__(self, wire: Callable[[Body], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.f = wire(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self.a(x).relu()).relu())


def closure(body: Body):
    b = body.b
    return lambda h: b(h)


def default_argument(body: Body):
    return lambda h, b=body.b: b(h)


def replaced(body: Body):
    old = body.b.forward
    body.b.forward = lambda h: old(h) * 2
    return body.b


def nested(body: Body):
    inner = closure(body)
    return lambda h: inner(h)


def hook(body: Body):
    b = body.b
    b.register_forward_hook(lambda module, args, output: output + b.bias)
    return b


def two_names(body: Body):
    body.c = body.b
    return lambda h: body.c(body.b(h))


def tied(body: Body):
    body.c = nn.Linear(16, 16)
    body.c.weight = body.b.weight
    return lambda h: body.c(body.b(h))


def container(body: Body):
    body.parts = {"b": [body.b]}
    return lambda h: body.parts["b"][0](h)


def constant(body: Body):
    scale, b = torch.randn(16), body.b
    body.scales = [scale]
    return lambda h: b(h) * scale


KEPT = {
    "closure": closure,
    "default argument": default_argument,
    "partial": lambda body: partial(lambda b, h: b(h), body.b),
    "bound method": lambda body: body.b.forward,
    "replaced forward": replaced,
    "closure in a closure": nested,
    "hook": hook,
    "two names": two_names,
    "tied": tied,
    "container": container,
    "constant of a closure": constant,
}


def mutate(module: Body) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *getattr(module, "scales", [])):
            tensor.add_(1)


@pytest.mark.parametrize("kind", KEPT)
def test_a_change_of_the_users_module_moves_nothing(kind: str) -> None:
    torch.manual_seed(0)
    module, x, y = Body(KEPT[kind]), torch.randn(8, 5), torch.randint(2, (8,))
    wiring = hatfn.trace(module, x)
    assert wiring.heads[0].weight == "head.weight"
    assert wiring.measures.shared > 0.9
    hat = hatfn.build(module, wiring, [2, 2], torchopt.adam(1e-2))
    state = hat.begin(hat.init(0), 0)
    for _ in range(3):
        state, info = hat.update(state, (x, y), 0, 10.0)
        assert info.ok
    assert not equal(state.params, hat.init(0).params)
    state = hat.consolidate(state, 0)
    served, shipped = hat.forward(state, x, 0), hatfn.export(hat, state, 0)
    alone, trained = shipped(x), hat.update(hat.begin(state, 1), (x, y), 1, 10.0)
    mutate(module)
    assert torch.equal(hat.forward(state, x, 0), served)
    assert torch.equal(shipped(x), alone)
    torch.testing.assert_close(alone, served)
    again = hat.update(hat.begin(state, 1), (x, y), 1, 10.0)
    assert equal(again[0].params, trained[0].params)
    network = hat.network
    for private in (network.train, network.evaluate, network.calibrate, network.plain):
        assert all(tensor.is_meta for tensor in private.parameters()), "a call leaves no numbers behind"
    assert [*map(type, shipped.parameters())] == [nn.Parameter] * len([*shipped.parameters()])


def in_list(body: Body):
    body.weights = [body.b.weight]
    return lambda h: h @ body.weights[0].T


def in_closure(body: Body):
    weight = body.b.weight
    return lambda h: h @ weight.T


def unregistered(body: Body):
    body.weights = [nn.Parameter(torch.randn(16, 16))]
    return lambda h: h @ body.weights[0]


def global_layer(body: Body):
    GLOBAL["b"] = body.b
    return lambda h: GLOBAL["b"](h)


def method_of_a_function(body: Body):
    b = body.b
    return types.MethodType(lambda self, h: b(h), body)


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (in_list, r"reads b\.weight from self\.weights\[0\], where PyTorch does not register it"),
        (in_closure, r"reads b\.weight from self\.f \(closure over weight\)"),
        (unregistered, r"reads a parameter of shape \(16, 16\) from self\.weights\[0\]"),
        (global_layer, r"reads b\.weight of the module through its class, a global variable"),
        (method_of_a_function, r"reads b\.weight of the module through"),
    ],
)
def test_what_no_copy_can_replace_is_refused_by_name(wire, message: str) -> None:
    with pytest.raises(hatfn.TraceError, match=message):
        hatfn.trace(Body(wire), torch.randn(1, 5))


def test_a_class_that_reads_the_live_module_is_refused() -> None:
    class Patched(Body):
        pass

    module = Patched(closure)
    Patched.forward = lambda self, x: module.head(self.a(x).relu())
    with pytest.raises(hatfn.TraceError, match=r"reads head\.weight of the module through its class"):
        hatfn.trace(module, torch.randn(1, 5))


def test_constants_of_the_world_are_warned_of() -> None:
    GLOBAL["t"] = torch.randn(16)
    with pytest.warns(HATWarning, match=r"reads a tensor of shape \(16,\) that no copy of it holds"):
        hatfn.trace(Body(lambda body: lambda h: body.b(h) * GLOBAL["t"]), torch.randn(1, 5))


def test_tensors_that_the_call_makes_are_its_own() -> None:
    def fresh(body: Body):
        return lambda h: body.b(h) * torch.tensor([2.0]) + torch.Tensor([1.0] * 16) + torch.ones(16)

    assert hatfn.trace(Body(fresh), torch.randn(1, 5)).measures.shared == 1


class Words(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.Embedding, **settings) -> None:
        super().__init__()
        self.words, self.head = kind(7, 16, sparse=True, **settings), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.words(x)
        return self.head((embedded.mean(1) if embedded.dim() > 2 else embedded).relu())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embeddings_train_the_dense_way(kind: type[nn.Module]) -> None:
    module, x, y = Words(kind), torch.randint(7, (8, 4)), torch.randint(2, (8,))
    hat = hatfn.build(module, hatfn.trace(module, x), [2], torchopt.adamw(1e-2))
    start = hat.begin(hat.init(0), 0)
    state, info = hat.update(start, (x, y), 0, 10.0)
    assert info.ok
    both = {**state.params, **state.task_params}, {**start.params, **start.task_params}
    assert not torch.equal(both[0]["words.weight"], both[1]["words.weight"])
    assert module.words.sparse
