"""Norms and recurrent layers: whose gate an affine holds, and which rows belong to a hidden unit."""

from __future__ import annotations

import pytest
import torch
from told import IMAGES, LINES, ROWS, TOKENS, said
from torch import Tensor, nn
from torch.nn import functional as F
from value_cases import standardised


def rows() -> nn.Linear:
    return nn.Linear(3, 4)


def pixels() -> nn.Conv2d:
    return nn.Conv2d(1, 4, 1)


def behind(m: nn.Module, x: Tensor) -> Tensor:
    return m.n(m.a(x))


def of_part(m: nn.Module, x: Tensor) -> Tensor:
    return m.n(torch.cat([m.a(x), x], -1))


def of_unlike_places(m: nn.Module, x: Tensor) -> Tensor:
    return m.n(torch.cat([m.a(x), m.c(x)], 2 if x.dim() == 4 else 1))


DEFERRED = {
    "a.weight": "a deferred",
    "a.bias": "a deferred",
    "n.weight": "task a",
    "n.bias": "task a",
    "y": "a",
}
GATED = {"a.weight": "a", "a.bias": "a", "n.weight": "task a", "n.bias": "task a", "y": "a"}

NORMS = {
    "batch norm": (IMAGES, behind, {"a": pixels(), "n": nn.BatchNorm2d(4)}, DEFERRED),
    "batch norm of rows": (ROWS, behind, {"a": rows(), "n": nn.BatchNorm1d(4)}, DEFERRED),
    "batch norm of lines": (LINES, behind, {"a": nn.Conv1d(1, 4, 1), "n": nn.BatchNorm1d(4)}, DEFERRED),
    "batch norm of one unit": (ROWS, behind, {"a": nn.Linear(3, 1), "n": nn.BatchNorm1d(1)}, DEFERRED),
    "batch norm behind an activation": (ROWS, lambda m, x: m.n(m.a(x).relu()), {"a": rows(), "n": nn.BatchNorm1d(4)}, GATED),
    "batch norm of what is read decomposed": (
        ROWS, lambda m, x: (lambda h: m.n(h) + h)(m.a(x)), {"a": rows(), "n": nn.BatchNorm1d(4)}, GATED,
    ),
    "batch norm of a weight that is read decomposed": (
        ROWS, lambda m, x: m.n(F.linear(x, m.w, m.v)) + F.linear(x, m.w), {"w": torch.ones(4, 3), "v": torch.ones(4), "n": nn.BatchNorm1d(4)},
        {"w": "w", "v": "w deferred", "n.weight": "task w"},
    ),
    "batch norm of the input": (ROWS, lambda m, x: m.n(x), {"n": nn.BatchNorm1d(3)}, {"n.weight": "task n", "n.bias": "task n", "y": "n"}),
    "batch norm of one channel of the input": (ROWS, lambda m, x: m.n(x[:, :1]), {"n": nn.BatchNorm1d(1)}, {"n.weight": "task", "n.bias": "task", "y": "."}),
    "batch norm of what is partly open": (
        ROWS, of_part, {"a": rows(), "n": nn.BatchNorm1d(7)},
        {"a.weight": "a", "n.weight": "task a0 a1 a2 a3 n0 n1 n2", "n.bias": "task a0 a1 a2 a3 n0 n1 n2", "y": "a0 a1 a2 a3 n0 n1 n2"},
    ),
    "batch norm of unlike places": (
        IMAGES, of_unlike_places, {"a": pixels(), "c": pixels(), "n": nn.BatchNorm2d(4)}, {"a.weight": "a", "c.weight": "c", "n.weight": "task n", "y": "n"},
    ),
    "batch norm without affine": (ROWS, behind, {"a": rows(), "n": nn.BatchNorm1d(4, affine=False)}, {"a.weight": "a", "y": "."}),
    "batch norm with a fixed affine": (ROWS, lambda m, x: F.batch_norm(m.a(x), None, None, m.k, None, True), {"a": rows(), "k": torch.ones(4)}, {"a.weight": "a", "y": "."}),
    "batch norm with an affine from the input": (
        ROWS, lambda m, x: F.batch_norm(m.a(x), None, None, m.c(x)[0], None, True), {"a": rows(), "c": rows()}, {"a.weight": "a", "c.weight": "c", "y": "."},
    ),
    "batch norm of two layers": (
        ROWS, lambda m, x: torch.cat([m.n(m.a(x)), m.n(m.c(x))], 1), {"a": rows(), "c": rows(), "n": nn.BatchNorm1d(4)},
        {"a.weight": "a deferred", "c.weight": "a deferred", "n.weight": "task a", "y": "a0 a1 a2 a3 a0 a1 a2 a3"},
    ),
    "batch norm of a layer in two orders": (
        ROWS, lambda m, x: torch.cat([m.n(m.a(x)), m.n(m.a(x).roll(1, 1))], 1), {"a": rows(), "n": nn.BatchNorm1d(4)},
        {"a.weight": "a", "n.weight": "task a", "y": "a0 a1 a2 a3 a0 a1 a2 a3"},
    ),
    "batch norm with another bias": (
        ROWS, lambda m, x: torch.cat([F.batch_norm(m.a(x), None, None, m.g, m.v, True), F.linear(x, m.w, m.v.flip(0))], 1),
        {"a": rows(), "g": torch.ones(4), "v": torch.ones(4), "w": torch.ones(4, 3)},
        {"g": "task a", "v": "task a", "w": "a3 a2 a1 a0", "y": "a0 a1 a2 a3 a3 a2 a1 a0"},
    ),
    "instance norm": (IMAGES, behind, {"a": pixels(), "n": nn.InstanceNorm2d(4, affine=True)}, DEFERRED),
    "instance norm without affine": (IMAGES, behind, {"a": pixels(), "n": nn.InstanceNorm2d(4)}, {"a.weight": "a", "y": "a"}),
    "instance norm without affine, of unlike places": (
        IMAGES, of_unlike_places, {"a": pixels(), "c": pixels(), "n": nn.InstanceNorm2d(4)}, {"a.weight": "a", "c.weight": "c", "y": "."},
    ),
    "instance norm without affine, of unlike samples": (
        IMAGES, lambda m, x: m.n(torch.cat([m.a(x), m.c(x)])).reshape(2, 2, 4, 4, 4).transpose(0, 1), {"a": pixels(), "c": pixels(), "n": nn.InstanceNorm2d(4)},
        {"y": "[[a0 a1 a2 a3] [c0 c1 c2 c3]]"},
    ),
    "instance norm by what was seen": (IMAGES, behind, {"a": pixels(), "n": nn.InstanceNorm2d(4, track_running_stats=True)}, {"a.weight": "a", "y": "."}),
    "instance norm with a bias alone": (IMAGES, lambda m, x: F.instance_norm(m.a(x), bias=m.v), {"a": pixels(), "v": torch.ones(4)}, {"v": "task", "y": "."}),
    "group norm": (IMAGES, behind, {"a": pixels(), "n": nn.GroupNorm(2, 4)}, GATED),
    "group norm, as it is computed": (
        IMAGES, lambda m, x: torch.native_group_norm(m.a(x), m.g, m.v, 2, 4, 16, 2, 1e-5)[0], {"a": pixels(), "g": torch.ones(4), "v": torch.ones(4)},
        {"a.weight": "a", "g": "task a", "v": "task a", "y": "a"},
    ),
    "group norm with a bias of units of its own": (
        IMAGES, lambda m, x: m.n(m.a(x)) + F.linear(x.mean((1, 2, 3))[:, None], m.u, m.n.bias.flip(0))[:, :, None, None],
        {"a": pixels(), "n": nn.GroupNorm(2, 4), "u": torch.ones(4, 1)}, {"n.weight": "task a", "n.bias": "task a", "y": "."},
    ),
    "layer norm": (ROWS, behind, {"a": rows(), "n": nn.LayerNorm(4)}, GATED),
    "layer norm of tokens": (TOKENS, behind, {"a": rows(), "n": nn.LayerNorm(4)}, {"a.weight": "a", "n.weight": "task a", "n.bias": "task a", "y": "a@1"}),
    "layer norm of images": (
        IMAGES, behind, {"a": nn.Conv2d(1, 2, 3), "n": nn.LayerNorm((2, 2, 2))}, {"a.weight": "a", "n.weight": "task a", "y": "a"},
    ),
    "layer norm of the input": (TOKENS, lambda m, x: m.n(x), {"n": nn.LayerNorm(3)}, {"n.weight": "task n", "n.bias": "task n", "y": "n@1"}),
    "layer norm of what is partly open": (TOKENS, of_part, {"a": rows(), "n": nn.LayerNorm(7)}, {"n.weight": "task a0 a1 a2 a3 n0 n1 n2"}),
    "layer norm without affine": (ROWS, behind, {"a": rows(), "n": nn.LayerNorm(4, elementwise_affine=False)}, {"a.weight": "a", "y": "."}),
    "rms norm": (TOKENS, behind, {"a": rows(), "n": nn.RMSNorm(4)}, {"a.weight": "a", "n.weight": "task", "y": "a@1"}),
    "rms norm without a scale": (TOKENS, behind, {"a": rows(), "n": nn.RMSNorm(4, elementwise_affine=False)}, {"a.weight": "a", "y": "a@1"}),
    "rms norm of the input": (TOKENS, lambda m, x: m.n(x), {"n": nn.RMSNorm(3)}, {"n.weight": "task n", "y": "n@1"}),
    "rms norm of what is partly open": (
        TOKENS, of_part, {"a": rows(), "n": nn.RMSNorm(7)}, {"n.weight": "task a0 a1 a2 a3 n0 n1 n2", "y": "a0 a1 a2 a3 n0 n1 n2@1"},
    ),
    "rms norm of unlike places": (
        TOKENS, lambda m, x: m.n(torch.cat([m.a(x)[:, :1], m.c(x)[:, :1]], 1)), {"a": rows(), "c": rows(), "n": nn.RMSNorm(4)},
        {"n.weight": "task", "y": "[[a0 a1 a2 a3] [c0 c1 c2 c3]]"},
    ),
    "a standardised weight": (ROWS, lambda m, x: F.linear(m.a(x), standardised(m.w)), {"a": rows(), "w": torch.ones(2, 4)}, {"w": "w < a folded", "y": "w"}),
    "a standardised weight with a gain": (
        ROWS, lambda m, x: F.linear(m.a(x), standardised(m.w, m.g)), {"a": rows(), "w": torch.ones(2, 4), "g": torch.ones(2)}, {"w": "g < a folded", "g": "task g", "y": "g"},
    ),
    "a standardised weight with a gain and a bias": (
        ROWS, lambda m, x: F.linear(m.a(x), F.batch_norm(m.w[None], None, None, m.g, m.v, True)[0]),
        {"a": rows(), "w": torch.ones(2, 4), "g": torch.ones(2), "v": torch.ones(2)}, {"w": "task", "g": "task", "v": "task", "y": "."},
    ),
    "a standardised weight that is read in part": (
        ROWS, lambda m, x: F.linear(m.a(x)[:, :1], standardised(m.w, m.g)[:, :1]), {"a": rows(), "w": torch.ones(2, 4), "g": torch.ones(2)}, {"g": "task g", "y": "g"},
    ),
    "a standardised weight that reads the input": (ROWS, lambda m, x: F.linear(x, standardised(m.w)), {"w": torch.ones(2, 3)}, {"w": "w", "y": "w"}),
}  # fmt: skip


