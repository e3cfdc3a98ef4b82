"""Verifiers for anyone's test suite: is this wiring sound, has this learner forgotten anything?

Each verifier also runs positive controls, changes that *must* show, so that it can fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from hatfn.forward import call, make_network
from hatfn.initial import lively
from hatfn.learner import HAT
from hatfn.locks import exact_protection
from hatfn.modules import twin
from hatfn.state import HATState, binary_gates
from hatfn.wiring import Wiring

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


def verify_wiring(
    module: nn.Module, wiring: Wiring, x: Tensor, seed: int = 0, draws: int = 3
) -> Verification:
    """Check a wiring by perturbation: what it calls unprotected must not reach the output.

    In float64, with weights drawn anew so that every layer passes signal, for several random masks
    that switch on half of each group: every unprotected entry of every shared parameter is replaced
    by noise of up to 1e30, and the outputs must stay equal to the bit. The protected entries of each
    parameter must have a say: their derivative is not zero, or changing them moves the outputs.

    Args:
        module: the one that was traced.
        wiring: of that module.
        x: (B, ...), an input.
        seed: of weights, masks and noise.
        draws: number of masks.

    Returns:
        What was seen, with nothing in ``leaks``.

    Raises:
        AssertionError: something leaks (its name and by how much), or no output depends on the input,
            so that the check would prove nothing.

    Example:
        >>> import hatfn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(2, 4)
        >>> verify_wiring(net, hatfn.trace(net, x, head="2"), x).untested
        ()
    """
    generator = torch.Generator().manual_seed(seed)
    network = make_network(twin(module, False, _double), wiring, None)
    drawn = {n: v for n, v in network.initial.items() if n not in network.constants}
    network = network._replace(initial=network.initial | lively(drawn, generator))
    x = _double(x)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    other = x + noise if x.is_floating_point() else x.flip(0, -1)
    buffers = {name: network.initial[name] for name in wiring.buffers}
    params = {name: network.initial[name] for name in wiring.params}
    seen = _Seen(list(wiring.shared))
    for _ in range(draws):
        masks = {g: _half(units, generator).to(x.device) for g, units in wiring.groups.items()}
        held = exact_protection(
            network.wiring,
            {g: m[None] for g, m in masks.items()},
            torch.tensor([True], device=x.device),
        )

        def run(
            shared: Mapping[str, Tensor], x: Tensor = x, masks: dict[str, Tensor] = masks
        ) -> Tensor:
            return _flat(call(network, network.evaluate, {**params, **shared}, buffers, masks, x)[0])

        seen.input_seen |= not torch.equal(run({}), run({}, other))
        seen.look(run, {name: params[name] for name in wiring.shared}, held, generator)
    return seen.verdict("verify_wiring")


def verify_no_forgetting(hat: HAT, state: HATState, x: Tensor, seed: int = 0) -> Verification:
    """Check a trained state: nothing that later training may change reaches a learned task.

    For every learned task that is not left out of ``locked``: every shared entry that no such task
    uses, and every other task's own parameters, statistics and embeddings, are replaced by noise;
    the task's outputs must stay equal to the bit. The protected entries of each parameter must have a
    say, as in :func:`verify_wiring`.

    Args:
        hat: the learner.
        state: with at least one learned task.
        x: (B, ...), an input.
        seed: of the noise.

    Returns:
        What was seen, with nothing in ``leaks``.

    Raises:
        AssertionError: something leaks (its name and by how much).
        ValueError: no task is learned.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = state.learned.nonzero().flatten().tolist()
    if not tasks:
        raise ValueError("verify_no_forgetting: no learned task. Train and hat.consolidate one first.")
    held = exact_protection(hat.wiring, binary_gates(state), state.learned)
    seen = _Seen(list(hat.wiring.shared))
    seen.input_seen = True
    for task in tasks:
        others = _noise_elsewhere(state, task, generator)

        def run(shared: Mapping[str, Tensor], task: int = task, base: HATState = others) -> Tensor:
            changed = base._replace(params={**base.params, **shared})
            return _flat(hat.forward(changed, x, task))

        if not torch.equal(run({}), _flat(hat.forward(state, x, task))):
            raise AssertionError(f"verify_no_forgetting: task {task} reads the parameters of another.")
        seen.look(run, state.params, held, generator)
    return seen.verdict("verify_no_forgetting")


class _Seen:
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


def _double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    value = tensor.detach().double()
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


def _half(units: int, generator: torch.Generator) -> Tensor:
    """A mask with half of the units on, and at least one."""
    return torch.randperm(units, generator=generator) < (units + 1) // 2


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


def _flat(output: Any) -> Tensor:
    parts = [leaf for leaf in optree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.cat([part.flatten() for part in parts])


def _noise_elsewhere(state: HATState, task: int, generator: torch.Generator) -> HATState:
    """The state with every other task's own values replaced by noise."""

    def shake(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        shaken = {}
        for name, leaf in tree.items():
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            shaken[name] = noise.select_scatter(leaf[task], 0, task)
        return shaken

    return state._replace(
        task_params=shake(state.task_params),
        task_buffers=shake(state.task_buffers),
        embeddings=shake(state.embeddings),
    )
