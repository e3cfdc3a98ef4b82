"""Trace models of timm, one or the smallest of every family, and tabulate their wirings."""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from hatfn.experiments.markdown import grid
from hatfn.testing import verify_wiring
from hatfn.tracing import trace
from hatfn.wiring import Measures, Wiring

if sys.platform != "win32":
    import resource

SIDES = (64, 96, 128, 160, 224)
"""Image sizes to try, in pixels: small images make the perturbation test affordable."""

REDUCED: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2},
    "qwen3_vit_88m": {"depth": 6},
    "samvit_base_patch16_224": {"depth": 2, "global_attn_indexes": (1,)},
    "vgg11": {"mlp_ratio": 0.1},
}
"""Options that make large models small enough for the perturbation test on a small machine."""


NOTES = {
    "gemma4_vit": "positions are one-hot vectors times a table, and layers clamp by tensors: neither "
    "has a rule that keeps units, so the residual stream is ungated.",
    "vision_transformer": "a sixth of the weights of this small model read the image, which has no "
    "gates; deit_tiny is the same architecture at its usual size.",
    "vision_transformer_relpos": "a tenth of the weights of this small model read the image.",
}
"""The reasons why families miss a target."""


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        family: the module of timm.
        model: the name in timm.
        built: the image side and the reductions.
        parameters: the number of parameters.
        measures: the measures of the wiring; None if there is no wiring.
        heads: the number of classifiers found.
        seconds: wall time of the trace.
        fell_back: operators without a rule.
        untested: parameters that no positive control reached; None if not verified.
        error: the error, or empty.
    """

    family: str
    model: str
    built: str = ""
    parameters: int = 0
    measures: Measures | None = None
    heads: int = 0
    seconds: float = 0.0
    fell_back: tuple[str, ...] = ()
    untested: tuple[str, ...] | None = None
    error: str = ""


def make(name: str, side: int | None = None) -> tuple[nn.Module, Tensor, str]:
    """A model, an image that it accepts, and how they were made.

    Args:
        name: the name in timm.
        side: the side of the image in pixels; None: the smallest of ``SIDES`` that the model accepts.

    Raises:
        ValueError: the model does not exist, or no size fits.
    """
    if not timm.is_model(name):
        raise ValueError(f"trace: {name!r} is not a timm model. Expected one of timm.list_models().")
    reduced = REDUCED.get(name, {})
    config = timm.get_pretrained_cfg(name)
    channels, *default = (config.input_size if config else None) or (3, 224, 224)
    for size in dict.fromkeys([side] if side else [*SIDES, max(default)]):
        options: list[dict[str, Any]] = [{"img_size": size}, {}]
        for sized in options:
            try:
                module = timm.create_model(name, **reduced, **sized)
                x = torch.randn(2, channels, size, size)
                with torch.no_grad():
                    module.eval()(x)
            except Exception:  # timm raises many kinds of errors if a size does not fit
                continue
            built = [f"{size} px", *(f"{k}={v}" for k, v in reduced.items())]
            return module, x, ", ".join(built)
    raise ValueError(
        f"trace: {name} does not accept an image of {side or SIDES} pixels. Write another --side."
    )


class Traced(NamedTuple):
    """A wiring, and the time and memory of its trace.

    Attributes:
        wiring: the wiring of the module.
        seconds: wall time of the trace.
        memory: by how much the peak memory of the process grew, as a multiple of the parameters' bytes.
    """

    wiring: Wiring
    seconds: float
    memory: float


def measured(module: nn.Module, x: Tensor) -> Traced:
    """Trace a module, and measure time and memory."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    before, start = _peak(), time.perf_counter()
    wiring = trace(module, x)
    return Traced(wiring, time.perf_counter() - start, (_peak() - before) / size)


def _peak() -> int:
    """The peak memory of this process so far, in bytes; 0 if it is not known."""
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def examine(family: str, name: str, verify: bool) -> Entry:
    """Trace a model; with ``verify``, also verify the wiring by perturbation."""
    torch.manual_seed(0)
    try:
        module, x, built = make(name)
        wiring, seconds, _ = measured(module, x)
        untested = verify_wiring(module, wiring, x, draws=2).untested if verify else None
    except Exception as error:  # an error of one model must not end the sweep
        line = (str(error).strip().splitlines() or [""])[0]
        return Entry(family, name, error=f"{type(error).__name__}: {line}")
    count = sum(p.numel() for p in module.parameters())
    return Entry(
        family, name, built, count, wiring.measures, len(wiring.heads), seconds,
        wiring.fallbacks, untested,
    )  # fmt: skip


