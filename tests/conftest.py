"""The strict environment of every test: shapes are checked, and no setting of PyTorch is left changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# The leaf functions, whose arguments are ours; the public boundary answers wrong types itself.
LEAVES = ("gates", "transforms", "forward", "metrics", "state", "tracing.labels")
with install_import_hook([f"hatfn.{leaf}" for leaf in LEAVES], "beartype.beartype"):
    pass

# No deadline: machines are shared, and speed is a matter of benchmarks. The same examples every time.
settings.register_profile("hatfn", deadline=None, derandomize=True)
settings.load_profile("hatfn")


@pytest.fixture(autouse=True)
def untouched_globals():
    """Every test starts from one seed and leaves PyTorch's settings as they were."""
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    assert torch.get_default_dtype() == dtype
    assert torch.get_num_threads() == threads
