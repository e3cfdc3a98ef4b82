"""Steps as compiled graphs: captured operator by operator, then fused by PyTorch's Inductor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import optree
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hatfn.checks.settings import check_choice
from hatfn.engine.optimizer import Optimizer
from hatfn.engine.ranks import Ranks
from hatfn.numerics.trees import flatten, unflatten


def check_compile(part: Any, optimizer: Optimizer, ranks: Ranks, recomputes: bool) -> None:
    """What of a step is compiled, and whether it can be.

    Args:
        part: of a step; None: nothing.
        optimizer: a pair that is pure.
        ranks: that train together.
        recomputes: whether the module checkpoints activations.
    """
    if part is None:
        return
    check_choice("compile", part, get_args(Part))
    if ranks.size > 1:
        raise ValueError(
            f"build: compile={part!r} with {ranks.size} processes, whose messages no graph can hold. "
            f"Expected compile=None, or ranks left out."
        )
    if part == "step" and recomputes:
        raise ValueError(
            "build: compile='step', and the module checkpoints activations, which a graph would keep. "
            "Expected compile='update'."
        )
    tree = {"w": torch.ones(2)}
    try:
        captured(partial(optimizer.update, params=tree), tree, optimizer.init(tree))
    except Exception as error:
        raise ValueError(
            f"build: compile={part!r}, and the optimizer reads numbers of tensors, as those of "
            f"hatfn.from_torch do. Expected functions made of operators alone: torchopt.adam(1e-3)."
        ) from error


Part = Literal["update", "step"]
"""What of a step is compiled: all that follows the gradient, or the gradient as well."""


class Graph(NamedTuple):
    """A compiled function.

    Attributes:
        run: from leaves to leaves.
        structure: of what it returns.
    """

    run: Callable[..., Any]
    structure: Any


@dataclass(frozen=True, eq=False)
class Graphs:
    """The compiled functions of one learner, each compiled once for every shape of its arguments.

    Attributes:
        known: a memo, which saves work and changes no result.
    """

    known: dict[Hashable, Graph] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # machine code stays where it was made

    def __len__(self) -> int:
        return len(self.known)

    def run(self, function: Callable[..., Any], name: Hashable, *trees: Any) -> Any:
        """``function(*trees)`` from its graph; the graph is made if there is none.

        Args:
            function: of tensors alone: it may depend on their numbers by operators only.
            name: tells it from other functions of this learner, by everything that it depends on.
            trees: its arguments.

        Raises:
            RuntimeError: it reads numbers, or PyTorch cannot compile it here.
        """
        leaves: list[Tensor]
        leaves, structure = optree.tree_flatten(trees)  # type: ignore[arg-type]
        kinds = tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves)
        # A graph's loops divide their work among as many threads as there were.
        key = (name, structure, kinds, torch.get_num_threads())
        if key not in self.known:
            self.known[key] = Graph(*_compiled(function, trees, leaves))
        graph = self.known[key]
        with torch.no_grad():
            return unflatten(graph.structure, graph.run(*leaves))


def _compiled(function: Callable[..., Any], trees: Any, leaves: Any) -> tuple[Callable[..., Any], Any]:
    """A compiled function of leaves, and the structure of the leaves that it returns."""
    try:
        graph, structure = captured(function, *trees)
    except RuntimeError as error:
        raise RuntimeError(
            f"update: the step cannot be captured as a graph: {error}. The loss, the regularizer, the "
            f"gate or, with compile='step', the module reads numbers of tensors. Expected functions "
            f"made of operators alone, such as torch.where; or build with compile=None."
        ) from error
    try:
        with torch.no_grad():
            return torch._inductor.compile(graph, leaves), structure
    except Exception as error:
        raise RuntimeError(
            f"update: PyTorch could not compile the step: {error}. On a CPU it needs a C++ compiler, "
            f"such as g++; without one build with compile=None."
        ) from error


def captured(function: Callable[..., Any], *trees: Any) -> tuple[torch.fx.GraphModule, Any]:
    """The operators that a function calls, as a graph of leaves, and the structure of its results.

    Args:
        function: of trees of tensors.
        trees: its arguments, which lend their shapes.
    """
    returned: list[Any] = []
    leaves, structure = optree.tree_flatten(trees)  # type: ignore[arg-type,var-annotated]

    def flat(*leaves: Tensor) -> tuple[Any, ...]:
        results, shape = flatten(function(*optree.tree_unflatten(structure, leaves)))
        returned.append(shape)
        return tuple(results)

    trace = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)  # constants are real
    return trace(*leaves), returned[-1]


def widened(protection: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flags as 0.0 and 1.0, protection just as well: on a CPU compiled loops take bytes one by one.

    Args:
        protection: {name: tensor}, bool, or in [0, 1].
    """
    return {
        name: p.view(torch.int8).to(torch.bfloat16) if p.dtype == torch.bool and p.is_cpu else p
        for name, p in protection.items()
    }
