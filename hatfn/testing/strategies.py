"""Hypothesis strategies: random modules, wirings, masks, embeddings, learners, states and batches.

    from hatfn.testing import strategies as st_hat

They shrink towards few tasks, small networks without norms, and plain numbers. Every draw is built from
plain data and a seed, and a failure prints these. A draw takes milliseconds, but tracing a module of a
new kind takes a tenth of a second, so turn off the deadline: ``@settings(deadline=None)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hatfn.learner import HAT
from hatfn.state import HATState
from hatfn.testing import cases
from hatfn.testing.cases import ACTIVATIONS, KINDS, NORMS, OPTIMIZERS, Block, Case, Family
from hatfn.wiring import Wiring

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "hatfn.testing.strategies needs hypothesis, which is not installed: "
        "pip install 'hatfn[testing]'."
    ) from error

_SEEDS = st.integers(0, 2**31 - 1)
_SIZES = st.sampled_from((1.0, 0.01, 6.0))


def modules(
    families: Sequence[Family] = ("mlp", "conv", "attention"),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    max_blocks: int = 3,
    without: Sequence[str] = (),
) -> st.SearchStrategy[Case]:
    """Modules, each with an input to trace it with and the name of its classifier.

    Multilayer perceptrons and convolutional networks, plain, residual or concatenating, with batch,
    layer, group or no norms, grouped and depthwise convolutions; blocks of attention over tokens.

    Args:
        families: families of layers, simplest first.
        dtypes: types of weights and inputs, simplest first.
        max_blocks: the most blocks between stem and classifier.
        without: kinds of blocks, norms and activations to leave out, as in ``["group", "sigmoid"]``;
            :class:`~hatfn.testing.cases.Block` lists their names.

    Returns:
        A strategy for :class:`~hatfn.testing.cases.Case`: ``case.module``, ``case.x``, ``case.head``,
        and ``case.wiring``, which is traced at first use.

    Example:
        >>> from hypothesis import find
        >>> case = find(modules(), lambda case: True)  # the simplest one
        >>> case
        Case(family='mlp', blocks=(), width=4, seed=0, dtype=torch.float32)
        >>> case.module
        _Net(
          (stem): Linear(in_features=5, out_features=4, bias=True)
          (blocks): Sequential()
          (head): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    widths = st.sampled_from((4, 6, 8))

    def one(names: Iterable[str]) -> st.SearchStrategy[Any]:
        return st.sampled_from([name for name in names if name not in without])

    def blocks(family: Family) -> st.SearchStrategy[Block]:
        return st.builds(
            Block,
            kind=one(KINDS[family]),
            width=widths,
            norm=one(NORMS[family]),
            activation=one(ACTIVATIONS),
            bias=st.sampled_from((True, False)),
        )

    def of(family: Family) -> st.SearchStrategy[Case]:
        # Tuples of each length shrink to fewer blocks than a list does.
        found = st.one_of([st.tuples(*[blocks(family)] * count) for count in range(max_blocks + 1)])
        return st.builds(Case, st.just(family), found, widths, _SEEDS, st.sampled_from(dtypes))

    return st.one_of([of(family) for family in families])


def wirings(**choices: Any) -> st.SearchStrategy[Wiring]:
    """Traced wirings of :func:`modules`; ``choices`` are the arguments of :func:`modules`.

    Example:
        >>> from hypothesis import find
        >>> find(wirings(families=["conv"], max_blocks=0), lambda wiring: True).groups
        mappingproxy({'stem': 4})
    """
    return modules(**choices).map(lambda case: case.wiring)


def embeddings(
    wiring: Wiring, tasks: int, dtype: torch.dtype = torch.float32
) -> st.SearchStrategy[dict[str, Tensor]]:
    """Task embeddings, {group: (tasks, U)} in [-6, 6], some of them 0, -6, 6 or tiny.

    Args:
        wiring: the wiring that has the groups.
        tasks: the number of tasks.
        dtype: the type of the numbers.

    Example:
        >>> from hypothesis import find
        >>> wiring = Case("mlp", ()).wiring
        >>> find(embeddings(wiring, 2), lambda e: bool((e["stem"] < 0).any()))["stem"].shape
        torch.Size([2, 4])
    """
    fixed = (st.just(wiring), st.just(tasks), st.just(dtype))
    return st.builds(cases.random_embeddings, *fixed, size=_SIZES, seed=_SEEDS)


def masks(wiring: Wiring, tasks: int) -> st.SearchStrategy[dict[str, Tensor]]:
    """Binary gates, {group: (tasks, U)} bool; half of the units are on, or fewer, more, all or none.

    Args:
        wiring: the wiring that has the groups.
        tasks: the number of tasks.

    Example:
        >>> from hypothesis import find
        >>> wiring = Case("mlp", ()).wiring
        >>> find(masks(wiring, 1), lambda mask: not mask["stem"].any())
        {'stem': tensor([[False, False, False, False]])}
    """
    density = st.sampled_from((0.5, 0.2, 0.8, 1.0, 0.0))
    return st.builds(cases.random_masks, st.just(wiring), st.just(tasks), density, seed=_SEEDS)


def task_sequences(tasks: int, min_size: int = 0) -> st.SearchStrategy[list[int]]:
    """Tasks in the order in which they are learned, each at most once; some may be missing.

    Args:
        tasks: the number of tasks.
        min_size: the smallest number of tasks to learn.

    Example:
        >>> from hypothesis import find
        >>> find(task_sequences(3), lambda order: len(order) > 1)
        [0, 1]
    """
    counts = st.integers(min_size, tasks)
    return st.builds(lambda count, order: order[:count], counts, st.permutations(range(tasks)))


def learners(
    of: st.SearchStrategy[Case] | None = None,
    min_tasks: int = 1,
    max_tasks: int = 3,
    **settings: Any,
) -> st.SearchStrategy[HAT]:
    """Learners of random modules, with 2 to 4 classes per task and a random optimizer.

    The optimizers are SGD with and without momentum and weight decay, Adam, and AdamW.

    Args:
        of: a strategy for the modules; default :func:`modules`.
        min_tasks: the smallest number of tasks.
        max_tasks: the largest number of tasks; every group has at least four units.
        settings: arguments of :func:`hatfn.build`.

    Example:
        >>> from hypothesis import find
        >>> find(learners(st.just(Case("mlp", ())), min_tasks=2), lambda hat: True).classes
        (2, 2)
    """
    return st.builds(
        cases.learner,
        modules() if of is None else of,
        st.lists(st.integers(2, 4), min_size=min_tasks, max_size=max_tasks),
        st.sampled_from(list(OPTIMIZERS)),
        **{name: st.just(value) for name, value in settings.items()},
    )


def states(hat: HAT, learned: int = 0, opened: bool | None = None) -> st.SearchStrategy[HATState]:
    """States with random numbers in all leaves, random learned tasks, and one open task or none.

    They are not trained, but training could lead to such states: masks and protection fit the
    embeddings and the tasks.

    Args:
        hat: the learner.
        learned: the smallest number of learned tasks.
        opened: whether another task is open; None: it may or may not be.

    Example:
        >>> from hypothesis import find
        >>> hat = cases.learner(Case("mlp", ()), classes=[2, 3, 2], optimizer="adam")
        >>> find(states(hat, opened=True), lambda state: bool(state.learned.any())).learned
        tensor([ True, False, False])
    """
    counts = st.integers(learned, hat.tasks - 1 if opened else hat.tasks)
    more = st.booleans() if opened is None else st.just(opened)

    def of(count: int, more: bool, order: list[int]) -> st.SearchStrategy[HATState]:
        fixed = (hat, order[:count], [*order[count:], None][0] if more else None)
        return st.builds(cases.random_state, *map(st.just, fixed), size=_SIZES, seed=_SEEDS)

    orders = st.permutations(range(hat.tasks))
    return st.tuples(counts, more, orders).flatmap(lambda drawn: of(*drawn))


def batches(hat: HAT, task: int) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Batches of 2 to 8 samples for a task, as :meth:`hatfn.HAT.update` takes them.

    Args:
        hat: the learner.
        task: the task.

    Returns:
        A strategy for pairs of x (B, ...) and y (B,) int64.

    Example:
        >>> from hypothesis import find
        >>> hat = cases.learner(Case("mlp", ()), classes=[2, 3, 2], optimizer="adam")
        >>> x, y = find(batches(hat, 0), lambda batch: True)
        >>> x.shape, y.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """
    sizes = st.integers(2, 8)
    return st.builds(cases.random_batch, st.just(hat), st.just(task), size=sizes, seed=_SEEDS)
