"""Has this learner forgotten anything, and can it?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hatfn.learner import HAT
from hatfn.locks import exact_protection
from hatfn.state import HATState, binary_gates
from hatfn.testing.perturbation import Seen, Verification, flat


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
    seen = Seen(list(hat.wiring.shared))
    seen.input_seen = True
    for task in tasks:
        others = _noise_elsewhere(state, task, generator)

        def run(shared: Mapping[str, Tensor], task: int = task, base: HATState = others) -> Tensor:
            changed = base._replace(params={**base.params, **shared})
            return flat(hat.forward(changed, x, task))

        if not torch.equal(run({}), flat(hat.forward(state, x, task))):
            raise AssertionError(f"verify_no_forgetting: task {task} reads the parameters of another.")
        seen.look(run, state.params, held, generator)
    return seen.verdict("verify_no_forgetting")


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
