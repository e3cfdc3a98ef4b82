"""Does a test fail for every small change of the code that decides? A mutation run, by cosmic-ray's operators.

    pip install cosmic-ray pytest-cov && python tests/mutation.py --sample 200 --out mutation.json

Of every place that cosmic-ray would change, two of its up to ten replacements are tried; those that change
an annotation are left out, and so are those that put "is" for "==". For each mutant the tests that reach
its line run, the shortest first, in a process that has imported PyTorch already; of a line that only an
import reaches (a decorator, a default), those that reach its function. Rules meet the tests that say exactly
what they give, not those of whole architectures: what these alone would see counts as survived.
tests/README.md keeps the last scores and the survivors.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import pytest
import tyro
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from coverage import CoverageData

ROOT = Path(__file__).parent.parent
RULES = [
    "tests/tracing/test_labels.py",
    "tests/tracing/test_trace_module.py",
    "tests/network/test_layers.py",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/tracing/rules").glob("test_*.py"))),
]
TARGETS: dict[str, list[str]] = {
    "hatfn/method/gates.py": [
        "hatfn/method/gates.py",
        "tests/method/test_gates.py",
        "tests/test_learner.py",
        "tests/training/test_steps.py",
        "tests/laws/test_laws_gates.py",
    ],
    "hatfn/method/transforms.py": [
        "hatfn/method/transforms.py",
        "tests/method/test_transforms.py",
        "tests/test_learner.py",
        "tests/training/test_steps.py",
        "tests/method/test_papers.py",
        "tests/laws/test_laws_steps.py",
    ],
    **{
        f"hatfn/lifecycle/{name}.py": [
            f"tests/lifecycle/test_{name}.py",
            "tests/faults/test_errors.py",
            "tests/laws/test_laws_lifecycle.py",
        ]
        for name in ("forget", "grow")
    },
    **{
        str(path.relative_to(ROOT)): RULES
        for path in sorted((ROOT / "hatfn/tracing").rglob("[!_]*.py"))
    },
    "hatfn/tracing/trace.py": [
        "tests/tracing/test_trace_module.py",
        "tests/tracing/test_manual.py",
        "tests/faults/test_errors.py",
    ],
}
LIMIT = 240.0
"""Seconds that the tests of one mutant may take."""
FIRST = 40
"""How many of the shortest tests a mutant meets before the rest of those that reach it."""


class Mutant(NamedTuple):
    """One change: cosmic-ray's name of it, which of the places it fits, and where that is."""

    path: str
    operator: str
    occurrence: int
    line: int
    column: int


def mutants(path: str, seed: int) -> list[Mutant]:
    """Two at most for each place and kind."""
    types = [
        (n.lineno, n.col_offset, n.end_lineno, n.end_col_offset)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        for n in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if n is not None
    ]
    places: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/db", WorkDB.Mode.create) as work:
        init([ROOT / path], work, {})
        for item in work.work_items:
            (spec,) = item.mutations
            line, column = spec.start_pos
            kind = spec.operator_name.removeprefix("core/").split("_")
            if any((a, b) <= (line, column) < (c, d) for a, b, c, d in types) or {"Is", "IsNot"} & {
                *kind[2:]
            }:
                continue
            mutant = Mutant(path, spec.operator_name, spec.occurrence, line, column)
            places[kind[0], line, column].append(mutant)
    draw = random.Random(seed)
    return [m for place in places.values() for m in draw.sample(place, min(2, len(place)))]


def tests_in(folder: str, arguments: list[str], report: str | None, answer) -> None:
    """Run pytest in a folder, in a process of its own; tell its exit code, and how long each test took."""
    seen: dict[str, float] = {}

    class Durations:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            seen[report.nodeid] = seen.get(report.nodeid, 0.0) + report.duration

    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ["COVERAGE_FILE"] = f"{folder}/.coverage"
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    plain = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist"]
    code = pytest.main([*plain, *arguments], plugins=[Durations()])
    if report:
        Path(report).write_text(json.dumps(seen))
    answer.put(int(code))


def run(context, folder: str, arguments: list[str], report: str | None = None) -> int | None:
    """Exit code of pytest; None: it took too long."""
    answer = context.SimpleQueue()
    process = context.Process(target=tests_in, args=(folder, arguments, report, answer))
    process.start()
    process.join(None if report else LIMIT)
    if process.is_alive():
        process.kill()
        return None
    return 3 if answer.empty() else answer.get()


