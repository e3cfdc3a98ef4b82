"""Leaks known in the wild, each caught and named; test_certificate.py has the same of hatfn's own paths.

The learners here are plain PyTorch in the manner of the libraries: modules and optimisers that train in
place, and locks on gradients. Each has a mend beside it that is not caught, so that it is the leak
that is caught, and nothing else of the re-creation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hatfn.testing import verify_no_forgetting

X, Y = torch.randn(16, 5), torch.randint(3, (2, 16))
ON = torch.tensor([[1.0, 0.0] * 4, [0.0, 1.0, 1.0, 1.0] * 2])
"""Units of each task."""


class Hidden(nn.Module):
    """A hidden layer under a mask for each task, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in ON)
        self.register_buffer("masks", ON.clone())

    def gate(self, task: int) -> Tensor:
        return self.masks[task]

    def used(self, task: int) -> Tensor:
        """Units that earlier tasks use, from 0 to 1."""
        return torch.stack([self.gate(earlier) for earlier in range(task)]).amax(0)

    def features(self, x: Tensor, task: int) -> Tensor:
        return self.layer(x).tanh() * self.gate(task)

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.features(x, task))

    def locked(self) -> list[nn.Parameter]:
        """Parameters whose rows are units."""
        return [self.layer.weight, self.layer.bias]


class Library:
    """Trains a module in place, and masks the gradients of what earlier tasks use."""

    def __init__(
        self, net: Hidden, make_optimizer: Callable[..., Any] = torch.optim.SGD, **settings: Any
    ):
        self.net, self.optimizer = net, make_optimizer(net.parameters(), **{"lr": 0.1} | settings)

    def learn(self, task: int, steps: int = 3, training: bool = True) -> dict[str, Tensor]:
        self.net.train(training)
        for _ in range(steps):
            self.optimizer.zero_grad()
            cross_entropy(self.net(X, task), Y[task]).backward()
            if task:
                self.lock(self.net.used(task).detach())
            self.optimizer.step()
        return self.state()

    def lock(self, used: Tensor) -> None:
        for param in self.net.locked():
            param.grad *= (1 - used).reshape(-1, *(1,) * (param.dim() - 1))

    def state(self) -> dict[str, Tensor]:
        tensors = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def forward(self, state: dict[str, Tensor], x: Tensor, task: int) -> Tensor:
        return functional_call(self.net.eval(), state, (x, task), strict=True)


def sequence(library: Library) -> tuple[Library, dict[str, Tensor], dict[str, Tensor]]:
    """The learner, its state when task 0 was learned, and the one after task 1."""
    return library, library.learn(0), library.learn(1)


class HeldUpdates(Library):
    """What is locked is put back after the step: whatever the optimiser makes of no gradient."""

    def learn(self, task: int, steps: int = 3, training: bool = True) -> dict[str, Tensor]:
        for _ in range(steps):
            before = [param.detach().clone() for param in self.net.locked()]
            super().learn(task, 1, training)
            used = self.net.used(task) if task else torch.zeros(8)
            with torch.no_grad():
                for param, old in zip(self.net.locked(), before, strict=True):
                    param.copy_(
                        torch.where(used.reshape(-1, *(1,) * (param.dim() - 1)) > 0, old, param)
                    )
        return self.state()


class SharedNorm(Hidden):
    """A batch norm whose statistics all tasks share."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(8, affine=False) for _ in range(1 + own))

    def features(self, x: Tensor, task: int) -> Tensor:
        norm = self.norms[task % len(self.norms)]
        return norm(self.layer(x)).tanh() * self.gate(task)


class Residual(Hidden):
    """A residual block whose shortcut was not made a masked layer."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 8, 3, stride=2, padding=1)
        self.downsample, self.masked = nn.Conv1d(1, 8, 1, stride=2, bias=False), masked

    def features(self, x: Tensor, task: int) -> Tensor:
        gate = self.gate(task)[:, None]
        short = self.downsample(x[:, None])
        return (self.layer(x[:, None]).tanh() * gate + (short * gate if self.masked else short)).mean(
            -1
        )

    def locked(self) -> list[nn.Parameter]:
        return [*super().locked(), *([self.downsample.weight] if self.masked else [])]


class Hooked(Library):
    """The lock is a hook on the module, which looks at ``training`` first."""

    def __init__(self, net: Hidden, always: bool = False) -> None:
        super().__init__(net)
        self.always = always

    def lock(self, used: Tensor) -> None:
        if self.always or self.net.training:
            super().lock(used)


class Soft(Hidden):
    """Served with the soft gates of the largest scale, and locked as far as they are open."""

    def __init__(self, s_max: float, off: float, binary: bool = False) -> None:
        super().__init__()
        self.s_max, self.binary = s_max, binary
        self.register_buffer("e", torch.where(ON > 0, 1.0, off))

    def gate(self, task: int) -> Tensor:
        return (self.e[task] > 0).float() if self.binary else torch.sigmoid(self.s_max * self.e[task])


