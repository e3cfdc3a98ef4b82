"""What the tests are about, and how long each suite may take: the table at the end of every run."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest


class Suite(NamedTuple):
    """Test files, and the seconds of one core that they should not exceed: two cores, twelve minutes."""

    budget: int
    files: tuple[str, ...]


SUITES = {
    "tracing": Suite(
        150,
        (
            "trace", "mutants", "labels", "layers", "wiring", "manual", "modules", "rules_movement",
            "rules_elementwise", "rules_contraction", "rules_norms", "rules_params", "layout",
        ),
    ),
    "every architecture": Suite(150, ("architectures", "compact", "export", "skipping")),
    "learning": Suite(
        300,
        (
            "learner", "forward", "gates", "transforms", "heads", "locks", "together", "networks", "precision",
            "memory", "torch_optim", "papers", "calibration", "capacity", "transfer", "lifecycle", "devices", "compiled",
        ),
    ),
    "batched evaluation, replicas": Suite(60, ("evaluation", "inference", "replicas")),
    "laws": Suite(130, ("laws_gates", "laws_lifecycle", "laws_steps", "machine", "strategies", "contracts")),
    "leaks": Suite(60, ("leaks", "certificate", "testing", "silent")),
    "wrong calls, purity": Suite(60, ("errors", "purity")),
    "files and faults": Suite(160, ("checkpoint", "computed", "resume", "faults", "untrusted")),
    "processes": Suite(150, ("ranks", "launch")),
    "experiments": Suite(220, ("experiments", "streams", "reproduce", "examples", "bench", "scaling", "readme")),
}  # fmt: skip
DOCTESTS = Suite(60, ())


def suite_of(file: str) -> str:
    """The suite of a file."""
    stem = Path(file).stem.removeprefix("test_")
    return next((name for name, suite in SUITES.items() if stem in suite.files), "doctests")


class Durations:
    """Adds up how long tests take, and shows it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: dict[str, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite = suite_of(report.nodeid.partition("::")[0])
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
