"""Wrong calls of the classes that train and serve: HAT, Replicas, Subnet."""

from __future__ import annotations

import math

import torch
from nets import learner
from torch import nn
from wrong import (
    BATCH,
    HAT,
    LEARNED,
    OPEN,
    OPENED,
    OTHER,
    START,
    STATES,
    XS,
    YS,
    X,
    Y,
    wrong,
)  # fmt: skip

ELSE = START._replace(learned=torch.zeros(5).bool())
STATE = [  # states that every method refuses
    case
    for where in ("begin", "update", "recalibrate", "consolidate", "forward", "predict", "forget", "prune", "compact")
    for case in (
        wrong(f"HAT.{where}", "state", (OPEN, None), TypeError, where, "tuple", "hat.init(seed=0)", "state, info ="),
        wrong(f"HAT.{where}", "state", OPENED, ValueError, where, "(3, 3)", "(3,)", "replica(states, i)", "Replicas"),
        wrong(f"HAT.{where}", "state", ELSE, ValueError, where, "(5,)", "(3,)", "grown learner"),
        wrong(f"HAT.{where}", "state", OTHER, ValueError, where, "another learner", "8", "16"),
    )
]  # fmt: skip
STACKED = [
    case
    for where in ("begin", "update", "recalibrate", "consolidate", "forward", "predict")
    for case in (
        wrong(f"Replicas.{where}", "states", [OPEN, OPEN], TypeError, where, "list", "hatfn.replicate(hat, seeds)"),
        wrong(f"Replicas.{where}", "states", OPEN, ValueError, where, "(3,)", "axis in front", "hatfn.stack"),
    )
]  # fmt: skip
TASK = [
    case
    for where in ("HAT.begin", "HAT.update", "HAT.recalibrate", "HAT.consolidate", "HAT.forget", "HAT.compact",
                  "HAT.forward", "Replicas.begin", "Replicas.update", "Replicas.recalibrate",
                  "Replicas.consolidate", "Replicas.forward")
    for name in [where.split(".")[1]]
    for case in (
        wrong(where, "task", 3, ValueError, name, "task=3", "from 0 to 2", "3 tasks", "hatfn.grow"),
        wrong(where, "task", -1, ValueError, name, "task=-1", "0 to 2", "negative"),
        wrong(where, "task", 1.0, TypeError, name, "task=1.0", "float", "task=0"),
        wrong(where, "task", "1", TypeError, name, "task='1'", "str", "int"),
        wrong(where, "task", True, TypeError, name, "task=True", "bool"),
        *([] if where == "HAT.forward" else [wrong(where, "task", None, TypeError, name, "task=None", "int")]),
    )
]  # fmt: skip
SCALE = [
    case
    for where, states in (("HAT.update", {}), ("HAT.forward", {"state": OPEN}), ("Replicas.update", {}),
                          ("Replicas.forward", {"states": OPENED}))
    for name in [where.split(".")[1]]
    for case in (
        wrong(where, "scale", 0.0, ValueError, name, "scale=0.0", "(0, s_max=400.0]", **states),
        wrong(where, "scale", -3.0, ValueError, name, "scale=-3.0", "invert", **states),
        wrong(where, "scale", torch.tensor(-3.0), ValueError, name, "scale=-3.0", "invert", **states),
        wrong(where, "scale", math.nan, ValueError, name, "scale=nan", "schedule", **states),
        wrong(where, "scale", 401.0, ValueError, name, "scale=401.0", "s_max=400.0", **states),
        wrong(where, "scale", torch.tensor(401.0), ValueError, name, "401", "s_max=400.0", **states),
        wrong(where, "scale", "big", TypeError, name, "scale='big'", "number", "None", **states),
        wrong(where, "scale", torch.ones(16), ValueError, name, "(16,)", "one number", **states),
    )
]  # fmt: skip

words = nn.Sequential(nn.Embedding(7, 16), nn.Flatten(), nn.Linear(32, 3))
reader = learner(words, torch.tensor([[1, 2]]), head="2")