class Tokens(Hidden):
    """A token for each task, made by expanding the first one."""

    def __init__(self, copied: bool = False) -> None:
        super().__init__()
        each = torch.randn(1, 5).expand(len(ON), 5)
        each = each.clone() if copied else each
        self.tokens = nn.ParameterList(nn.Parameter(token) for token in each.unbind())

    def features(self, x: Tensor, task: int) -> Tensor:
        return super().features(x + self.tokens[task], task)


class Cached(Hidden):
    """Binary masks of trained embeddings, made once, when they are first asked for."""

    def __init__(self, fresh: bool = False) -> None:
        super().__init__()
        self.e = nn.Parameter(ON * 2 - 1)
        self.register_buffer("masks", torch.full_like(ON, torch.nan), persistent=False)
        if fresh:
            self.register_load_state_dict_post_hook(Cached.clear)

    def clear(self, _: object = None) -> None:
        self.masks.fill_(torch.nan)

    def gate(self, task: int) -> Tensor:
        if self.masks.isnan().any():
            self.masks.copy_(self.e > 0)
        return self.masks[task]


def loaded(fresh: bool) -> tuple[Library, dict[str, Tensor], dict[str, Tensor]]:
    """One process learns task 0 and saves; another, whose network was tried out before, loads."""
    first, second = Library(Cached(fresh)), Library(Cached(fresh))
    with torch.no_grad():
        second.net.e.neg_()
    second.net(X, 0)
    before = first.learn(0)
    second.net.load_state_dict(first.net.state_dict())
    second.net(X, 0)
    return second, before, second.learn(1, training=False)


SGD, DECAY = {"momentum": 0.9}, {"weight_decay": 0.1}
LEAKS = {
    # the leak, its mend, and the leaves that must be named
    "momentum": (
        lambda: sequence(Library(Hidden(), **SGD)), lambda: sequence(HeldUpdates(Hidden(), **SGD)),
        ["layer.weight", "layer.bias"]),
    "weight decay": (
        lambda: sequence(Library(Hidden(), **DECAY)), lambda: sequence(HeldUpdates(Hidden(), **DECAY)),
        ["layer.weight", "layer.bias"]),
    "adam's moments": (
        lambda: sequence(Library(Hidden(), torch.optim.Adam)), lambda: sequence(HeldUpdates(Hidden(), torch.optim.Adam)),
        ["layer.weight", "layer.bias"]),
    "adamw": (
        lambda: sequence(Library(Hidden(), torch.optim.AdamW)), lambda: sequence(HeldUpdates(Hidden(), torch.optim.AdamW)),
        ["layer.weight", "layer.bias"]),
    "shared batch-norm statistics": (
        lambda: sequence(Library(SharedNorm())), lambda: sequence(Library(SharedNorm(own=True))),
        ["norms.0.running_mean", "norms.0.running_var"]),
    "an ungated downsample convolution": (
        lambda: sequence(Library(Residual())), lambda: sequence(Library(Residual(masked=True))),
        ["downsample.weight"]),
    "a lock that is off in eval mode": (
        lambda: in_eval_mode(Hooked(Hidden())), lambda: in_eval_mode(Hooked(Hidden(), always=True)),
        ["layer.weight", "layer.bias"]),
    "soft gates at 10": (
        lambda: sequence(Library(Soft(10.0, off=-1.0))), lambda: sequence(Library(Soft(10.0, off=-1.0, binary=True))),
        ["layer.weight", "layer.bias"]),
    "soft gates at 100, units just below zero": (
        lambda: sequence(Library(Soft(100.0, off=-0.02))),
        lambda: sequence(Library(Soft(100.0, off=-0.02, binary=True))),
        ["layer.weight", "layer.bias"]),
    "tokens of one storage": (
        lambda: sequence(Library(Tokens())), lambda: sequence(Library(Tokens(copied=True))), ["tokens.0"]),
    "masks cached across a load": (lambda: loaded(fresh=False), lambda: loaded(fresh=True),
        ["masks", "layer.weight", "layer.bias"]),  # the stale masks lock the wrong units, too
}  # fmt: skip


def in_eval_mode(library: Library) -> tuple[Library, dict[str, Tensor], dict[str, Tensor]]:
    """Tuned in eval mode, as where running statistics must not move."""
    return library, library.learn(0), library.learn(1, training=False)


@pytest.mark.parametrize("leak", LEAKS)
def test_a_known_leak_is_caught_and_named(leak: str) -> None:
    leaky, mended, names = LEAKS[leak]
    library, before, later = leaky()
    with pytest.raises(AssertionError, match="task 0 moved by") as caught:
        verify_no_forgetting(library, before, X, later, tasks=[0])
    named = {name for name in before if f"state['{name}'] alone by" in str(caught.value)}
    assert named == {*names}
    library, before, later = mended()
    seen = verify_no_forgetting(library, before, X, later, tasks=[0])
    assert "state['heads.1.weight']" in seen.tested