def families() -> list[str]:
    """The modules of timm that have models; not those that other packages register."""
    return [name for name in timm.list_modules() if find_spec(f"timm.models.{name}") is not None]


def smallest(family: str) -> str:
    """The name of the family's model with the fewest parameters."""

    def count(name: str) -> float:
        try:
            with torch.device("meta"):
                module = timm.create_model(name)
        except Exception:  # a few models cannot be built on the meta device
            return float("inf")
        return sum(p.numel() for p in module.parameters())

    return min(timm.list_models(module=family), key=count)


def sweep(verify: bool, chosen: list[str]) -> Iterator[Entry]:
    """Yield an entry for each chosen family, in order; a fresh process computes each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        yield from pool.map(_examine_family, chosen, [verify] * len(chosen))


def _examine_family(family: str, verify: bool) -> Entry:
    warnings.simplefilter("ignore")  # timm warns of models that it has moved
    torch.set_num_threads(1)  # the processes share the cores
    return examine(family, smallest(family), verify)


def line(entry: Entry) -> str:
    """An entry as a line of text."""
    return "  ".join(cell for cell in _cells(entry) if cell)


def markdown(entries: Sequence[Entry]) -> str:
    """The table of all entries, its verdict, and a line on each exception."""
    head = (
        "family", "model", "built with", "parameters", "shared", "pair-gated", "protected",
        "smallest group", "heads", "fell back", "seconds", "perturbation test",
    )  # fmt: skip
    table = grid([head, *map(_cells, entries)])
    made = "Made by `hatfn trace --all --verify --out examples/families.md`"
    versions = f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}"
    notes = [f"- {e.family}: {_note(e)}" for e in entries if not good(e)]
    text = [
        f"# The smallest model of every family of timm, traced\n\n{made} ({versions}).",
        verdict(entries),
    ]
    return "\n\n".join([*text, table, "## Exceptions", "\n".join(notes) or "None."]) + "\n"


def good(entry: Entry) -> bool:
    """Whether a trace meets the targets: 95 % shared, 90 % pair-gated, at most 30 % protected."""
    m = entry.measures
    return m is not None and m.shared >= 0.95 and m.pair_gated >= 0.9 and m.protected <= 0.3


def verdict(entries: Sequence[Entry]) -> str:
    """How many families meet each target."""
    found = [entry.measures for entry in entries if entry.measures is not None]
    shared = sum(m.shared >= 0.95 for m in found)
    gated = sum(m.pair_gated >= 0.9 and m.protected <= 0.3 for m in found)
    tested = [entry.untested for entry in entries if entry.untested is not None]
    whole = sum(entry.measures is not None and not entry.fell_back for entry in entries)
    return (
        f"Traced: {len(found)} of {len(entries)}. Passed the perturbation test: {len(tested)} "
        f"({sum(map(len, tested))} parameters that no control reached). At least 95 % of the "
        f"parameters shared: {shared}. At least 90 % of the shared weight entries pair-gated and at "
        f"most 30 % protected: {gated}. Without an unknown operator: {whole}."
    )


def _cells(entry: Entry) -> tuple[str, ...]:
    m = entry.measures
    if m is None:
        return (entry.family, entry.model, *[""] * 9, entry.error)
    tested = "" if entry.untested is None else "passed"
    if entry.untested:
        tested += f"; not tested: {', '.join(entry.untested)}"
    return (
        entry.family, entry.model, entry.built, f"{entry.parameters / 1e6:.1f} M",
        f"{m.shared:.1%}", f"{m.pair_gated:.1%}", f"{m.protected:.1%}", str(m.smallest_group),
        str(entry.heads), ", ".join(sorted(set(entry.fell_back))), f"{entry.seconds:.1f}", tested,
    )  # fmt: skip


def _note(entry: Entry) -> str:
    return entry.error or NOTES.get(entry.family, "not explained yet")
