"""Runs of `normwear-fast encode` in the tests' own process, and the one line a mistake gets."""

from __future__ import annotations

import pytest

from normwear_fast import NormWearConfig
from normwear_fast.cli.main import main

TINY = NormWearConfig(
    embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=64, decoder_num_heads=1, decoder_depth=1
)


def encode(*words: object) -> int:
    """In this process alone, unless the words say otherwise: readers take a moment to start."""
    return main(["encode", "--workers", "0", *map(str, words)])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that stderr must hold."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("normwear-fast: error: ")
    return lines[0]
