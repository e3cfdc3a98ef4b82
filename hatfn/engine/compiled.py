"""Steps as compiled graphs: captured operator by operator, then fused by PyTorch's Inductor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import optree
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hatfn.checks.settings import check_choice
from hatfn.engine.optimizer import Optimizer
from hatfn.engine.ranks import Ranks
from hatfn.numerics.trees import flatten, unflatten


def check_compile(part: Any, optimizer: Optimizer, ranks: Ranks, recomputes: bool) -> None:
    """Check that a part of a step can be compiled.

    Args:
        part: the part of a step to compile; None: nothing.
        optimizer: a pair of pure functions.
        ranks: the processes that train together.
        recomputes: whether the module checkpoints activations.
    """
    if part is None:
        return
    check_choice("compile", part, get_args(Part))
    if ranks.size > 1:
        raise ValueError(
            f"build: compile={part!r} with {ranks.size} processes, but a graph cannot send messages "
            f"between processes. Expected compile=None, or a single process: leave ranks out."
        )
    if part == "step" and recomputes:
        raise ValueError(
            "build: compile='step', but the module checkpoints activations, and a compiled step would "
            "store them all. Expected compile='update'."
        )
    tree = {"w": torch.ones(2)}
    try:
        captured(partial(optimizer.update, params=tree), tree, optimizer.init(tree))
    except Exception as error:
        raise ValueError(
            f"build: compile={part!r}, but the optimizer reads numbers out of tensors, as those of "
            f"hatfn.from_torch do. Expected functions made of operators alone: torchopt.adam(1e-3)."
        ) from error


_log = logging.getLogger(__name__)  # tells what takes long: logging.basicConfig(level="INFO")

Part = Literal["update", "step"]
"""The part of a step that is compiled: "update" is all that follows the gradient, "step" is all."""


class Graph(NamedTuple):
    """A compiled function.

    Attributes:
        run: the function, from leaves to leaves.
        structure: the tree structure of its results.
    """

    run: Callable[..., Any]
    structure: Any


@dataclass(frozen=True, eq=False)
class Graphs:
    """The compiled functions of one learner, each compiled once for every shape of its arguments.

    Attributes:
        known: the functions compiled so far; they save work and change no result.
    """

    known: dict[Hashable, Graph] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # compiled code is neither copied nor pickled

    def __len__(self) -> int:
        return len(self.known)

    def run(self, function: Callable[..., Any], name: Hashable, *trees: Any) -> Any:
        """Compute ``function(*trees)`` by its graph, which is compiled at the first call.

        Args:
            function: takes trees of tensors and computes with operators only, without reading numbers.
            name: identifies the function within this learner; it contains everything else that the
                function depends on.
            trees: the arguments of the function.

        Raises:
            RuntimeError: the function reads numbers, or PyTorch cannot compile it on this machine.
        """
        leaves: list[Tensor]
        leaves, structure = optree.tree_flatten(trees)  # type: ignore[arg-type]
        kinds = tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves)
        # The number of threads is fixed when a graph is compiled.
        key = (name, structure, kinds, torch.get_num_threads())
        if key not in self.known:
            self.known[key] = Graph(*_compiled(function, trees, leaves))
        graph = self.known[key]
        with torch.no_grad():
            return unflatten(graph.structure, graph.run(*leaves))


def _compiled(function: Callable[..., Any], trees: Any, leaves: Any) -> tuple[Callable[..., Any], Any]:
    """A compiled function from leaves to leaves, and the tree structure of its results."""
    try:
        graph, structure = captured(function, *trees)
    except RuntimeError as error:
        raise RuntimeError(
            f"update: the step cannot be captured as a graph: {error}. The loss, the regularizer, the "
            f"gate or, with compile='step', the module reads numbers out of tensors. Expected "
            f"functions made of operators alone, such as torch.where; or build with compile=None."
        ) from error
    _log.info("compiling a step: seconds to minutes, once for each shape")
    start = time.perf_counter()
    try:
        # Inductor looks into its cache on disk only if it finds a mode with an environment of shapes.
        fake = FakeTensorMode(shape_env=ShapeEnv())
        like: list[Any] = [fake.from_tensor(leaf, static_shapes=True) for leaf in leaves]
        with torch.no_grad(), tracing(TracingContext(fake)):
            run = torch._inductor.compile(graph, like)
    except Exception as error:
        raise RuntimeError(
            f"update: PyTorch could not compile the step: {error}. Expected a C++ compiler, such as "
            f"g++, if the step runs on a CPU; without one, build with compile=None."
        ) from error
    _log.info("compiled in %.1f s", time.perf_counter() - start)
    return run, structure


def captured(function: Callable[..., Any], *trees: Any) -> tuple[torch.fx.GraphModule, Any]:
    """The operators that a function calls, as a graph of leaves, and the tree structure of its results.

    Args:
        function: a function of trees of tensors.
        trees: example arguments; the graph depends on their shapes only.
    """
    returned: list[Any] = []
    leaves, structure = optree.tree_flatten(trees)  # type: ignore[arg-type,var-annotated]

    def flat(*leaves: Tensor) -> tuple[Any, ...]:
        results, shape = flatten(function(*optree.tree_unflatten(structure, leaves)))
        returned.append(shape)
        return tuple(results)

    trace = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)  # constants stay real
    return trace(*leaves), returned[-1]


def widened(protection: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same protection with flags as 0.0 and 1.0, which a compiled step on a CPU reads faster.

    Compiled loops on a CPU process bool tensors one byte at a time.

    Args:
        protection: {name: tensor}, bool, or in [0, 1].
    """
    return {
        name: p.view(torch.int8).to(torch.bfloat16) if p.dtype == torch.bool and p.is_cpu else p
        for name, p in protection.items()
    }
