"""The strict environment of every test: shapes are checked, and no setting of PyTorch is left changed."""

from __future__ import annotations

import os
import random
import secrets
from importlib import import_module

import pytest
import torch
from beartype._check.code import codemain
from checked import LEAVES
from hypothesis import settings
from jaxtyping import install_import_hook
from suites import Durations

# The type checker looks at items at random; it draws them from numbers of its own, not from Python's
# global ones, which no function may move.
codemain.getrandbits = random.Random(0).getrandbits

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores

collect_ignore = ["mutation.py", "support"]  # a script that wants cosmic-ray; what tests share
collect_ignore_glob = ["*/conftest.py"]  # several modules of one name, and none has a doctest

with install_import_hook([f"hatfn.{leaf}" for leaf in LEAVES], "checked.check"):
    for leaf in LEAVES:  # what is imported later is not checked
        import_module(f"hatfn.{leaf}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=0, help="of all data and examples; below 0: a random one"
    )
    parser.addoption("--examples", type=float, default=1.0, help="so many times as many examples")


@pytest.hookimpl(tryfirst=True)  # hypothesis reads its seed when it is configured
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed < 0:
        config.option.seed = secrets.randbelow(2**31)
    if config.option.seed:
        config.option.hypothesis_seed = config.option.seed
    # No deadline: machines are shared, and speed is a matter of benchmarks.
    settings.register_profile(
        "hatfn",
        deadline=None,
        derandomize=not config.option.seed,
        max_examples=max(1, round(100 * config.option.examples)),
    )
    settings.load_profile("hatfn")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Durations())


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed}, kernels: {torch.backends.cpu.get_cpu_capability()}"


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws when it is read depends neither on the other files nor on their order."""
    torch.manual_seed(collector.config.option.seed)


@pytest.fixture(autouse=True)
def untouched_globals(request: pytest.FixtureRequest):
    """Every test starts from one seed and leaves PyTorch's settings as they were."""
    torch.manual_seed(request.config.option.seed)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    assert torch.get_default_dtype() == dtype
    assert torch.get_num_threads() == threads
