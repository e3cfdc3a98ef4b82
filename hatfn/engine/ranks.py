"""The processes that train one learner together, each on its share of every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch import distributed as dist

from hatfn.numerics.trees import Tree
from hatfn.state import HATState

__all__ = ["ALONE", "RankLostError", "Ranks", "RanksDifferError", "joined"]


class RanksDifferError(RuntimeError):
    """Processes that train together hold different states."""


class RankLostError(RuntimeError):
    """A process that trains together with this one does not answer."""


class Ranks(NamedTuple):
    """Processes that each call :meth:`hatfn.HAT.update` on their own samples of a batch.

    Their gradients are averaged over all samples, so that each process takes the step that one process
    would take with the whole batch. A single process averages nothing and copies nothing. Every process
    has its own running statistics until :meth:`hatfn.HAT.consolidate` averages them.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.

    Example:
        >>> Ranks().mean({"w": torch.ones(2)}, weight=3)
        {'w': tensor([1., 1.])}
    """

    rank: int = 0
    size: int = 1

    def total(self, tree: Tree) -> Tree:
        """The sum of a tree of tensors over all processes; every process gets the same bits."""
        if self.size == 1:
            return tree
        leaves, structure = optree.tree_flatten(tree)
        sums: list[Tensor] = list(leaves)
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
            flat = torch.cat([leaves[i].detach().flatten() for i in places])
            with _answered():
                dist.all_reduce(flat)
            parts = flat.split([leaves[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                sums[i] = part.view_as(leaves[i])
        return optree.tree_unflatten(structure, sums)

    def mean(self, tree: Tree, weight: int) -> Tree:
        """The mean of a tree of tensors over all processes, weighted by their numbers of samples.

        Integer tensors stay as they are: they count steps that all processes take together.

        Args:
            tree: tensors.
            weight: the number of samples of this process.
        """
        leaves, structure = optree.tree_flatten(tree)
        if self.size == 1 or not leaves:
            return tree
        whole = self.total(torch.tensor(weight, dtype=torch.float64, device=leaves[0].device))
        places = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
        shares = [leaves[i] * (weight / whole).to(leaves[i].dtype) for i in places]
        for i, mean in zip(places, self.total(shares), strict=True):
            leaves[i] = mean
        return optree.tree_unflatten(structure, leaves)

    def gather(self, thing: Any) -> list[Any]:
        """A list of the thing that each process passes, in the order of ranks; it must be data."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        with _answered():
            dist.all_gather_object(things, thing)
        return things

    def share(self, whole: Any) -> Any:
        """The share of this process in a list or in a tensor's rows: every ``size``-th one."""
        return whole[self.rank :: self.size]

    def collect(self, own: list[Any]) -> list[Any]:
        """Merge the per-process shares back into one list, in the original order.

        Items must not be None.
        """
        rows = zip_longest(*self.gather(own))
        return [one for row in rows for one in row if one is not None]

    def check_same(self, state: HATState, where: str) -> None:
        """Check that all processes hold the same state, to the bit.

        Raises:
            RanksDifferError: they do not; the message names the first leaf that differs.
        """
        if self.size == 1:
            return
        leaves: list[Tensor]
        paths, leaves, _ = optree.tree_flatten_with_path(state)  # type: ignore[arg-type]
        digests = self.gather([hashlib.sha256(_bytes(leaf)).hexdigest() for leaf in leaves])
        for index, (field, *path) in enumerate(paths):
            if len({one[index] for one in digests}) > 1:
                name = "/".join(map(str, (HATState._fields[field], *path)))
                odd = [rank for rank, one in enumerate(digests) if one[index] != digests[0][index]]
                raise RanksDifferError(
                    f"{where}: {name} of process 0 differs from that of {odd}. Expected equal states: "
                    f"start all processes from one seed, and call the same functions in the same "
                    f"order, with build(ranks=...)."
                )


ALONE = Ranks()
"""One process."""


def joined() -> Ranks:
    """The processes of ``torch.distributed``'s default group; only this process if there is no group.

    Example:
        >>> joined()
        Ranks(rank=0, size=1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and nccl use different words
        raise RankLostError(
            f"a process that trains together with this one has ended, or called another function: "
            f"{error}"
        ) from error


def _bytes(leaf: Tensor) -> bytes:
    return leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
