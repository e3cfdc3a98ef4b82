"""The architecture, read off the code's own imports: storeys, no circles, small files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hatfn"

STOREYS = (
    ("experiments",),
    ("testing",),
    ("storage", "builder", "replicas"),
    ("learner",),
    ("subnet", "evaluation", "lifecycle", "training"),
    ("tracing", "spec"),
    ("engine", "method"),
    ("network",),
    ("checks",),
    ("state",),
    ("wiring", "models", "numerics"),
)
"""Packages and modules from the top down: one imports from its own storey and from those below."""

FRONT = {"hatfn", "hatfn.__main__", "hatfn.public"}
"""What users import and what ``python -m hatfn`` runs: they stand outside and see everything."""

EXCEPTIONS: set[tuple[str, str]] = set()
"""(module, what it imports) that break the order today."""


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """{dotted name: file} of every module; a package is the module of its ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """The modules of the package that a source imports, ``TYPE_CHECKING`` and functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a name comes from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            # Of a name out of a module, the module.
            parents = [name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)]
            found |= {next((parent for parent in parents if parent in known), "")} - {""}
    return found


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """{module: the modules that it imports}."""
    known = modules(package)
    return {name: imports(path.read_text(), {*known}) - {name} for name, path in known.items()}


def storey(name: str) -> int:
    """The storey of a module, from 0 at the top; -1 for what stands outside."""
    if name in FRONT:
        return -1
    top = name.split(".")[1]
    return next(level for level, names in enumerate(STOREYS) if top in names)


def upward(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The imports that go to a higher storey."""
    return {(a, b) for a, targets in edges.items() for b in targets if storey(b) < storey(a)}


def lawful(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without today's exceptions."""
    return {a: {b for b in targets if (a, b) not in EXCEPTIONS} for a, targets in edges.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(edges[name]):
                if found := visit(target, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in edges if (found := visit(name, []))), [])


def packages(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between the packages and modules of the top level."""
    found: dict[str, set[str]] = {}
    for name, targets in edges.items():
        if name not in FRONT:
            own = name.split(".")[1]
            tops = {target.split(".")[1] for target in targets if target not in FRONT}
            found.setdefault(own, set()).update(tops - {own})
    return found


def test_every_arrow_points_down() -> None:
    assert upward(graph()) == EXCEPTIONS


def test_no_module_imports_itself_through_others() -> None:
    assert circle(lawful(graph())) == []


def test_no_package_imports_itself_through_others() -> None:
    assert circle(packages(lawful(graph()))) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("wiring.py", "from hatfn.learner import HAT"),
        ("numerics/trees.py", "from hatfn.state import HATState"),
        ("method/gates.py", "from hatfn import build"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, file: str, line: str) -> None:
    """Also one that only a type checker follows."""
    for name, path in modules().items():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() if name else "")
    wrong = tmp_path / "hatfn" / file
    guarded = f"\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}\n"
    wrong.write_text(wrong.read_text() + guarded)
    edges = graph(tmp_path / "hatfn")
    name = f"hatfn.{file.removesuffix('.py').replace('/', '.')}"
    assert name in {module for module, _ in upward(edges) - EXCEPTIONS}


def test_every_module_has_a_storey() -> None:
    tops = {name.split(".")[1] for name in modules() if name not in FRONT}
    assert tops == {name for names in STOREYS for name in names}


def test_tests_mirror_the_package() -> None:
    """A folder for each package, and four more; every test file has a name of its own."""
    own = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    mirrored = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert own == mirrored | {"laws", "faults", "support", "data"}
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))


def test_files_are_few_and_small() -> None:
    """Ten files beside the packages, and none of over 400 lines."""
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in ("hatfn", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: count for path, count in lines.items() if count > 400} == {}