def reaching(context, folder: str, files: list[str]) -> dict[str, dict[int, list[str]]]:
    """For each file and line the tests that reach it, the shortest first."""
    cover = ["--cov=hatfn", "--cov-context=test", "--cov-report=", "--cov-fail-under=0"]
    if run(context, folder, [*files, *cover], f"{folder}/durations.json") != 0:
        said = Path(folder, "log.txt").read_text()
        raise RuntimeError(f"the tests fail without any mutant: {files}\n{said}")
    durations = json.loads(Path(folder, "durations.json").read_text())
    data = CoverageData(f"{folder}/.coverage")
    data.read()
    reached = {}
    for path in data.measured_files():
        lines = {
            line: sorted({c.partition("|")[0] for c in contexts} & durations.keys(), key=durations.get)
            for line, contexts in data.contexts_by_lineno(path).items()
        }
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                span = range(first, (node.end_lineno or first) + 1)
                whole = {test for line in span for test in lines.get(line, [])}
                for line in span:
                    lines[line] = lines.get(line) or sorted(whole, key=durations.get)
        reached[os.path.relpath(path, folder)] = lines
    return reached


def verdict(context, folder: str, mutant: Mutant, tests: list[str], files: list[str]) -> str:
    """One of "killed", "too long" or "survived"."""
    path = Path(folder, mutant.path)
    source = path.read_text()
    changed = mutate_code(source.encode(), get_operator(mutant.operator)(), mutant.occurrence)
    path.write_text(changed)
    try:
        for chosen in (tests[:FIRST], tests[FIRST:]) if tests else (files,):
            code = run(context, folder, ["-x", *chosen]) if chosen else 0
            if code != 0:
                return "too long" if code is None else "killed"
        return "survived"
    finally:
        path.write_text(source)


def main(
    only: tuple[str, ...] = (), sample: int | None = None, processes: int = 2, seed: int = 0,
    out: Path = Path("mutation.json"),
) -> None:  # fmt: skip
    """Run and write the result of every mutant.

    Args:
        only: the files to mutate; none: all targets.
        sample: of the mutants of the tracing rules try only so many.
        processes: how many mutants to try at a time.
        seed: of what is chosen.
        out: where to write.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch._dynamo", "torch.export", "timm", "torchopt", "hypothesis", "pandas"]
    )
    chosen = [m for path in only or TARGETS for m in mutants(path, seed)]
    rules = [m for m in chosen if m.path.startswith("hatfn/tracing/")]
    if sample is not None and sample < len(rules):
        kept = set(random.Random(seed).sample(rules, sample))
        chosen = [m for m in chosen if m in kept or m not in rules]
    random.Random(seed).shuffle(chosen)  # a run that is cut off has tried a fair sample
    with tempfile.TemporaryDirectory() as base:
        folders: SimpleQueue[str] = SimpleQueue()
        for index in range(processes):
            folder = Path(base, str(index))
            for name in ("hatfn", "tests", "examples"):
                shutil.copytree(
                    ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
                )
            for name in ("pyproject.toml", "README.md"):
                shutil.copy(ROOT / name, folder)
            folders.put(str(folder))
        reached: dict[str, dict[int, list[str]]] = {}
        first = str(Path(base, "0"))
        for files in {tuple(TARGETS[m.path]) for m in chosen}:
            found = reaching(context, first, list(files))
            reached |= {p: found[p] for p in {m.path for m in chosen} if tuple(TARGETS[p]) == files}

        def judge(mutant: Mutant) -> dict[str, object]:
            folder = folders.get()
            tests = reached[mutant.path].get(mutant.line, [])
            result = verdict(context, folder, mutant, tests, TARGETS[mutant.path])
            folders.put(folder)
            text = (ROOT / mutant.path).read_text().splitlines()[mutant.line - 1].strip()
            print(f"{result}: {mutant.path}:{mutant.line}: {mutant.operator}: {text}", flush=True)
            return {**mutant._asdict(), "result": result, "tests": len(tests), "text": text}

        with ThreadPoolExecutor(processes) as pool:
            results = list(pool.map(judge, chosen))
    out.write_text(json.dumps(results, indent=1))
    for path in {m.path: None for m in chosen}:
        own = [r["result"] for r in results if r["path"] == path]
        print(f"{path}: {sum(r != 'survived' for r in own)} of {len(own)} killed")


if __name__ == "__main__":
    tyro.cli(main)
