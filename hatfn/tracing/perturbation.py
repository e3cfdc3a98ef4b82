"""Changes that must not show in outputs, and changes that must."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hatfn.numerics.trees import output_leaves

Run = Callable[[Mapping[str, Tensor]], Tensor]
"""From shared weights to outputs."""

MAGNITUDES = (1.0, 1e3, 1e6, 1e30)
"""What unprotected weights are replaced by: 0 * 1e30 is 0, and any leak is seen."""


class Verification(NamedTuple):
    """What a verifier saw.

    Attributes:
        leaks: {parameter: largest change of an output} for parameters whose *unprotected* entries
            reach an output; empty if the promise holds.
        tested: parameters whose *protected* entries were seen to reach an output.
        untested: parameters for which no control did; nothing is claimed about them.
        input_seen: whether outputs depend on the input at all.
    """

    leaks: dict[str, float]
    tested: tuple[str, ...]
    untested: tuple[str, ...]
    input_seen: bool


class Seen:
    """Accumulates what perturbations show."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.leaks: dict[str, float] = {}
        self.tested: set[str] = set()
        self.input_seen = False

    def look(
        self,
        run: Run,
        params: Mapping[str, Tensor],
        held: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> None:
        """Compare outputs before and after every change."""
        before = run(params)
        if not before.isfinite().all():
            raise AssertionError("the outputs are not finite before any change; nothing is proven.")
        noise = {name: _noise(value, generator) for name, value in params.items()}
        loose = {name: torch.where(held[name], params[name], noise[name]) for name in self.names}
        if not torch.equal(run(loose), before):
            for name in self.names:
                change = (run({**params, name: loose[name]}) - before).abs().max().item()
                if change != 0:
                    self.leaks[name] = max(change, self.leaks.get(name, 0.0))
            if not self.leaks:
                self.leaks["several parameters together"] = math.nan
        slopes = _slopes(run, {name: params[name] for name in self.names}, before, generator)
        for name in self.names:
            if name not in self.tested and (
                bool((torch.where(held[name], slopes[name], 0) != 0).any())
                or any(
                    not torch.equal(run({**params, name: moved}), before)
                    for moved in _moved(params[name], held[name], generator)
                )
            ):
                self.tested.add(name)

    def verdict(self, where: str) -> Verification:
        """The report, or an error if the promise does not hold."""
        if self.leaks:
            listed = ", ".join(f"{name} by {change:.3g}" for name, change in self.leaks.items())
            raise AssertionError(f"{where}: unprotected entries reach the output: {listed}.")
        if not self.input_seen:
            raise AssertionError(
                f"{where}: the output does not depend on the input; nothing is proven."
            )
        return Verification(
            self.leaks,
            tuple(name for name in self.names if name in self.tested),
            tuple(name for name in self.names if name not in self.tested),
            self.input_seen,
        )


def _noise(
    value: Tensor, generator: torch.Generator, magnitudes: tuple[float, ...] = MAGNITUDES
) -> Tensor:
    size = torch.tensor(magnitudes)[torch.randint(len(magnitudes), value.shape, generator=generator)]
    return (torch.randn(value.shape, generator=generator) * size).to(value)


def _slopes(
    run: Run, params: Mapping[str, Tensor], output: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """The derivative of a random sum of outputs: where it is not zero, a change must show.

    One backward pass for all parameters. Zeros where an operator has no derivative; what they leave
    open is tried by changing one parameter at a time.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    weights = torch.randn(output.shape, generator=generator).to(output)
    slopes: tuple[Tensor | None, ...]
    try:
        total = (run(leaves) * weights).sum()
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    except (RuntimeError, ValueError):  # call() explains what PyTorch raises as a ValueError
        slopes = (None,) * len(leaves)
    return {
        name: torch.zeros_like(leaf) if slope is None else slope.nan_to_num(0.0)
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
    }


def _moved(value: Tensor, held: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Changes of the protected entries: small ones, and large ones where an activation saturates."""
    for size in (1.0, 30.0):
        yield torch.where(held, value + _noise(value, generator, (size,)), value)


def another(x: Tensor, generator: torch.Generator) -> Tensor:
    """An input of the same shape that is another one."""
    if not x.is_floating_point():
        return x.flip(0, -1)
    return x + torch.randn(x.shape, generator=generator).to(x)


def flat(output: Any) -> Tensor:
    """All tensors of an output in one, (N,)."""
    return torch.cat([part.flatten() for part in output_leaves(output)])
