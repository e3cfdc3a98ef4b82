"""Is this wiring sound?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hatfn.checks.batches import check_input
from hatfn.checks.settings import check_wiring
from hatfn.checks.values import check_count, check_seed
from hatfn.method.protection import exact_protection
from hatfn.network.call import call
from hatfn.network.copies import copied
from hatfn.network.network import make_network
from hatfn.network.probe import lively
from hatfn.numerics.arguments import Inputs
from hatfn.tracing.perturbation import Seen, Verification, another, flat
from hatfn.wiring import Wiring


def verify_wiring(
    module: nn.Module, wiring: Wiring, x: Any, seed: int = 0, draws: int = 3
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
        TypeError, ValueError: a wiring of another module, an input that does not fit, a wrong seed or
            number of draws.

    Example:
        >>> import hatfn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(2, 4)
        >>> verify_wiring(net, hatfn.trace(net, x, head="2"), x).untested
        ()
    """
    check_wiring(module, wiring, "verify_wiring")
    inputs = check_input("verify_wiring", x, wiring)
    check_count("verify_wiring", "draws", draws)
    generator = torch.Generator().manual_seed(check_seed("verify_wiring", seed))
    network = make_network(copied(module, False, _double), wiring, None)
    drawn = {n: v for n, v in network.initial.items() if n not in network.constants}
    network = network._replace(initial=network.initial | lively(drawn, generator))
    inputs = Inputs(*(tuple(map(_double, part)) for part in inputs))
    other = inputs.map(lambda value: another(value, generator))
    buffers = {name: network.initial[name] for name in wiring.buffers}
    params = {name: network.initial[name] for name in wiring.params}
    seen = Seen(list(wiring.shared))
    for _ in range(draws):
        masks = {g: _half(units, generator).to(inputs.device) for g, units in wiring.groups.items()}
        held = exact_protection(
            network.wiring,
            {g: m[None] for g, m in masks.items()},
            torch.tensor([True], device=inputs.device),
        )

        def run(
            shared: Mapping[str, Tensor], x: Inputs = inputs, masks: dict[str, Tensor] = masks
        ) -> Tensor:
            return flat(call(network, network.evaluate, {**params, **shared}, buffers, masks, x)[0])

        seen.input_seen |= not torch.equal(run({}), run({}, other))
        seen.look(run, {name: params[name] for name in wiring.shared}, held, generator)
    return seen.verdict("verify_wiring")


def _double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    value = tensor.detach().double()
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


def _half(units: int, generator: torch.Generator) -> Tensor:
    """A mask with half of the units on, and at least one."""
    return torch.randperm(units, generator=generator) < (units + 1) // 2
