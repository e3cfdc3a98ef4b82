"""Wrong calls of functions that read states: inference, evaluation, export, metrics, files, verifiers."""

from __future__ import annotations

import math

import numpy as np
import torch
from wrong import (
    BATCH,
    CLOSED,
    FILE,
    HAT,
    IMAGES,
    LEARNED,
    LOGITS,
    MAPPED,
    MAPS,
    MATRIX,
    MODULE,
    OPEN,
    ROW,
    ROWS,
    START,
    WIRING,
    X,
    Y,
    wrong,
)  # fmt: skip

import hatfn
from hatfn.models import MLP

LEARNERS = [
    case
    for where, state in (
        ("export", LEARNED), ("readiness", OPEN), ("similarity", LEARNED), ("infer_task_by_gradient", LEARNED),
        ("evaluate", LEARNED),
    )
    for case in (
        wrong(where, "hat", MODULE, TypeError, where, "MLP", "hatfn.build"),
        wrong(where, "hat", state, TypeError, where, "HATState", "hatfn.build"),
        wrong(where, "state", (state, None), TypeError, where, "tuple", "hat.init(seed=0)"),
        *([] if where == "evaluate" else [wrong(where, "state", CLOSED, ValueError, where, "(3, 3)", "replica(states, i)")]),
    )
]  # fmt: skip
STATES = [
    case
    for where in ("usage", "overlap", "free_weights")
    for case in (
        wrong(where, "state", None, TypeError, where, "NoneType", "HATState"),
        wrong(where, "state", hatfn.stack([CLOSED, CLOSED]), ValueError, where, "(2, 3, 3)"),
        wrong(where, "wiring", HAT, TypeError, where, "HAT", "hat.wiring"),
    )
]
SQUARES = [
    wrong(where, "matrix", MATRIX[:2], ValueError, where, "(2, 3)", "(T, T)")
    for where in ("average_accuracy", "backward_transfer", "forgetting", "forward_transfer")
]

