"""verify_wiring(): check by perturbation that a wiring is correct."""

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
    """Check a wiring by perturbation: unprotected entries must not reach the output.

    The check runs in float64, with new random weights that let every layer pass signal, and with random
    masks that switch on half of each group. For each mask, noise of up to 1e30 replaces all unprotected
    entries of the shared parameters, and the outputs must stay equal to the bit. As a control, the
    check records the parameters whose protected entries do reach the output: their derivative is not
    zero, or a change of them changes the outputs.

    Args:
        module: the traced module.
        wiring: the wiring of the module.
        x: (B, ...), an input.
        seed: >= 0, for weights, masks and noise.
        draws: the number of masks, >= 1.

    Returns:
        The result, with empty ``leaks``.

    Raises:
        AssertionError: an unprotected entry reaches the output (the message names its parameter and the
            change), or no output depends on the input, so that the check proves nothing.
        TypeError, ValueError: a wiring of another module; a wrong input, seed or number of draws.

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