def states(m: nn.Module, x: Tensor) -> Tensor:
    """What every layer and direction ends with, samples first."""
    return m.r(m.a(x))[1].transpose(0, 1)


def first(m: nn.Module, x: Tensor) -> Tensor:
    return m.r(m.a(x))[0]


def recurrent(rows: int, unit: str = "r", reads: str = "a") -> tuple[str, str, str]:
    """What is said of a hidden layer's two matrices and of its biases."""
    out = " ".join([f"{unit}0 {unit}1"] * rows) if rows > 1 else unit
    return f"{out} < {reads}", f"{out} < {unit}", out


LSTM, GRU, RNN = recurrent(4), recurrent(3), recurrent(1)
BACK, UP = recurrent(1, "r'"), recurrent(1, "r''", "r0 r1 r'0 r'1")
WHOLE = {"weight_ih_l0": LSTM[0], "weight_hh_l0": LSTM[1], "bias_ih_l0": LSTM[2], "bias_hh_l0": LSTM[2]}
OWN = dict.fromkeys(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), "task")

RECURRENT = {
    "lstm": (first, nn.LSTM(4, 2, batch_first=True), {**WHOLE, "y": "r@1"}),
    "lstm's last output": (lambda m, x: m.r(m.a(x))[1][0][0], nn.LSTM(4, 2, batch_first=True), {**WHOLE, "y": "r"}),
    "lstm's last cell": (lambda m, x: m.r(m.a(x))[1][1][0], nn.LSTM(4, 2, batch_first=True), {**WHOLE, "y": "r"}),
    "gru": (first, nn.GRU(4, 2, batch_first=True, bias=False), {"weight_ih_l0": GRU[0], "weight_hh_l0": GRU[1], "y": "r@1"}),
    "a plain one": (first, nn.RNN(4, 2, batch_first=True), {"weight_ih_l0": RNN[0], "bias_hh_l0": RNN[2], "y": "r@1"}),
    "a plain one with relu": (first, nn.RNN(4, 2, nonlinearity="relu", batch_first=True), {"weight_hh_l0": RNN[1], "y": "r@1"}),
    "one of two layers and directions": (
        states, nn.RNN(4, 2, 2, batch_first=True, bidirectional=True),
        {"weight_ih_l0": RNN[0], "weight_hh_l0": RNN[1], "weight_ih_l0_reverse": BACK[0], "weight_hh_l0_reverse": BACK[1],
         "weight_ih_l1": UP[0], "weight_hh_l1": UP[1], "bias_ih_l1": UP[2], "weight_hh_l1_reverse": "r''' < r'''",
         "y": "[[r0 r1] [r'0 r'1] [r''0 r''1] [r'''0 r'''1]]"},
    ),
    "what both directions return": (first, nn.RNN(4, 2, 2, batch_first=True, bidirectional=True), {"y": "r''0 r''1 r'''0 r'''1@1"}),
    "one that starts from the input": (lambda m, x: m.r(m.a(x), x[None, :, 0, :2])[0], nn.RNN(4, 2, batch_first=True), {**OWN, "y": "."}),
    "one that starts from units": (lambda m, x: m.r(m.a(x), m.a(x)[None, :, 0, :2])[0], nn.RNN(4, 2, batch_first=True), {**OWN, "y": "."}),
    "one that starts from zeros": (lambda m, x: m.r(m.a(x), x.new_zeros(1, len(x), 2))[0], nn.RNN(4, 2, batch_first=True), {"weight_ih_l0": RNN[0], "y": "r@1"}),
    "one with projections": (first, nn.LSTM(4, 3, proj_size=2, batch_first=True), {**OWN, "weight_hr_l0": "task", "y": "."}),
    "one that reads what differs between places": (
        lambda m, x: m.r(torch.cat([m.a(x), m.a(x).roll(1, -1)], 1))[0], nn.RNN(4, 2, batch_first=True), {"weight_ih_l0": "r", "weight_hh_l0": RNN[1], "y": "r@1"},
    ),
    "one that is read decomposed": (
        lambda m, x: m.r(m.a(x))[0] @ m.r.weight_ih_l0, nn.RNN(4, 2, batch_first=True), {"weight_ih_l0": "r", "weight_hh_l0": RNN[1], "y": "."},
    ),
    "one whose rows were units of their own": (
        lambda m, x: m.r(F.linear(m.a(x)[..., :2], m.r.weight_hh_l0)[..., :4])[0], nn.LSTM(4, 2, batch_first=True),
        {"weight_ih_l0": "task r'0 r'1 r'0 r'1 r'0 r'1 r'0 r'1", "weight_hh_l0": "task r", "y": "."},
    ),
}  # fmt: skip

