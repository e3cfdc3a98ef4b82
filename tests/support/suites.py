"""The suites of tests and their time budgets, which the table at the end of every run shows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest


class Suite(NamedTuple):
    """Folders of tests/ and files beside them, and the most seconds of one core that they should take.

    All suites together should take at most twelve minutes on two cores.
    """

    budget: int
    places: tuple[str, ...]


SUITES = {
    "tracing": Suite(150, ("tracing", "test_wiring.py", "test_spec.py", "test_reprs.py")),
    "network, subnet": Suite(200, ("network", "subnet", "models")),
    "method, engine": Suite(150, ("numerics", "checks", "method", "engine")),
    "learner, training": Suite(
        200,
        (
            "training",
            "test_learner.py",
            "test_learner_architectures.py",
            "test_learner_devices.py",
            "test_learner_waits.py",
        ),
    ),
    "trees, transformers": Suite(120, ("test_learner_trees.py", "test_learner_transformers.py")),
    "lifecycle": Suite(60, ("lifecycle",)),
    "evaluation, replicas": Suite(60, ("evaluation", "test_replicas.py")),
    "storage": Suite(60, ("storage",)),
    "testing": Suite(60, ("testing",)),
    "laws": Suite(130, ("laws",)),
    "faults, purity": Suite(160, ("faults",)),
    "experiments": Suite(300, ("experiments",)),
    "house": Suite(120, ("test_environment.py", "test_layout.py", "test_readme.py", "test_docs.py")),
}
DOCTESTS = Suite(60, ())


def suites_of(file: str) -> list[str]:
    """The suites of a file, by its path from the root: one for a test file, none for other files."""
    top, *rest = Path(file).parts
    return [name for name, suite in SUITES.items() if top == "tests" and rest[0] in suite.places]


class Durations:
    """Adds up how long tests take, and shows it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: dict[str, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite = next(iter(suites_of(report.nodeid.partition("::")[0])), "doctests")
        self.seconds[suite] += report.duration
        self.tests[suite] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        line = terminalreporter.write_line
        terminalreporter.section("suites")
        line(f"{'suite':30}{'tests':>6}{'seconds':>9}{'budget':>8}")
        for name, suite in {**SUITES, "doctests": DOCTESTS}.items():
            if self.tests[name]:
                late = "  over budget" if self.seconds[name] > suite.budget else ""
                line(f"{name:30}{self.tests[name]:6}{self.seconds[name]:9.1f}{suite.budget:8}{late}")
        line(f"{'all':30}{sum(self.tests.values()):6}{sum(self.seconds.values()):9.1f}")
