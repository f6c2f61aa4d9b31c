"""Micro-batches and work units: every window once, in bounds, the same way every time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normwear_fast.config import NormWearConfig
from normwear_fast.packing import (
    Layout,
    Segments,
    equal_runs,
    plan_micro_batches,
    plan_units,
    segment_tiles,
    window_tokens,
)

SHAPES = st.lists(st.tuples(st.integers(1, 14), st.integers(11, 700)), max_size=40)


@pytest.mark.parametrize(
    ("samples", "optimized", "tokens"),
    [(390, True, 560), (390, False, 560), (11, True, 14), (1300, True, 1873), (64, True, 92)],
)
def test_tokens_of_the_reference_shapes(samples, optimized, tokens):
    assert window_tokens(1, samples, optimized) == tokens
    assert window_tokens(3, samples, optimized) == 3 * tokens


@given(SHAPES, st.integers(14, 20_000))
def test_micro_batches_hold_every_window_once_within_the_budget(shapes, budget):
    tokens = [window_tokens(*shape, True) for shape in shapes]
    batches = plan_micro_batches(shapes, tokens, budget)
    assert sorted(i for batch in batches for i in batch.windows) == list(range(len(shapes)))
    for batch in batches:
        assert batch.tokens == sum(tokens[i] for i in batch.windows)
        assert batch.tokens <= budget or len(batch.windows) == 1
    assert batches == plan_micro_batches(shapes, tokens, budget)


def test_a_budget_is_used_whole():
    """234 windows of 560 tokens are a GPU's budget, six a CPU's: not one fewer."""
    batches = plan_micro_batches([(1, 390)] * 4, [560] * 4, 1_120)
    assert [batch.windows for batch in batches] == [(0, 1), (2, 3)]
    assert plan_units([560] * 4, 1_120) == [range(0, 2), range(2, 4)]


@given(st.lists(st.integers(1, 5_000), max_size=60), st.integers(1, 20_000))
def test_units_are_consecutive_and_bounded(tokens, limit):
    units = plan_units(tokens, limit)
    assert [i for unit in units for i in unit] == list(range(len(tokens)))
    for unit in units:
        assert sum(tokens[i] for i in unit) <= limit or len(unit) == 1


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=30))
def test_runs_cover_and_agree(pairs):
    cpu = torch.device("cpu")
    first = Segments([a for a, _ in pairs], cpu)
    second = Segments([b for _, b in pairs], cpu)
    runs = list(equal_runs(first, second))
    assert [i for a, b in runs for i in range(a, b)] == list(range(len(pairs)))
    for a, b in runs:
        assert len(set(pairs[a:b])) == 1
    for (_, stop), (start, _) in pairwise(runs):
        assert stop == start
        assert pairs[stop - 1] != pairs[start]


def test_layout_of_a_ragged_batch():
    config = NormWearConfig()
    layout = Layout([(2, 64), (1, 390)], "conv", config, torch.device("cpu"))
    assert layout.samples.bounds == (0, 64, 128, 518)
    assert layout.sequences.lengths == (92, 92, 560)
    assert layout.windows.lengths == (2, 1)
    assert layout.cls_rows.tolist() == [0, 92, 184]
    again = Segments.from_cu(layout.sequences.cu)
    assert again.lengths == layout.sequences.lengths


@given(st.lists(st.integers(0, 700), max_size=30), st.sampled_from([1, 16, 64, 128]))
def test_tiles_cover_every_row_once(lengths, block):
    table = segment_tiles(lengths, block)
    rows = [
        (segment, row)
        for segment, first in table.tolist()
        for row in range(first, min(first + block, lengths[segment]))
    ]
    assert rows == [(i, row) for i, length in enumerate(lengths) for row in range(length)]
    assert all(first % block == 0 for _, first in table.tolist())
    assert table.dtype == np.int32
