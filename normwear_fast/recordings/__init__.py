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
from normwear_fast.recordings.e4 import E4Recording
from normwear_fast.recordings.edf import EdfRecording
from normwear_fast.recordings.hdf5 import Hdf5Recording
from normwear_fast.recordings.mne import (
    BrainVisionRecording,
    EeglabRecording,
    FifRecording,
    GdfRecording,
)
from normwear_fast.recordings.numpy import NpyRecording, NpzRecording
from normwear_fast.recordings.parquet import ParquetRecording
from normwear_fast.recordings.sample import SampleRecording
from normwear_fast.recordings.text import TextRecording
from normwear_fast.recordings.wfdb import WfdbRecording
from normwear_fast.recordings.zarr import ZarrRecording
from normwear_fast.recordings.zips import open_zip

__all__ = [
    "BrainVisionRecording",
    "Channel",
    "E4Recording",
    "EdfRecording",
    "EeglabRecording",
    "FifRecording",
    "FoundRecording",
    "GdfRecording",
    "Hdf5Recording",
    "NpyRecording",
    "NpzRecording",
    "ParquetRecording",
    "Recording",
    "SampleRecording",
    "TextRecording",
    "WfdbRecording",
    "ZarrRecording",
    "extensions",
    "find_recordings",
    "open_recording",
    "open_zip",
    "register",
]
