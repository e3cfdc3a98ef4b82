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
    """A process that trains with this one does not answer any more."""


class Ranks(NamedTuple):
    """Processes that each call :meth:`hatfn.HAT.update` on their own samples of a batch.

    Their gradients are averaged, sample by sample, so that all of them take the step that one process
    would take with the whole batch. Alone, nothing is averaged and nothing is copied. Running
    statistics are each process's own until :meth:`hatfn.HAT.consolidate` averages them.

    Attributes:
        rank: this process, from 0.
        size: how many there are.

    Example:
        >>> Ranks().mean({"w": torch.ones(2)}, weight=3)
        {'w': tensor([1., 1.])}
    """

    rank: int = 0
    size: int = 1

    def total(self, tree: Tree) -> Tree:
        """The sum of a tree of tensors over all processes, which get the same bits."""
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
        """The mean over all processes, each counted as often as ``weight``, its number of samples.

        Whole numbers, which count what all of them did, stay as they are.
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
        """What each process has, in their order; data, not code."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        with _answered():
            dist.all_gather_object(things, thing)
        return things

    def share(self, whole: Any) -> Any:
        """What this process does of a list, or of a tensor's rows: every so-many-eth, from its own."""
        return whole[self.rank :: self.size]

    def collect(self, own: list[Any]) -> list[Any]:
        """The list of which each process has a :meth:`share`, in order again; of no None."""
        rows = zip_longest(*self.gather(own))
        return [one for row in rows for one in row if one is not None]

    def check_same(self, state: HATState, where: str) -> None:
        """That all processes hold the same state, to the bit.

        Raises:
            RanksDifferError: they do not; the first leaf that differs is named.
        """
        if self.size == 1:
            return
        leaves: list[Tensor]
        paths, leaves, _ = optree.tree_flatten_with_path(state)  # type: ignore[arg-type]
        own = [hashlib.sha256(_bytes(leaf)).hexdigest() for leaf in leaves]
        others = self.gather(own)
        for index, (field, *path) in enumerate(paths):
            if len({one[index] for one in others}) > 1:
                name = "/".join(map(str, (HATState._fields[field], *path)))
                odd = [rank for rank, one in enumerate(others) if one[index] != others[0][index]]
                raise RanksDifferError(
                    f"{where}: {name} of process 0 differs from that of {odd}. All must start from "
                    f"one seed and call the same functions in the same order, with build(ranks=...)."
                )


ALONE = Ranks()
"""One process."""


def joined() -> Ranks:
    """The processes of ``torch.distributed``'s default group; this one alone if there is none.

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
    except RuntimeError as error:  # gloo and nccl each say it in their way
        raise RankLostError(
            f"a process that trains with this one is gone, or did something else: {error}"
        ) from error


def _bytes(leaf: Tensor) -> bytes:
    return leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