CASES = [*LEARNERS, *STATES, *SQUARES, *[
    wrong("export", "state", OPEN, ValueError, "export", "task 1", "open for training", "hat.consolidate(state, 1)"),
    wrong("export", "task", 4, ValueError, "export", "task=4", "0 to 2"),
    wrong("export", "task", [1], TypeError, "export", "task=[1]", "list", "task=0"),
    wrong("export", "task", None, TypeError, "export", "task=None", "int"),
    wrong("export", "x", X[0], ValueError, "export", "(5,)", "(B, 5)", "x[None]", compact=True),
    wrong("readiness", "batches", [], ValueError, "readiness", "no batch", "(x, y)"),
    wrong("readiness", "batches", BATCH, TypeError, "readiness", "Tensor", "pair"),
    wrong("readiness", "batches", X, TypeError, "readiness", "Tensor", "[(x, y)]"),
    wrong("readiness", "batches", [(X, Y + 1)], ValueError, "readiness", "labels from", "0 to 1"),
    wrong("readiness", "task", 3, ValueError, "readiness", "task=3", "0 to 2"),
    wrong("readiness", "task", None, TypeError, "readiness", "task=None", "int"),
    wrong("readiness", "scale", -1.0, ValueError, "readiness", "scale=-1.0", "invert"),
    wrong("readiness", "scale", 401.0, ValueError, "readiness", "scale=401.0", "s_max=400.0"),
    wrong("readiness", "tolerance", 0.7, ValueError, "readiness", "tolerance=0.7", "between 0 and 0.5"),
    wrong("readiness", "tolerance", "low", TypeError, "readiness", "tolerance='low'", "number"),
    wrong("similarity", "state", START, ValueError, "similarity", "no tasks", "consolidate"),
    wrong("similarity", "batch", X, TypeError, "similarity", "Tensor", "pair"),
    wrong("similarity", "batch", (X[:1], Y[:1]), TypeError, "similarity", "(1,)", "two samples"),
    wrong("similarity", "batch", (X, torch.ones(8, 2)), TypeError, "similarity", "(8, 2)", "int64"),
    wrong("similarity", "tasks", [0], ValueError, "similarity", "task 0", "never learned"),
    wrong("similarity", "tasks", 1, TypeError, "similarity", "tasks=1", "[0, 1]"),
    # which task?
    wrong("infer_task", "method", "margin", ValueError, "infer_task", "'margin'", "'energy'"),
    wrong("infer_task", "method", ["max"], ValueError, "infer_task", "['max']", "'energy'"),
    wrong("infer_task", "logits", LOGITS[0], ValueError, "infer_task", "(8, 3)", "(T, B, C)", "logits[None]"),
    wrong("infer_task", "logits", LOGITS[:0], ValueError, "infer_task", "(0, 8, 3)"),
    wrong("infer_task", "logits", (LOGITS, LOGITS), TypeError, "infer_task", "tuple", "logits[0]"),
    wrong("infer_task", "logits", LOGITS.long(), TypeError, "infer_task", "int64", "logits.float()"),
    wrong("infer_task", "logits", LOGITS.index_fill(0, torch.tensor(1), -math.inf), ValueError,
          "infer_task", "all -inf", "finite"),
    wrong("infer_task", "logits", LOGITS * math.nan, ValueError, "infer_task", "nan", method="entropy"),
    wrong("classify", "logits", LOGITS[0], ValueError, "classify", "(8, 3)", "(T, B, C)"),
    wrong("classify", "rows", ROWS.float(), TypeError, "classify", "float32", "infer_task(logits)"),
    wrong("classify", "rows", ROWS[:3], ValueError, "classify", "(3,)", "(8,)"),
    wrong("classify", "rows", ROWS + 1, ValueError, "classify", "[1, 2]", "from 0 to 1"),
    wrong("classify", "offsets", [0], ValueError, "classify", "1 offsets", "2 rows"),
    wrong("classify", "offsets", 3, TypeError, "classify", "offsets=3", "[0, 2]"),
    wrong("classify", "offsets", [0, 0.5], ValueError, "classify", "[0, 0.5]", "int"),
    wrong("infer_task_by_gradient", "per", "task", ValueError, "infer_task_by_gradient", "per='task'", "'sample'", "'batch'"),
    wrong("infer_task_by_gradient", "x", X[0], ValueError, "infer_task_by_gradient", "(5,)", "(B, 5)"),
    wrong("infer_task_by_gradient", "tasks", [0, 1], ValueError, "infer_task_by_gradient", "task 0", "never learned"),
    wrong("infer_task_by_gradient", "tasks", 1, TypeError, "infer_task_by_gradient", "tasks=1", "[0, 1]"),
    wrong("infer_task_by_gradient", "state", START, ValueError, "infer_task_by_gradient", "no tasks", "consolidate"),
    wrong("infer_task_by_gradient", "hat", MAPS, ValueError, "infer_task_by_gradient", "(2, 1, 8, 8)", "(B, classes)",
          state=MAPPED, x=IMAGES),
    wrong("evaluate", "loaders", iter([BATCH]), TypeError,
          "evaluate", "list_iterator", "one for each task", "[loader_0, loader_1, ...]"),
    wrong("evaluate", "metrics", [{}], ValueError, "evaluate", "1 metrics for 3 tasks", "one for each"),
    wrong("evaluate", "metrics", {"f1": "macro"}, TypeError, "evaluate", "'f1'", "'macro'", "torchmetrics"),
    wrong("evaluate", "metrics", [3, 3, 3], TypeError, "evaluate", "metrics[0]", "int", "dict"),
    wrong("evaluate", "loaders", [[BATCH]] * 2, ValueError, "evaluate", "2 loaders", "3 tasks"),
    wrong("evaluate", "loaders", [[BATCH]] * 4, ValueError, "evaluate", "4 loaders", "3 tasks"),
    wrong("evaluate", "loaders", [[], [], []], ValueError, "evaluate", "loader 1", "no batch"),
    wrong("evaluate", "loaders", [[], [X], []], TypeError, "evaluate, loader 1", "Tensor", "pair", "(x, y)"),
    wrong("evaluate", "loaders", [[], [(X, Y[:3])], []], ValueError, "evaluate, loader 1", "8 samples", "(3,)"),
    wrong("evaluate", "loaders", [[], [(X, Y + 3)], []], ValueError,
          "evaluate, loader 1", "labels from", "0 to 1", "counted within the task"),
    wrong("evaluate", "loaders", [[], [(X, torch.ones(8, 2))], []], TypeError, "evaluate, loader 1", "(8, 2)", "float32", "int64"),
    wrong("evaluate", "method", "margin", ValueError, "'margin'", "'max'"),
    wrong("evaluate", "chunk_size", 0, ValueError, "chunk_size=0", "at least 1"),
    wrong("evaluate", "hat", MAPS, ValueError, "evaluate", "(1, 2, 1, 8, 8)", "(T, B, C)",
          state=MAPPED, loaders=[[(IMAGES, Y[:2])]]),
    # numbers
    wrong("memory", "state", None, TypeError, "memory", "NoneType", "HATState"),
    wrong("accuracy", "labels", Y[:1], ValueError, "accuracy", "(1,)", "(8,)"),
    wrong("drift", "after", X[:1], ValueError, "drift", "(1, 5)", "(8, 5)"),
    wrong("average_accuracy", "matrix", ROW, ValueError, "average_accuracy", "(3,)", "(T, T)"),
    wrong("average_accuracy", "matrix", np.ones((0, 0)), ValueError, "average_accuracy", "(0, 0)"),
    wrong("forward_transfer", "reference", ROW[:1], ValueError, "forward_transfer", "(1,)", "(3,)"),
    wrong("forgetting_ratio", "chance", ROW[:1], ValueError, "forgetting_ratio", "chance", "(1,)", "(3,)"),
    wrong("forgetting_ratio", "joint", ROW[:1], ValueError, "forgetting_ratio", "joint", "(1,)", "(3,)"),
    # files
    wrong("save", "path", FILE, FileNotFoundError, "no such folder", "could not be written", "folder that exists"),
    wrong("save", "path", None, TypeError, "save", "path", "NoneType"),
    wrong("save", "state", None, TypeError, "save", "NoneType", "hat.init(seed=0)"),
    wrong("save", "state", CLOSED, ValueError, "save", "(3, 3)", "replica(states, i)"),
    wrong("save", "state", CLOSED, ValueError, "save", "(3, 3)", "replica(states, i)", hat=WIRING),
    wrong("save", "hat", MODULE, TypeError, "save", "MLP", "build()", "wiring"),
    wrong("save", "meta", {"x": X}, TypeError, "save", "meta", "JSON", "Tensor"),
    wrong("save", "meta", 3, TypeError, "save", "meta", "int", "dict"),
    wrong("load", "path", FILE, hatfn.CheckpointError, "load", "no such folder", "No such file"),
    wrong("read_meta", "path", FILE, hatfn.CheckpointError, "load", "no such folder", "No such file"),
    wrong("load", "hyper", "mine", ValueError, "load", "hyper='mine'", "'file', 'learner'"),
    wrong("load", "path", None, TypeError, "load", "path", "NoneType"),
    wrong("load", "hat", MODULE, TypeError, "load", "MLP", "build()", "wiring"),
    # verifiers
    wrong("verify_wiring", "module", None, TypeError, "verify_wiring", "NoneType", "nn.Module"),
    wrong("verify_wiring", "module", MLP(5, 3, width=8), ValueError, "verify_wiring", "another module", "(3, 8)"),
    wrong("verify_wiring", "wiring", None, TypeError, "verify_wiring", "NoneType", "hatfn.trace"),
    wrong("verify_wiring", "x", X[0], ValueError, "verify_wiring", "(5,)", "(B, 5)"),
    wrong("verify_wiring", "seed", "a", TypeError, "verify_wiring", "seed='a'", "int"),
    wrong("verify_wiring", "draws", 0, ValueError, "verify_wiring", "draws=0", "at least 1"),
    wrong("verify_no_forgetting", "hat", None, TypeError, "verify_no_forgetting", "NoneType", "forward(state, x, task)"),
    wrong("verify_no_forgetting", "state", START, ValueError, "verify_no_forgetting", "no tasks", "hat.consolidate"),
    wrong("verify_no_forgetting", "state", CLOSED, ValueError, "verify_no_forgetting", "(3, 3)", "replica(states, i)"),
    wrong("verify_no_forgetting", "state", {"a": 1}, TypeError, "state['a'] is a int", "tensors", hat=torch.nn.ReLU(), later={}, tasks=[0]),
    wrong("verify_no_forgetting", "x", X[0], ValueError, "(5,)", "(B, 5)"),
    wrong("verify_no_forgetting", "later", (OPEN, None), TypeError, "verify_no_forgetting", "tuple"),
    wrong("verify_no_forgetting", "later", None, ValueError, "verify_no_forgetting", "later=None", "(learner, state, x, later, [0])",
          hat=torch.nn.ReLU()),
    wrong("verify_no_forgetting", "tasks", [0], ValueError, "verify_no_forgetting", "task 0", "never learned"),
    wrong("verify_no_forgetting", "tasks", 1, TypeError, "verify_no_forgetting", "tasks=1", "[0, 1]"),
    wrong("verify_no_forgetting", "seed", -1, ValueError, "verify_no_forgetting", "seed=-1", "at least 0"),
]]  # fmt: skip
