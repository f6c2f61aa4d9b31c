"""Zip archives that are one recording: an Empatica E4 session or a Zarr store."""

from __future__ import annotations

from pathlib import Path

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.archive import safe_members
from normwear_fast.recordings.base import Recording, register
from normwear_fast.recordings.e4 import E4Recording, e4_prefix
from normwear_fast.recordings.zarr import METADATA, ZarrRecording


def open_zip(path: Path, *, sampling_rate: float | None = None) -> Recording:
    """The recording in a zip, by what its members are named."""
    members = safe_members(path)
    if any(name in members for name in METADATA):
        return ZarrRecording(path, sampling_rate=sampling_rate, members=members)
    sessions = e4_prefix(members)
    if len(sessions) > 1:
        raise RecordingError(
            f"{path}: holds {len(sessions)} Empatica E4 sessions; unpack it and give the folder"
        )
    if not sessions:
        raise RecordingError(
            f"{path}: is neither an Empatica E4 session (BVP.csv, EDA.csv, ...) nor a Zarr store"
        )
    return E4Recording(path, sampling_rate=sampling_rate, members=members, prefix=sessions[0])


register(".zip")(open_zip)
