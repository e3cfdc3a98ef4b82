"""Whose types and shapes are checked in every test, and by what."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

LEAVES = (
    "method.gates", "method.transforms", "network.outputs", "evaluation.metrics", "numerics.trees",
    "tracing.labels",
)  # fmt: skip
"""The leaf functions, whose arguments are ours; the public boundary answers wrong types itself."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int will do for a float, as everywhere in Python."""
