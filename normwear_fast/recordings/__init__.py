"""Readers of recordings: one small class a format, registered by file extension.

`open_recording(path)` gives a `Recording`: its channels, each at its own rate, and `blocks()` that
streams their samples in physical units with NaN for what is missing. `find_recordings(inputs)`
turns files and folders into recordings with ids.

A new format is one file here: a subclass of `Recording` under `@register(".extension")`, imported
below.
"""

from __future__ import annotations

from normwear_fast.recordings.base import (
    Channel,
    FoundRecording,
    Recording,
    extensions,
    find_recordings,
    open_recording,
    register,
)
from normwear_fast.recordings.edf import EdfRecording
from normwear_fast.recordings.numpy import NpyRecording, NpzRecording
from normwear_fast.recordings.parquet import ParquetRecording
from normwear_fast.recordings.text import TextRecording
from normwear_fast.recordings.wfdb import WfdbRecording

__all__ = [
    "Channel",
    "EdfRecording",
    "FoundRecording",
    "NpyRecording",
    "NpzRecording",
    "ParquetRecording",
    "Recording",
    "TextRecording",
    "WfdbRecording",
    "extensions",
    "find_recordings",
    "open_recording",
    "register",
]
