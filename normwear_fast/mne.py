"""What `FastNormWear.encode` makes of mne's objects: windows and their rate."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import InputError

WINDOW_SECONDS = 6.0
"""Length of the windows that a continuous recording is cut into, end to end, as `normwear-fast encode`
does by default."""


def is_mne(value: Any) -> bool:
    """Whether this is an mne.io.Raw or mne.Epochs, or a list that holds one, which `windows_of` refuses;
    mne is not imported to find out."""
    mne = sys.modules.get("mne")
    if mne is None:
        return False
    items = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(item, mne.io.BaseRaw | mne.BaseEpochs) for item in items)


def with_own_rate(windows: Any, sampling_rate: Any) -> tuple[Any, Any]:
    """The windows of an mne object and its own rate; of anything else both as given."""
    return windows_of(windows) if is_mne(windows) else (windows, sampling_rate)


def equal_windows_of(instance: Any) -> tuple[NDArray[np.float64], float]:
    """`windows_of` as one array (B, C, L).

    Raises:
        InputError: as `windows_of`; a Raw of whose rate 6 s are no whole number of samples.
    """
    windows, rate = windows_of(instance)
    lengths = {window.shape[1] for window in windows}
    if len(lengths) > 1:
        counts = " or ".join(map(str, sorted(lengths)))
        raise InputError(
            f"windows of {WINDOW_SECONDS:g} s at {rate:g} Hz have {counts} samples; use encode, "
            "or mne.make_fixed_length_epochs"
        )
    return np.stack(windows) if windows else np.empty((0, 0, 0)), rate


def windows_of(instance: Any) -> tuple[list[NDArray[np.float64]], float]:
    """The windows (C, L) of an mne object in their order, and their sampling rate in Hz.

    Epochs are windows as they are. A Raw is cut into windows of 6 s, end to end from its first
    sample; what is left at its end is not encoded. Window k begins with sample ceil(6 k rate).
    Channels are those that hold data: no triggers, none marked bad. Values are mne's, in SI units; NaN
    where a Raw was not recorded.

    Raises:
        InputError: a Raw shorter than a window, one without a channel that holds data, or a list.
    """
    import mne

    if isinstance(instance, list | tuple):
        raise InputError(
            "a list of mne objects, whose windows could not be told apart in the result; give one at a "
            "time, or join them: mne.concatenate_raws, mne.concatenate_epochs"
        )
    picks = mne.pick_types(
        instance.info, meg=True, eeg=True, ref_meg=False, misc=True, exclude="bads"
    )
    others = mne.pick_types(
        instance.info,
        meg=False,
        ecg=True,
        eog=True,
        emg=True,
        bio=True,
        resp=True,
        gsr=True,
        temperature=True,
        seeg=True,
        ecog=True,
        dbs=True,
        fnirs=True,
        exclude="bads",
    )
    picks = np.union1d(picks, others)
    if not picks.size:
        raise InputError(f"{type(instance).__name__} has no channel that holds data")
    rate = float(instance.info["sfreq"])
    if isinstance(instance, mne.BaseEpochs):
        return list(instance.get_data(picks=picks, verbose="ERROR")), rate
    count = int((instance.n_times / rate + 1e-6) // WINDOW_SECONDS)
    if not count:
        raise InputError(
            f"{type(instance).__name__} lasts {instance.n_times / rate:g} s, less than a window of "
            f"{WINDOW_SECONDS:g} s; cut it with mne.make_fixed_length_epochs"
        )
    edges = np.ceil(np.arange(count + 1) * WINDOW_SECONDS * rate - 1e-6).astype(int)
    edges[-1] = min(edges[-1], instance.n_times)
    skipped = np.flatnonzero(instance.annotations.description == "BAD_ACQ_SKIP")
    if skipped.size:  # stretches that were not recorded, which mne fills with zeros
        instance = instance.copy().set_annotations(instance.annotations[skipped])
    reject = "NaN" if skipped.size else None
    return [
        instance.get_data(
            picks=picks, start=start, stop=stop, reject_by_annotation=reject, verbose="ERROR"
        )
        for start, stop in pairwise(edges.tolist())
    ], rate
