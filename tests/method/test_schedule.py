"""Schedules of the scale: their formulas and their limits."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hatfn.method import schedule


@given(s_max=st.floats(1.5, 1000), progress=st.floats(0, 1))
def test_schedules_are_their_formulas(s_max: float, progress: float) -> None:
    paper = 1 / s_max + (s_max - 1 / s_max) * progress
    assert schedule.linear(s_max)(progress) == pytest.approx(paper)
    base = s_max ** (1 / 0.8)
    assert schedule.exponential(s_max)(progress) == pytest.approx(base ** (progress - 0.2))
    wave = max(1 / s_max, s_max / 2 * (1 + math.cos(2 * math.pi * progress)))
    assert schedule.cosine(s_max)(progress) == pytest.approx(wave)
    assert schedule.cosine(s_max, s_min=1.25)(0.5) == 1.25
    assert schedule.constant(s_max)(progress) == s_max
    for make in (schedule.linear, schedule.exponential, schedule.cosine, schedule.constant):
        assert 0 < make(s_max)(progress) <= s_max
