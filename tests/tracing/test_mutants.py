"""Rules broken on purpose: for each mutant, the case of test_trace that kills it.

A mutant dies if a leak shows under perturbation, or if what it traces is no longer good: all open,
all one unit, no capacity left after the first task.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import LAYERS
from nets import mlp
from torch import Tensor
from value_cases import VALUES

import hatfn
from hatfn.models import MLP
from hatfn.testing import verify_wiring
from hatfn.tracing import interpret, labels, nodes, tracer
from hatfn.tracing.rules import contraction, elementwise, movement, norms, reduction
from hatfn.wiring import OPEN

RULES = LAYERS | VALUES
Patch = pytest.MonkeyPatch


def drop_merges(patch: Patch) -> None:
    def merge(self: tracer.Tracer, a: Tensor, b: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(a, b)
        return torch.where(a == labels.ZERO, b, a)

    patch.setattr(tracer.Tracer, "merge", merge)


def merge_everything(patch: Patch) -> None:
    fresh = tracer.Tracer.fresh

    def one(self: tracer.Tracer, count: int, name: str) -> Tensor:
        ids = fresh(self, count, name)
        self.unions = self.unions.join(ids, torch.zeros_like(ids))
        return ids

    patch.setattr(tracer.Tracer, "fresh", one)


def open_everything(patch: Patch) -> None:
    wrap = interpret._wrap

    def opened(at, result, *rest):
        return wrap(at, labels.filled(nodes.shape_of(at), OPEN), *rest)

    patch.setattr(interpret, "_wrap", opened)


def never_refuse_a_merge(patch: Patch) -> None:
    patch.setattr(labels.UnionFind, "width", lambda self, label: 0)


def ignore_groups(patch: Patch) -> None:
    conv = contraction.RULES["conv2d"]

    def first_block(t, node, x, weight, *args):
        label = t.roots(x)
        per_group = weight.shape[1]
        blocks = x.shape[1] // per_group
        first = label[:, :per_group].repeat(1, blocks, 1, 1)
        return conv(t, node, tracer.Value(first, x.dynamic), weight, *args)

    patch.setitem(interpret.BINDING, "conv2d", first_block)


def keep_zero_always(patch: Patch) -> None:
    patch.setattr(elementwise, "at_zero", lambda node: True)


def softmax_keeps_zero(patch: Patch) -> None:
    patch.setitem(interpret.PASSING, "softmax", elementwise.preserving)


def defer_through_layer_norm(patch: Patch) -> None:
    layer_norm = norms.RULES["layer_norm"]

    def rule(t, node, x, *args):
        result = layer_norm(t, node, x, *args)
        norms._defer(t, node, x, result)
        return result

    patch.setitem(interpret.BINDING, "layer_norm", rule)


def defer_whatever_else_reads(patch: Patch) -> None:
    def defer(t, node, x, result):
        t.deferred.add(node.args[0])

    patch.setattr(norms, "_defer", defer)


def defer_parameters_read_elsewhere(patch: Patch) -> None:
    class Some(set):
        def issuperset(self, others):
            return not self.isdisjoint(others)

    init = tracer.Tracer.__init__

    def lenient(self, *args):
        init(self, *args)
        self.deferred = Some()

    patch.setattr(tracer.Tracer, "__init__", lenient)


def ignore_a_second_use(patch: Patch) -> None:
    bind = tracer.Tracer._bind_param

    def once(self, value, wanted, into):
        param = self.params[value.param]
        return wanted if param.out_units is not None else bind(self, value, wanted, into)

    patch.setattr(tracer.Tracer, "_bind_param", once)


def ignore_a_computed_bias(patch: Patch) -> None:
    linear = contraction.RULES["linear"]

    def rule(t, node, x, weight, bias=None):
        return linear(t, node, x, weight, bias if bias is None or bias.param else None)

    patch.setitem(interpret.BINDING, "linear", rule)


def ignore_a_bias(patch: Patch) -> None:
    linear = contraction.RULES["linear"]
    patch.setitem(interpret.BINDING, "linear", lambda t, node, x, w, b=None: linear(t, node, x, w))


def look_at_one_place(patch: Patch) -> None:
    def agree(label: Tensor, dims: tuple[int, ...]) -> Tensor:
        for dim in dims:
            label = label.narrow(dim, 0, min(1, label.shape[dim]))
        return label

    for module in (contraction, norms, reduction, tracer):
        patch.setattr(module, "agree", agree)


def ones_for_padding(patch: Patch) -> None:
    pad = movement.RULES["pad"]

    def rule(t, node, x, pads, mode="constant", *_):
        return pad(t, node, x, pads, mode, 0.0)

    patch.setitem(interpret.PASSING, "pad", rule)


def a_sum_is_zero_where_one_term_is(patch: Patch) -> None:
    patch.setitem(interpret.PASSING, "add", elementwise.RULES["mul"])


def attention_keeps_the_query(patch: Patch) -> None:
    rule = contraction.RULES["scaled_dot_product_attention"]
    patch.setitem(
        interpret.BINDING,
        "scaled_dot_product_attention",
        lambda t, node, q, k, v, *a, **kw: rule(t, node, q, k, q, *a, **kw),
    )


def know_the_unknown(patch: Patch) -> None:
    patch.setattr(interpret, "_unknown", lambda t, node, x, *_, **__: t.label(x))


def share_what_is_shown(patch: Patch) -> None:
    patch.setattr(tracer.Tracer, "own", lambda self, value: None)


def no_folding(patch: Patch) -> None:
    patch.setattr(tracer.Tracer, "fold", lambda self, value: None)


def norm_without_its_bias(patch: Patch) -> None:
    affine = norms._affine
    patch.setattr(norms, "_affine", lambda t, node, label, w, b: affine(t, node, label, w, None))


def a_norm_without_affine_keeps_zero(patch: Patch) -> None:
    patch.setattr(norms, "_affine", lambda t, node, label, w, b: label)


LEAKS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "drop merges": (drop_merges, "add: a residual stream"),
    "ignore groups": (ignore_groups, "conv2d in groups"),
    "every operator keeps zero": (keep_zero_always, "add: a constant"),
    "softmax keeps zero": (softmax_keeps_zero, "softmax over channels"),
    "defer through layer norm": (defer_through_layer_norm, "layer norm of a linear layer"),
    "defer whatever else reads": (defer_whatever_else_reads, "batch norm read twice"),
    "defer parameters read elsewhere": (
        defer_parameters_read_elsewhere, "a normalised bias, used again elsewhere",
    ),
    "ignore a second use": (ignore_a_second_use, "a module used twice"),
    "ignore a computed bias": (ignore_a_computed_bias, "a bias put together"),
    "ignore a bias": (ignore_a_bias, "linear"),
    "look at one place only": (look_at_one_place, "cat of unlike places"),
    "padding with ones": (ones_for_padding, "padding with ones"),
    "a sum is zero where one term is": (
        a_sum_is_zero_where_one_term_is, "add: an ungated shortcut",
    ),
    "attention keeps the query": (attention_keeps_the_query, "layer norm"),
    "know the unknown": (know_the_unknown, "an operator without a rule"),
    "share what is shown": (share_what_is_shown, "a weight that is also an output"),
    "a standardised weight is not folded": (no_folding, "a weight that batch norm standardises"),
    "norm without its bias": (norm_without_its_bias, "layer norm"),
    "a norm without affine keeps zero": (a_norm_without_affine_keeps_zero, "layer norm without affine"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_a_mutant_that_leaks_is_seen(name: str, monkeypatch: Patch) -> None:
    mutate, case = LEAKS[name]
    module, x, head = RULES[case]
    verify_wiring(module, hatfn.trace(module, x[:1], head=head), x)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        verify_wiring(module, hatfn.trace(module, x[:1], head=head), x)


SPOILT = {
    "call everything open": open_everything,
    "merge everything": merge_everything,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_mutant_that_wastes_capacity_is_seen(name: str, monkeypatch: Patch) -> None:
    module, x = MLP(8, 3, width=16), torch.randn(2, 8)
    good = hatfn.trace(module, x)
    SPOILT[name](monkeypatch)
    bad = hatfn.trace(module, x)
    assert good.measures.smallest_group == 16
    assert good.measures.pair_gated > 0.5
    assert bad.measures.smallest_group < 16 or bad.measures.pair_gated < 0.5


def test_merges_that_collapse_are_refused(monkeypatch: Patch) -> None:
    module, x, head = RULES["add: rolled onto itself"]
    kept = hatfn.trace(module, x, head=head).groups
    never_refuse_a_merge(monkeypatch)
    assert hatfn.trace(module, x, head=head).groups != kept
    assert kept["a"] == 8


def test_a_plain_network_is_unharmed_by_none_of_them() -> None:
    module, x = mlp(), torch.randn(2, 5)
    assert not verify_wiring(module, hatfn.trace(module, x, head="4"), x).untested
