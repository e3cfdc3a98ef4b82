"""The optimizers that tests train with, in one table; a test file names those that it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchopt

from hatfn import from_torch
from hatfn.engine.optimizer import Optimizer

OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "sgd": lambda: torchopt.sgd(0.1),
    "momentum": lambda: torchopt.sgd(0.1, momentum=0.9),
    "decay": lambda: torchopt.sgd(0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda: torchopt.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: torchopt.adam(1e-2),
    "adam, decay": lambda: torchopt.adam(1e-2, weight_decay=0.1),
    "adamw": lambda: torchopt.adamw(1e-2, weight_decay=0.1),
    "rmsprop": lambda: torchopt.rmsprop(1e-2, momentum=0.9),
    "rmsprop, decay": lambda: torchopt.rmsprop(1e-2, momentum=0.9, weight_decay=0.1),
    "adagrad, decay": lambda: torchopt.adagrad(1e-2, weight_decay=0.1),
    "adadelta, decay": lambda: torchopt.adadelta(1.0, weight_decay=0.1),
    "torch's nadam": lambda: from_torch(torch.optim.NAdam, lr=1e-2, weight_decay=1e-2),
    "torch's fused sgd": lambda: from_torch(
        torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, fused=True
    ),
    "torch's fused adamw": lambda: from_torch(torch.optim.AdamW, lr=1e-2, fused=True),
}