CASES = [*STATE, *STACKED, *TASK, *SCALE, *[
    wrong("HAT.init", "seed", -1, ValueError, "init", "seed=-1", "at least 0", "seed=1"),
    wrong("HAT.init", "seed", None, TypeError, "init", "NoneType", "seed=0"),
    wrong("HAT.init", "seed", 2**80, ValueError, "init", "2**63"),
    # begin
    wrong("HAT.begin", "task", torch.tensor([0, 1]), TypeError, "begin", "Tensor", "int"),
    wrong("HAT.begin", "task", [1, 0], ValueError, "begin", "[1, 0]", "ascending", "task=[0, 1]"),
    wrong("HAT.begin", "task", [0, 0], ValueError, "begin", "each once", "task=[0]"),
    wrong("HAT.begin", "task", [], ValueError, "begin", "task=[]", "task=0"),
    wrong("HAT.begin", "locked", [0, 2], ValueError, "begin", "task 2", "locked=[0]"),
    wrong("HAT.begin", "locked", 1, TypeError, "begin", "locked=1", "list", "[0, 1]"),
    wrong("HAT.begin", "locked", [5], ValueError, "begin", "task=5", "0 to 2"),
    wrong("HAT.begin", "locked", [None], TypeError, "begin", "task=None", "int"),
    wrong("HAT.begin", "carry", True, ValueError, "begin", "carry=True", "optimizer state", "2 tasks", "carry=False", task=[0, 2]),
    wrong("HAT.begin", "init_from", 0, ValueError, "begin", "task 0", "never learned"),
    wrong("HAT.begin", "init_from", 2, ValueError, "begin", "task 2", "itself"),
    wrong("HAT.begin", "init_from", "best", ValueError, "begin", "'best'", "similar"),
    wrong("HAT.begin", "init_from", 1, ValueError, "begin", "init_from=1", "single task", task=[0, 2]),
    wrong("HAT.begin", "init_from", 1.0, TypeError, "begin", "1.0", "float"),
    wrong("HAT.begin", "batch", None, ValueError, "begin", "without data", "batch=(x, y)", init_from="similar"),
    wrong("HAT.begin", "batch", X, TypeError, "Tensor", "pair", "(x, y)", init_from="similar"),
    wrong("Replicas.begin", "locked", 1, TypeError, "begin", "locked=1", "[0, 1]"),
    wrong("Replicas.begin", "carry", True, ValueError, "begin", "carry=True", "optimizer state", task=[0, 2]),
    wrong("Replicas.begin", "init_from", 0, ValueError, "begin", "task 0", "never learned"),
    wrong("Replicas.begin", "batch", (XS[:2], YS[:2]), ValueError, "begin", "(2, 8, 5)", "3 replicas", "(S, B, ...)", init_from="similar"),
    wrong("Replicas.begin", "batch", X, TypeError, "begin", "Tensor", "pair", init_from="similar"),
    # update
    wrong("HAT.update", "task", 0, ValueError, "update", "task 0 is not open", "[1]", "hat.begin(state, 0)"),
    wrong("HAT.update", "task", [1, 2], ValueError, "update", "not open", "hat.begin(state, [1, 2])"),
    wrong("HAT.update", "task", 1, ValueError, "update", "[0, 1] were opened together", "task=[0, 1]", state=HAT.begin(START, [0, 1])),
    wrong("HAT.update", "state", LEARNED, ValueError, "update", "none", "hat.begin(state, 1)"),
    wrong("cross_entropy", "output", {"logits": None}, TypeError, "reads no logits", "build(loss="),
    wrong("HAT.update", "batch", (X, Y + 1), ValueError, "update", "labels from", "to 2", "2 classes", "0 to 1", "y - first_class") ,
    wrong("HAT.update", "batch", (X, Y - 1), ValueError, "labels from -1", "0 to 1"),
    wrong("HAT.update", "batch", (X, Y.int()), TypeError, "int32", "int64", "y.long()"),
    wrong("HAT.update", "batch", (X, Y.float()), TypeError, "float32", "int64", "y.long()"),
    wrong("HAT.update", "batch", (X, Y[:3]), ValueError, "8 samples", "(3,)"),
    wrong("HAT.update", "batch", X, TypeError, "update", "Tensor", "pair", "(x, y)"),
    wrong("HAT.update", "batch", (X.numpy(), Y.numpy()), TypeError, "ndarray", "as_tensor"),
    wrong("HAT.update", "batch", (X[:0], Y[:0]), ValueError, "update", "empty", "at least one"),
    wrong("HAT.update", "batch", (X[:, :4], Y), ValueError, "(8, 4)", "(B, 5)"),
    wrong("HAT.update", "batch", (X.long(), Y), TypeError, "int64", "x.to(torch.float32)"),
    wrong("HAT.update", "batch", BATCH, ValueError, "update", "(8, 5)", "2 tasks", "torch.stack(xs)", state=HAT.begin(START, [0, 1]), task=[0, 1]),
    wrong("HAT.update", "scale", True, TypeError, "update", "scale=True", "number"),
    wrong("Replicas.update", "batch", BATCH, ValueError, "update", "(8, 5)", "3 replicas", "shared=True", shared=False),
    wrong("Replicas.update", "batch", (XS, YS + 1), ValueError, "update", "labels from", "0 to 1"),
    wrong("Replicas.update", "batch", (XS[..., :4], YS), ValueError, "(8, 4)", "(B, 5)"),
    wrong("Replicas.update", "task", 0, ValueError, "update", "task 0 is not open", "[1]"),
    wrong("Replicas.update", "scale", torch.tensor([1.0, 1.0, -1.0]), ValueError, "update", "scale=-1.0", "invert"),
    wrong("Replicas.forward", "scale", torch.tensor([1.0, 401.0, 1.0]), ValueError, "forward", "401.0", states=OPENED),
    # recalibrate, consolidate
    wrong("replica", "states", LEARNED, ValueError, "replica", "axis in front", "hatfn.stack"),
    wrong("replica", "index", 3, ValueError, "replica", "index=3", "from 0 to 2"),
    wrong("replica", "index", -1, ValueError, "replica", "index=-1", "from 0 to 2"),
    wrong("replica", "index", 0.0, TypeError, "replica", "index=0.0", "int"),
    wrong("stack", "states", LEARNED, TypeError, "stack", "a list of states"),
    wrong("stack", "states", [], ValueError, "stack", "0 states", "at least one"),
    wrong("stack", "states", [LEARNED, 1], TypeError, "stack", "int", "a list of states"),
    wrong("HAT.consolidate", "batches", [X], TypeError, "consolidate", "Tensor", "(x, y)"),
    wrong("HAT.consolidate", "batches", X, TypeError, "consolidate", "Tensor", "[(x, y)]"),
    wrong("HAT.consolidate", "batches", [(X, Y + 3)], ValueError, "consolidate", "labels from 3"),
    wrong("Replicas.consolidate", "batches", [BATCH], ValueError, "consolidate", "(8, 5)", "3 replicas"),
    wrong("Replicas.consolidate", "batches", X, TypeError, "consolidate", "Tensor", "[(x, y)]"),
    wrong("HAT.recalibrate", "state", LEARNED, ValueError, "recalibrate", "task 1 is not open"),
    wrong("HAT.recalibrate", "batches", X, TypeError, "recalibrate", "Tensor", "[x]"),
    wrong("HAT.recalibrate", "batches", None, TypeError, "recalibrate", "None", "[x]"),
    wrong("HAT.recalibrate", "batches", [], ValueError, "recalibrate", "no batch", "a list of inputs"),
    wrong("HAT.recalibrate", "batches", [(X, Y, Y)], TypeError, "recalibrate", "tuple", "(x, y)"),
    wrong("HAT.recalibrate", "batches", ["x"], TypeError, "recalibrate", "str", "tensor"),
    wrong("HAT.recalibrate", "batches", [X[0]], ValueError, "recalibrate", "(5,)", "(B, 5)"),
    wrong("Replicas.recalibrate", "batches", [X], ValueError, "recalibrate", "(8, 5)", "3 replicas", "shared=True", shared=False),
    wrong("Replicas.recalibrate", "batches", [XS, XS[:2]], ValueError, "recalibrate", "(2, 8, 5)", "3 replicas"),
    wrong("Replicas.recalibrate", "batches", X, TypeError, "recalibrate", "Tensor", "[x]"),
    wrong("Replicas.recalibrate", "task", 0, ValueError, "recalibrate", "task 0 is not open"),
    # forward, predict
    wrong("HAT.forward", "state", OPEN, ValueError, "forward", "task 1", "open for training", "hat.consolidate(state, 1)", "scale"),
    wrong("HAT.forward", "x", X[0], ValueError, "forward", "(5,)", "(B, 5)", "x[None]"),
    wrong("HAT.forward", "x", X[:, :4], ValueError, "(8, 4)", "(B, 5)", "traced"),
    wrong("HAT.forward", "x", X.tolist(), TypeError, "forward", "list", "tensor"),
    wrong("HAT.forward", "task", [1] * 8, TypeError, "forward", "list", "(8,)", "hat.forward(state, x, task=torch.tensor([0, 1, ...]))"),
    wrong("HAT.forward", "task", torch.tensor([1, 1]), ValueError, "forward", "(2,)", "8 samples", "(8,)"),
    wrong("HAT.forward", "task", torch.ones(8), TypeError, "forward", "float32", "int64"),
    wrong("HAT.forward", "task", torch.full((8,), 7), ValueError, "forward", "task=7", "0 to 2"),
    wrong("HAT.forward", "task", torch.full((8,), -1), ValueError, "forward", "task=-1", "0 to 2"),
    wrong("HAT.forward", "task", torch.tensor([1] * 7 + [2]), ValueError, "forward", "task 2", "never learned"),
    wrong("Replicas.forward", "x", XS, ValueError, "forward", "(3, 8, 5)", "(B, 5)", shared=True),
    wrong("Replicas.forward", "shared", False, ValueError, "forward", "(8, 5)", "3 replicas"),
    wrong("Replicas.predict", "shared", False, ValueError, "predict", "(8, 5)", "3 replicas"),
    wrong("Replicas.update", "shared", True, ValueError, "update", "(3, 8, 5)", "(B, 5)"),
    wrong("Replicas.recalibrate", "shared", True, ValueError, "recalibrate", "(3, 8, 5)", "(B, 5)"),
    wrong("Replicas.forward", "x", X, ValueError, "forward", "(8, 5)", "3 replicas", "shared=True", shared=False),
    wrong("Replicas.forward", "x", X.tolist(), TypeError, "forward", "list", "tensor"),
    wrong("Replicas.forward", "x", X.tolist(), TypeError, "forward", "list", "tensor", shared=False),
    wrong("Replicas.forward", "task", 0, ValueError, "forward", "task 0", "never learned"),
    wrong("HAT.predict", "state", START, ValueError, "predict", "no tasks", "consolidate"),
    wrong("HAT.predict", "x", X[0], ValueError, "predict", "(5,)", "(B, 5)", "x[None]"),
    wrong("HAT.predict", "tasks", [1, 2], ValueError, "predict", "task 2", "never learned"),
    wrong("HAT.predict", "tasks", [1, 7], ValueError, "predict", "task=7", "0 to 2"),
    wrong("HAT.predict", "tasks", 1, TypeError, "predict", "tasks=1", "list", "[0, 1]"),
    wrong("HAT.predict", "chunk_size", 0, ValueError, "predict", "chunk_size=0", "at least 1"),
    wrong("HAT.predict", "chunk_size", "all", TypeError, "predict", "chunk_size='all'", "int"),
    wrong("Replicas.predict", "states", STATES, ValueError, "predict", "no tasks", "consolidate"),
    wrong("Replicas.predict", "x", XS[:2], ValueError, "predict", "(2, 8, 5)", "3 replicas", "shared=True", shared=False),
    wrong("Replicas.predict", "tasks", [0], ValueError, "predict", "task 0", "never learned"),
    wrong("Replicas.predict", "tasks", [9], ValueError, "predict", "task=9", "0 to 2"),
    wrong("Replicas.predict", "tasks", 1, TypeError, "predict", "tasks=1", "[0, 1]"),
    wrong("Replicas.predict", "chunk_size", 0, ValueError, "predict", "chunk_size=0", "at least 1"),
    # the life of a task
    wrong("HAT.forget", "task", [0, 3], ValueError, "forget", "task=3", "3 tasks"),
    wrong("HAT.forget", "locked", [0, 1], ValueError, "forget", "task 1", "locked=[0]"),
    wrong("HAT.forget", "locked", "0", TypeError, "forget", "locked='0'", "[0, 1]"),
    wrong("HAT.prune", "keep", "1", TypeError, "prune", "'1'", "int"),
    wrong("HAT.prune", "keep", 3, ValueError, "prune", "task=3", "0 to 2"),
    wrong("HAT.prune", "keep", None, TypeError, "prune", "None", "int"),
    wrong("HAT.compact", "state", OPEN, ValueError, "compact", "task 1", "open for training", "hat.consolidate(state, 1)"),
    wrong("HAT.compact", "x", X[0], ValueError, "compact", "(5,)", "(B, 5)", "x[None]"),
    wrong("HAT.compact", "x", X[:, :4], ValueError, "compact", "fails on x", "(B, 5)"),
    wrong("HAT.gates", "embeddings", OPEN, TypeError, "gates", "HATState", "state.embeddings"),
    wrong("HAT.gates", "scale", -5.0, ValueError, "scale=-5.0", "invert"),
    wrong("Subnet", "x", X[0], ValueError, "Subnet", "(5,)", "(B, 5)", "x[None]"),
]]  # fmt: skip


def unreadable() -> object:
    """Slice a module that reads integers, without an input: random numbers do not work for it."""
    return reader.compact(reader.consolidate(reader.init(0), 0), 0)