STEP = {
    "a gru that starts from units": (lambda m, x: m.r(m.b(x), m.a(x)), nn.GRUCell(2, 4), ("a", 3, "b", "a"), "a"),
    "two steps of a gru": (lambda m, x: m.r(m.b(x), m.r(m.b(x), m.a(x))), nn.GRUCell(2, 4), ("a", 3, "b", "a"), "a"),
    "a gru that starts from zeros": (lambda m, x: m.r(m.b(x)), nn.GRUCell(2, 4), ("r", 3, "b", "r"), "r"),
    "a plain one that starts from units": (lambda m, x: m.r(m.b(x), m.a(x)), nn.RNNCell(2, 4), ("r", 1, "b", "a"), "r"),
    "a plain one that starts from zeros": (lambda m, x: m.r(m.b(x)), nn.RNNCell(2, 4, nonlinearity="relu"), ("r", 1, "b", "r"), "r"),
    "an lstm that starts from zeros": (lambda m, x: m.r(m.b(x))[0], nn.LSTMCell(2, 4), ("r", 4, "b", "r"), "r"),
    "an lstm that starts from units": (lambda m, x: m.r(m.b(x), (m.a(x).exp(), m.a(x)))[0], nn.LSTMCell(2, 4), ("a", 4, "b", ""), "a"),
    "an lstm's cell": (lambda m, x: m.r(m.b(x), (m.a(x).exp(), m.a(x)))[1], nn.LSTMCell(2, 4), ("a", 4, "b", ""), "a"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP)
def test_a_step_has_the_gate_of_what_it_adds_to(name: str) -> None:
    function, layer, (unit, rows_of, reads, state), y = STEP[name]
    found = said(ROWS, function, {"a": rows(), "b": nn.Linear(3, 2), "r": layer})
    out = " ".join(f"{unit}{i}" for _ in range(rows_of) for i in range(4)) if rows_of > 1 else unit
    wanted = {"weight_ih": f"{out} < {reads}", "weight_hh": out + (f" < {state}" if state else "")}
    assert {name: found[f"r.{name}"] for name in wanted} == wanted
    assert (found["r.bias_ih"], found["r.bias_hh"], found["y"]) == (out, out, y)


@pytest.mark.parametrize("start", ["exp", "cos"])
def test_a_step_from_an_open_state_is_open(start: str) -> None:
    cells = {"exp": nn.GRUCell(3, 4), "cos": nn.LSTMCell(3, 4)}

    def step(m: nn.Module, x: Tensor) -> Tensor:
        state = getattr(m.a(x), start)()
        return m.r(x, (state, state))[0] if start == "cos" else m.r(x, state)

    found = said(ROWS, step, {"a": rows(), "r": cells[start]})
    assert found["y"] == "."
    assert {found[f"r.{name}"] for name, _ in cells[start].named_parameters()} == {"task"}


@pytest.mark.parametrize("name", NORMS)
def test_whose_gate_an_affine_holds(name: str) -> None:
    shape, function, parts, expected = NORMS[name]
    found = said(shape, function, parts)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", RECURRENT)
def test_which_rows_belong_to_a_hidden_unit(name: str) -> None:
    function, layer, expected = RECURRENT[name]
    found = said(TOKENS, function, {"a": rows(), "r": layer})
    assert {key: found[key if key == "y" else f"r.{key}"] for key in expected} == expected
