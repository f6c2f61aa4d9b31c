"""Recordings written for the tests in formats of arrays, of mne and of Empatica."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording_checks import signal


def write_h5(path: Path, fill: Callable[[Any, Callable[..., Any]], None]) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:

        def put(group: Any, name: str, data: Any, **options: Any) -> Any:
            return group.create_dataset(name, data=data, **options)

        fill(file, put)
    return path


def write_zarr(path: Path, fill: Callable[[Any, Callable[..., Any]], None], version: int) -> Path:
    zarr = pytest.importorskip("zarr")
    archive = path.suffix == ".zip"
    store = zarr.storage.ZipStore(path, mode="w") if archive else zarr.storage.LocalStore(path)
    root = zarr.create_group(store, zarr_format=version)

    def put(group: Any, name: str, data: Any, **options: Any) -> Any:
        return group.create_array(name, data=np.asarray(data), **options)

    fill(root, put)
    store.close()
    return path


def raw_of(data: np.ndarray, rate: float = 200.0, names: Any = None, kinds: Any = "eeg") -> Any:
    mne = pytest.importorskip("mne")
    names = names or [f"EEG{i}" for i in range(len(data))]
    return mne.io.RawArray(data, mne.create_info(names, rate, kinds), verbose="ERROR")


def write_fif(path: Path, data: np.ndarray | None = None, **options: Any) -> Path:
    raw = raw_of(signal(3, 4000) * 1e-6 if data is None else data)
    raw.set_meas_date(datetime(2024, 5, 6, tzinfo=UTC))
    raw.save(path, fmt="double", verbose="ERROR", **options)
    return path


def write_brainvision(
    folder: Path, data: np.ndarray, orientation: str = "MULTIPLEXED", **changes: str
) -> Path:
    """A header, data and markers as the format's description has them."""
    entries = {
        "DataFile": "rec.eeg",
        "MarkerFile": "rec.vmrk",
        "DataFormat": "BINARY",
        "DataOrientation": orientation,
        "NumberOfChannels": str(len(data)),
        "SamplingInterval": "4000",
        "BinaryFormat": "INT_16",
        **changes,
    }
    common = "".join(
        f"{key}={value}\n" for key, value in entries.items() if key != "BinaryFormat" and value
    )
    channels = "".join(f"Ch{i + 1}=C{i + 1},,0.5,uV\n" for i in range(len(data)))
    (folder / "rec.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n\n[Common Infos]\n"
        f"{common}\n[Binary Infos]\nBinaryFormat={entries['BinaryFormat']}\n\n"
        f"[Channel Infos]\n{channels}\n[Comment]\nNumberOfChannels=99\n",
        encoding="utf-8",
    )
    (folder / "rec.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n\n[Common Infos]\nDataFile=rec.eeg\n\n"
        "[Marker Infos]\nMk1=New Segment,,1,1,0,20240506070809000000\n",
        encoding="utf-8",
    )
    stored = data.T if orientation == "MULTIPLEXED" else data
    (folder / "rec.eeg").write_bytes(np.ascontiguousarray(stored, "<i2").tobytes())
    return folder / "rec.vhdr"


def write_eeglab(folder: Path, data: np.ndarray, where: str) -> Path:
    """A set with its data in an .fdt, in the EEG structure, or among the file's variables."""
    from scipy.io import savemat

    locations = np.zeros(len(data), dtype=[("labels", object)])
    locations["labels"] = [f"E{i + 1}" for i in range(len(data))]
    fields: dict[str, Any] = {
        "setname": "test",
        "nbchan": len(data),
        "trials": 1,
        "pnts": data.shape[1],
        "srate": 128.0,
        "xmin": 0.0,
        "xmax": (data.shape[1] - 1) / 128,
        "chanlocs": locations,
        "chaninfo": {"nodatchans": []},
        "event": [],
        "data": data.astype(np.float32),
    }
    if where == "fdt":
        fields["data"] = "rec.fdt"
        (folder / "rec.fdt").write_bytes(data.T.astype("<f4").tobytes())
    content = fields if where == "variables" else {"EEG": fields}
    savemat(folder / "rec.set", content, appendmat=False, do_compression=where != "structure")
    return folder / "rec.set"


def write_gdf(path: Path, signals: list[np.ndarray], per_record: list[int], version: str) -> Path:
    """A GDF file of 16-bit channels in records of one second, as the format's description has it."""
    count = len(signals)
    records = len(signals[0]) // per_record[0]
    header = 256 * (count + 1)
    modern = float(version) >= 1.9
    fixed = bytearray(256)
    fixed[:8] = f"GDF {version}".encode()
    fixed[8:168] = b" " * 160
    if modern:
        struct.pack_into("<H", fixed, 184, header // 256)
    else:
        fixed[168:184] = b"2024050607080900"
        struct.pack_into("<q", fixed, 184, header)
    struct.pack_into("<qII", fixed, 236, records, 1, 1)
    struct.pack_into("<H" if modern else "<I", fixed, 252, count)

    def column(values: list[Any], form: str) -> bytes:
        return b"".join(struct.pack(form, value) for value in values)

    body = column([f"G{i + 1}".encode() for i in range(count)], "16s")
    body += b" " * 80 * count
    if modern:
        body += b" " * 6 * count + column([4275] * count, "<H")
    else:
        body += column([b"uV"] * count, "8s")
    body += column([-100.0] * count, "<d") + column([100.0] * count, "<d")
    digital = "<d" if modern else "<q"
    body += column([-1000] * count, digital) + column([1000] * count, digital)
    body += (b"\0" if modern else b" ") * 80 * count  # filters
    body += column(per_record, "<i") + column([3] * count, "<i")
    body += b"\0" * (256 * count - len(body))
    data = b"".join(
        values[r * n : (r + 1) * n].astype("<i2").tobytes()
        for r in range(records)
        for values, n in zip(signals, per_record, strict=True)
    )
    events = struct.pack("<BBBBI", 1, 0, 1, 0, 0) if not modern else b""
    path.write_bytes(bytes(fixed) + body + data + events)
    return path


START = 1_544_027_337.0


def write_e4(folder: Path, seconds: int = 30, names: Any = None) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(11)
    rates = {"BVP": 64, "EDA": 4, "ACC": 32, "TEMP": 4, "HR": 1}
    result = {}
    for name in names or rates:
        rate, late = rates[name], 10 if name == "HR" else 0
        width = 3 if name == "ACC" else 1
        rows = random.normal(20, 5, (rate * (seconds - late), width)).round(2)
        rows = np.round(rows) if name == "ACC" else rows
        lines = [", ".join([f"{START + late:.6f}"] * width), ", ".join([f"{rate:.6f}"] * width)]
        lines += [",".join(f"{v:g}" for v in row) for row in rows]
        (folder / f"{name}.csv").write_text("\r\n".join(lines) + "\r\n")
        result[name] = rows.T
    (folder / "IBI.csv").write_text(f"{START:.6f}, IBI\n5.2,0.8\n6.0,0.8\n")
    (folder / "tags.csv").write_text(f"{START + 5:.2f}\n")
    (folder / "info.txt").write_text("about the session\n")
    return result


def zipped(folder: Path, archive: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for one in sorted(folder.iterdir()):
            file.write(one, prefix + one.name)
    return archive
