"""Test by perturbation which entries of parameters reach the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hatfn.numerics.trees import output_leaves

Run = Callable[[Mapping[str, Tensor]], Tensor]
"""A function from shared weights to all outputs, (N,)."""

MAGNITUDES = (1.0, 1e3, 1e6, 1e30)
"""The sizes of noise in unprotected weights: 0 * 1e30 is 0, so any change of an output is a leak."""


class Verification(NamedTuple):
    """The result of a test by perturbation.

    Attributes:
        leaks: {parameter: largest change of an output} for parameters whose *unprotected* entries
            reach an output; empty if the wiring is correct.
        tested: the parameters whose *protected* entries reach an output in the test.
        untested: the parameters whose protected entries do not; the test says nothing about them.
        input_seen: whether the outputs depend on the input.
    """

    leaks: dict[str, float]
    tested: tuple[str, ...]
    untested: tuple[str, ...]
    input_seen: bool


class Seen:
    """Collects the results of perturbations."""

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
        """Compare outputs before and after each change of the weights.

        Args:
            run: the function to test.
            params: {name: tensor}, the shared weights.
            held: {name: bool tensor}, their protected entries.
            generator: a CPU generator.

        Raises:
            AssertionError: the outputs are not finite.
        """
        before = run(params)
        if not before.isfinite().all():
            raise AssertionError("the outputs are not finite before any change: nothing is proven.")
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
        """The result.

        Raises:
            AssertionError: something leaks, or the output does not depend on the input.
        """
        if self.leaks:
            listed = ", ".join(f"{name} by {change:.3g}" for name, change in self.leaks.items())
            raise AssertionError(f"{where}: unprotected entries reach the output: {listed}.")
        if not self.input_seen:
            raise AssertionError(
                f"{where}: the output does not depend on the input: nothing is proven."
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
    """The derivative of a random weighted sum of outputs, from one backward pass for all parameters.

    An entry with a derivative other than zero reaches an output. If an operator has no derivative, all
    are zeros, and the caller changes one parameter at a time instead.
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
    """Changes of the protected entries: small ones, and large ones in case an activation saturates."""
    for size in (1.0, 30.0):
        yield torch.where(held, value + _noise(value, generator, (size,)), value)


def another(x: Tensor, generator: torch.Generator) -> Tensor:
    """A different input of the same shape."""
    if not x.is_floating_point():
        return x.flip(0, -1)
    return x + torch.randn(x.shape, generator=generator).to(x)


def flat(output: Any) -> Tensor:
    """All tensors of an output, flattened into one, (N,)."""
    return torch.cat([part.flatten() for part in output_leaves(output)])
