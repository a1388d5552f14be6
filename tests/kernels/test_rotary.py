"""Rotary tables against their formula in float64, far into a stream; what the process keeps of them."""

import math

import pytest
import torch

from reelway.kernels.wan import rotary
from reelway.kernels.wan.rotary import rotary_table

CPU = torch.device("cpu")
DIMS = (8, 4, 6)  # of a head of 18 channels


def angle(place: tuple[float, int, int], channel: int) -> float:
    """The turn of a pair of channels at (frame, row, column)."""
    for position, dim in zip(place, DIMS, strict=True):
        if channel < dim // 2:
            return position * 10000.0 ** (-2 * channel / dim)
        channel -= dim // 2
    raise IndexError(channel)


@pytest.mark.parametrize("first", [0, 7, 57_600, 10**8])
def test_tables_are_the_formula_at_any_position(first: int) -> None:
    height, width = 2, 3
    cos, sin = rotary_table(torch.arange(first, first + 2, dtype=torch.float64), height, width, DIMS, CPU)
    assert cos.shape == sin.shape == (2 * height * width, 9)
    assert cos.dtype == torch.float32
    for token, values in enumerate(zip(cos.tolist(), sin.tolist(), strict=True)):
        frame, place = divmod(token, height * width)
        row, column = divmod(place, width)
        angles = [angle((first + frame, row, column), channel) for channel in range(9)]
        assert values[0] == pytest.approx([math.cos(each) for each in angles], abs=1e-6)
        assert values[1] == pytest.approx([math.sin(each) for each in angles], abs=1e-6)


def test_a_stream_leaves_few_tables_behind() -> None:
    """Positions grow for ever: what is kept of the old ones is a handful."""
    rotary._table.cache_clear()
    for block in range(100):
        rotary_table(torch.arange(3 * block, 3 * block + 3, dtype=torch.float64), 2, 3, DIMS, CPU)
    assert rotary._table.cache_info().currsize <= 8
    before = rotary._frame_table.cache_info().misses
    rotary_table(torch.arange(300, 303, dtype=torch.float64), 2, 3, DIMS, CPU)
    assert rotary._frame_table.cache_info().misses == before
