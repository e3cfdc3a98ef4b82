"""The names that settings of the method accept."""

from typing import Literal

Init = Literal["normal", "dense", "sparse"]
"""How task embeddings start: see :func:`~hatfn.method.gates.initial_embeddings`."""

LockName = Literal["exact", "paper", "adaptive", "magnitude"]
"""The protection rules of :mod:`hatfn.protection`, each with its default settings."""
