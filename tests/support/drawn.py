"""Tensors that hypothesis draws for the pieces of a step."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis.extra import numpy as nps
from torch import Tensor

ANY = st.floats(width=32)
"""Numbers, with nan and infinities."""
FLOATS = st.floats(-100, 100, width=32)
MASKS = nps.arrays("bool", (4, 3)).map(torch.tensor)


def arrays(elements: st.SearchStrategy, shape: tuple[int, ...] = (4, 3)) -> st.SearchStrategy[Tensor]:
    return nps.arrays("float32", shape, elements=elements).map(torch.tensor)
