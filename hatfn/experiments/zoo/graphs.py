"""Graph networks: torch_geometric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from hatfn.experiments.rows import Sample

EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0], [1, 0, 2, 1, 3, 2, 4, 3, 5, 4, 0, 5]])
"""A ring of six nodes, both ways round."""


def models() -> Mapping[str, Callable[[], Sample]]:
    """Networks of three layers for the nodes of one graph: the nodes are the samples."""
    found = {
        name: partial(_build, name) for name in ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")
    }
    found["GATv2"] = partial(_build, "GAT", v2=True)
    # With loops, which are the default, the number of edges depends on the edges.
    found |= {
        f"{name} without self-loops": partial(_build, name, add_self_loops=False)
        for name in ("GCN", "GAT")
    }
    found["GATv2 without self-loops"] = partial(_build, "GAT", v2=True, add_self_loops=False)
    return {**found, "MLP": _mlp}


def _build(name: str, **options: Any) -> Sample:
    nn = import_module("torch_geometric.nn")
    if name == "PNA":
        options |= {
            "aggregators": ["mean", "max"],
            "scalers": ["identity"],
            "deg": torch.tensor([0, 0, 6]),
        }
    module = getattr(nn, name)(
        in_channels=8, hidden_channels=64, num_layers=3, out_channels=4, **options
    )
    inputs = {"x": torch.randn(6, 8), "edge_index": EDGES}
    return Sample(module, inputs, "6 nodes", ("edge_index",))


def _mlp() -> Sample:
    nn = import_module("torch_geometric.nn")
    return Sample(nn.MLP([8, 64, 64, 4]), torch.randn(6, 8), "6 rows")
