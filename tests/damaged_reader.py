"""Reads recordings in a process of its own, with an end to its memory: what test_damaged_inputs drives.

A line of JSON in, {"path", "format", "rate"}; a line out: how the reading ended. What our reader
takes is compared with what the format's own library makes of the same file.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import resource
import sys
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.errors import NormWearError
from normwear_fast.recordings import open_recording

MEMORY = 6 << 30  # bytes of address space; libraries alone map some 3 GB
RESIDENT = 1 << 20  # kB


def library(path: Path, form: str) -> list[np.ndarray]:
    """Channels as the format's own library gives them, in the order of our channels."""
    if form == "wfdb":
        import wfdb

        record = wfdb.rdrecord(str(path.with_suffix("")), smooth_frames=False)
        return list(record.e_p_signal)
    if form in ("edf", "bdf"):
        import edfio

        read = edfio.read_edf if form == "edf" else edfio.read_bdf
        content = bytearray(path.read_bytes())
        # the number of data records may be padded with NULs: ours takes it, edfio does not
        content[236:244] = content[236:244].replace(b"\0", b" ")
        signals = read(bytes(content), header_encoding="latin-1").signals
        return [signal.data for signal in signals]
    if form in ("csv", "tsv"):
        import pandas as pd

        table = pd.read_csv(path, sep="," if form == "csv" else "\t", encoding="latin-1")
        # a column of text is left out, with a note
        return [table[name].to_numpy(np.float64) for name in table.select_dtypes("number")]
    if form == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        return [column.to_numpy() for column in table.columns]
    if form == "npy":
        return list(np.load(path, allow_pickle=False))
    if form == "npz":
        with np.load(path, allow_pickle=False) as file:
            return list(file["data"])
    if form.startswith("h5"):
        import h5py

        with h5py.File(path, "r") as file:
            return list(next(one for one in file.values() if isinstance(one, h5py.Dataset))[()])
    if form.startswith("zarr"):
        import zarr

        store: Any = str(path)
        if form == "zarr_zip":
            store = zarr.storage.ZipStore(path, mode="r")
        return list(zarr.open_group(store, mode="r")["data"][:])
    if form in ("fif", "brainvision", "eeglab_fdt", "eeglab", "gdf"):
        import mne

        return list(mne.io.read_raw(path, preload=True, verbose="ERROR").get_data(picks="all"))
    if form.startswith("e4"):
        import pandas as pd

        channels: list[np.ndarray] = []
        for name in ("BVP", "EDA", "ACC", "TEMP", "HR"):
            if form == "e4":
                content = (path / f"{name}.csv").read_bytes()
            else:
                with zipfile.ZipFile(path) as file:
                    if f"{name}.csv" not in file.namelist():
                        continue  # its name is what was damaged
                    content = file.read(f"{name}.csv")
            try:
                table = pd.read_csv(io.BytesIO(content), header=None, skiprows=2)
            except pd.errors.EmptyDataError:
                continue  # no samples
            scale = 1 / 64 if name == "ACC" else 1.0
            channels += [table[i].to_numpy(np.float64) * scale for i in table]
        return channels
    if form == "sample":
        # only of files that the restricted reader has taken: they name nothing but NumPy's arrays
        return list(pickle.loads(path.read_bytes())["data"])
    raise AssertionError(form)


def outcome(path: Path, form: str, rate: float | None) -> dict[str, Any]:
    try:
        with open_recording(path, sampling_rate=rate) as recording:
            names = range(len(recording.channels))
            blocks = list(recording.blocks(names, 0.7))
            ours = [np.concatenate([block[i] for block in blocks]) for i in names]
            declared = [channel.samples for channel in recording.channels]
            notes = list(recording.notes)
    except NormWearError as error:
        text = str(error)
        if "\n" in text or path.stem not in text or len(text) > 1500:
            return {"class": "not one line", "why": text}
        return {"class": "refused", "why": text}
    if [data.size for data in ours] != declared:
        return {"class": "differs", "why": f"{declared} samples declared"}
    if not ours:
        return {"class": "no signal", "why": "; ".join(notes)}
    try:
        theirs = library(path, form)
    except Exception as error:
        return {"class": "library fails", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    # what both left out or kept may differ where a name was damaged: the data must not
    left = [np.where(np.isfinite(x), x, np.nan) for x in map(np.float64, theirs)]
    for data in ours:
        same = next(
            (i for i, x in enumerate(left) if np.array_equal(x, data, equal_nan=True)), None
        )
        if same is None:
            return {
                "class": "differs",
                "why": f"{len(ours)} channels, {len(theirs)} by the library",
            }
        left.pop(same)
    if left and not notes:
        return {"class": "differs", "why": f"{len(left)} channels left out without a note"}
    return {"class": "read as the library does"}


def peak_resident() -> int:
    """kB. Not ru_maxrss, which begins with what the process that started this one had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def walk(path: Path) -> None:
    """All of an HDF5 file by h5py alone."""
    import h5py

    def read(name: str, one: Any) -> None:
        dict(one.attrs)
        if isinstance(one, h5py.Dataset):
            one[()]

    with h5py.File(path, "r") as file:
        dict(file.attrs)
        file.visititems(read)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.get("alone"):
                answer = {"class": "the library does not crash"}
                with contextlib.suppress(Exception):
                    walk(Path(request["path"]))
            else:
                answer = outcome(Path(request["path"]), request["format"], request["rate"])
        except BaseException as error:
            answer = {"class": "traceback", "why": "".join(traceback.format_exception(error))}
        peak = peak_resident()
        if peak > RESIDENT:
            answer = {"class": "memory", "why": f"{peak >> 10} MB resident"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
