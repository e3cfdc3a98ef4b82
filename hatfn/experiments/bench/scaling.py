"""Formulas for the memory of a learner: bytes of its state and of a step, from counts of numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hatfn.learner import HAT
from hatfn.numerics.zeros import PIECE

OPTIMIZERS = {"sgd": (0, 3), "momentum": (1, 4), "adam": (2, 6)}
"""m and k of each optimizer of TorchOpt.

m: the moments of each trained number. k: the numbers that a step holds for each trained number.
"""


class Size(NamedTuple):
    """How many numbers a learner of T tasks has.

    Attributes:
        shared: P, shared weights.
        own: Q, parameters of one task that it does not share: norms, a head.
        units: U, units with a gate.
        statistics: R, running statistics of one task.
        leaf: L, the largest shared parameter.
        saved: A, numbers per sample that a step keeps for its backward pass.
        layer: D, the largest of these tensors.
    """

    shared: int
    own: int
    units: int
    statistics: int
    leaf: int
    saved: int = 0
    layer: int = 0

    def state(self, tasks: int, optimizer: str) -> int:
        """Bytes of a state between two steps: 5 P + T (4 Q + 4 R + 5 U) + 4 m (P + Q + U)."""
        moments, _ = OPTIMIZERS[optimizer]
        per_task = 4 * (self.own + self.statistics) + 5 * self.units
        trained = self.shared + self.own + self.units
        return 5 * self.shared + tasks * per_task + 4 * moments * trained

    def stacks(self, tasks: int) -> int:
        """Bytes of the values that tasks do not share, which a step copies unless it is donated."""
        return 4 * tasks * (self.own + self.units + self.statistics)

    def step(self, tasks: int, batch: int, optimizer: str) -> int:
        """The most bytes that a step of B samples holds, beside the state before it.

        max(4 k (P + Q + U) + 4 min(L, l) + 4 T (Q + U + R), 4 B (A + 2 D)). The first term is the
        update, with a piece of l numbers in the making. The second is the backward pass, which computes
        the gradient of a layer from that of the next layer.
        """
        _, k = OPTIMIZERS[optimizer]
        update = 4 * (k * (self.shared + self.own + self.units) + min(self.leaf, PIECE))
        return max(update + self.stacks(tasks), 4 * batch * (self.saved + 2 * self.layer))


def count(hat: HAT) -> Size:
    """The counts of a learner, without ``saved`` and ``layer``."""
    state = hat.init(0)
    trees = (state.task_params, state.embeddings, state.task_buffers)
    unshared, units, statistics = (sum(leaf[0].numel() for leaf in tree.values()) for tree in trees)
    shared = [leaf.numel() for leaf in state.params.values()]
    return Size(sum(shared), unshared, units, statistics, max(shared))


def count_saved(hat: HAT, x: Tensor, y: Tensor) -> Size:
    """All counts of a learner; autograd's hooks count the tensors that a step saves for a batch."""
    size, state = count(hat), hat.begin(hat.init(0), 0)
    known = {leaf.untyped_storage().data_ptr() for leaf in state.params.values()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hat.update(state, (x, y), 0, 50.0)
    per_sample = [bytes_ // 4 // len(x) for bytes_ in saved.values()]
    return size._replace(saved=sum(per_sample), layer=max(per_sample))
