"""The 11 downstream sets as published, in miniature: files of the true layouts, made-up values."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def make_wesad(raw: Path) -> None:
    for subject in ("S2", "S3"):
        folder = raw / "WESAD" / subject
        folder.mkdir(parents=True)
        seconds = 40
        label = np.repeat([0, 1, 2, 4, 3], [4, 13, 12, 5, 6]).repeat(700)
        record = {
            "signal": {
                "chest": {
                    name: noise(700 * seconds, 3 if name == "ACC" else 1)
                    for name in ("ACC", "ECG", "EMG", "EDA", "Temp", "Resp")
                },
                "wrist": {
                    "ACC": noise(32 * seconds, 3),
                    "BVP": noise(64 * seconds, 1),
                    "EDA": noise(4 * seconds, 1),
                    "TEMP": noise(4 * seconds, 1),
                },
            },
            "label": label.astype(np.int32),
            "subject": subject,
        }
        # Python 2 wrote protocol 2.
        (folder / f"{subject}.pkl").write_bytes(pickle.dumps(record, protocol=2))
        (folder / f"{subject}_quest.csv").write_text("# Subj;S2;;\n")


def make_uci_har(raw: Path) -> None:
    root = raw / "UCI HAR Dataset"
    for half, subjects in (("train", [1, 1, 3, 5, 6, 7]), ("test", [2, 4, 9])):
        signals = root / half / "Inertial Signals"
        signals.mkdir(parents=True)
        for kind in ("total_acc", "body_acc", "body_gyro"):
            for axis in "xyz":
                np.savetxt(
                    signals / f"{kind}_{axis}_{half}.txt", noise(len(subjects), 128), " %.7e"
                )
        activities = [(index % 6) + 1 for index in range(len(subjects))]
        np.savetxt(root / half / f"y_{half}.txt", activities, "%d")
        np.savetxt(root / half / f"subject_{half}.txt", subjects, "%d")


CNT_ELECTRODES = ("HEOL", "FP1", "FP2", "F7", "TP7", "TP8", "O1", "A2")


def cnt_file(values: np.ndarray, rate: int, events: bool = True) -> bytes:
    """A NeuroScan CNT file of (samples, electrodes) int32 values."""
    samples, electrodes = values.shape
    header = bytearray(900)
    header[:12] = b"Version 3.0\0"
    struct.pack_into("<H", header, 370, electrodes)
    struct.pack_into("<H", header, 376, rate)
    struct.pack_into("<i", header, 864, samples)
    table = bytearray()
    for name in CNT_ELECTRODES:
        entry = bytearray(75)
        entry[: len(name)] = name.encode()
        struct.pack_into("<h", entry, 47, 3)
        struct.pack_into("<f", entry, 59, 204.8)
        struct.pack_into("<f", entry, 71, 0.5)
        table += entry
    data = values.astype("<i4").tobytes()
    if events:
        struct.pack_into("<i", header, 886, 900 + len(table) + len(data))
        data += b"\x01" + b"\0" * 30
    return bytes(header) + bytes(table) + data


def make_driver_fatigue(raw: Path) -> None:
    for subject in ("1", "2", "12"):
        folder = raw / subject
        folder.mkdir(parents=True)
        for state in ("Normal state", "Fatigue state"):
            values = np.round(1000 * noise(12_500, len(CNT_ELECTRODES), seed=int(subject)))
            (folder / f"{state}.cnt").write_bytes(cnt_file(values, 1000))


def make_epilepsy(raw: Path) -> None:
    for letter in "ZONFS":
        folder = raw / letter
        folder.mkdir(parents=True)
        suffix = ".TXT" if letter == "N" else ".txt"
        for number in (1, 2, 100):
            values = np.round(100 * noise(4097, seed=number)).astype(int)
            (folder / f"{letter}{number:03d}{suffix}").write_text(
                "\n".join(map(str, values)) + "\n"
            )


def make_gameemo(raw: Path) -> None:
    names = "AF3,AF4,F3,F4,F7,F8,FC5,FC6,O1,O2,P7,P8,T7,T8,"
    for subject in (1, 2, 3):
        folder = raw / f"(S{subject:02d})" / "Preprocessed EEG Data" / ".csv format"
        folder.mkdir(parents=True)
        for game in (1, 2, 3, 4):
            rows = [names] + [
                ",".join(f"{value:.4f}" for value in row) + "," for row in noise(128 * 13, 14)
            ]
            (folder / f"S{subject:02d}G{game}AllChannels.csv").write_text("\n".join(rows))
        raw_folder = raw / f"(S{subject:02d})" / "Raw EEG Data" / ".csv format"
        raw_folder.mkdir(parents=True)
        (raw_folder / f"S{subject:02d}G1AllRawChannels.csv").write_text(names + "\n")


def make_ecg_abnormal(raw: Path) -> None:
    raw.mkdir(parents=True)
    for label, name in enumerate(("normal", "abnormal")):
        beats = np.abs(noise(10, 188, seed=label))
        beats[:, 120:] = 0
        beats[:, 187] = label
        np.savetxt(raw / f"ptbdb_{name}.csv", beats, "%.18e", delimiter=",")
    np.savetxt(raw / "mitbih_train.csv", np.zeros((2, 188)), delimiter=",")


def xlsx(rows: list[list[Any]]) -> dict[str, str]:
    """The parts of a workbook as Excel writes a plain table."""
    strings: list[str] = []
    body = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for index, value in enumerate(row):
            if value == "":
                continue
            name = f"{chr(65 + index)}{number}"
            if isinstance(value, str):
                if value not in strings:
                    strings.append(value)
                cells.append(f'<c r="{name}" t="s"><v>{strings.index(value)}</v></c>')
            else:
                cells.append(f'<c r="{name}"><v>{value}</v></c>')
        body.append(f'<row r="{number}">{"".join(cells)}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    items = "".join(f"<si><t>{text}</t></si>" for text in strings)
    return {
        "xl/workbook.xml": f"<workbook {space}/>",
        "xl/sharedStrings.xml": f"<sst {space}>{items}</sst>",
        "xl/worksheets/sheet1.xml": f"<worksheet {space}><sheetData>{''.join(body)}"
        "</sheetData></worksheet>",
    }


PPG_BP_ROWS: list[list[Any]] = [
    ["Cardiovascular dataset"],
    [
        "Num.",
        "subject_ID",
        "Sex(M/F)",
        "Age(year)",
        "Hypertension",
        "Diabetes",
        "cerebral infarction",
        "cerebrovascular disease",
    ],
    [1, 2, "Female", 45, "Normal", "", "", ""],
    [2, 3, "Male", 50, "Prehypertension", "Type 2 Diabetes", "", "cerebrovascular disease"],
    [3, 6, "Male", 60, "Stage 1 hypertension", "Diabetes", "cerebral infarction", ""],
    [4, 8, "Male", 61, "Stage 2 hypertension", "", "", "insufficiency of cerebral blood supply"],
]


def make_ppg_bp(raw: Path) -> None:
    folder = raw / "PPG-BP Database" / "Data File" / "0_subject"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder.parent / "PPG-BP dataset.xlsx", "w") as archive:
        for name, text in xlsx(PPG_BP_ROWS).items():
            archive.writestr(name, text)
    for subject in (2, 3, 6, 8):
        for segment in (1, 2, 3):
            values = np.round(2000 + 100 * noise(2100, seed=subject)).astype(int)
            (folder / f"{subject}_{segment}.txt").write_text("\t".join(map(str, values)) + "\t")


def make_physionet_emg(raw: Path) -> None:
    wfdb = pytest.importorskip("wfdb")
    raw.mkdir(parents=True)
    sums = []
    for name in ("healthy", "myopathy", "neuropathy"):
        wfdb.wrsamp(
            f"emg_{name}",
            fs=4000,
            units=["mV"],
            sig_name=["EMG"],
            p_signal=noise(7600, 1),
            fmt=["16"],
            write_dir=str(raw),
        )
        for suffix in (".hea", ".dat"):
            data = (raw / f"emg_{name}{suffix}").read_bytes()
            sums.append(f"{hashlib.sha256(data).hexdigest()} emg_{name}{suffix}")
    (raw / "SHA256SUMS.txt").write_text("\n".join(sums) + "\n")


# Seconds at which the cuff deflates in the synthetic recordings.
CUFF = (35.0, 70.0)


def make_noninvasive_bp(raw: Path) -> None:
    raw.mkdir(parents=True)
    for subject in (1, 2, 14):
        time = np.arange(80_000) / 1000
        force = np.full(len(time), 3000.0)
        for end in CUFF:
            # The cuff presses for eight seconds, then lets go.
            force[(time > end - 8) & (time < end)] -= 1500
        record = {
            "age": 30,
            "weight": 70,
            "height": 170,
            "data_PPG": np.round(500 * noise(80_000)).tolist(),
            "data_ECG": np.round(500 * noise(80_000, seed=1)).tolist(),
            "data_PCG": np.round(500 * noise(80_000, seed=2)).tolist(),
            "data_FSR": force.tolist(),
            "data_BP": [{"SBP": 118 + subject, "DBP": 76}, {"SBP": 131, "DBP": 83 + subject}],
        }
        (raw / f"{subject}.json").write_text(json.dumps(record))


def make_ppg_hgb(raw: Path) -> None:
    root = raw / "Hemoglobin Photoplethysmography Dataset"
    folder = root / "Raw dataset per subject"
    folder.mkdir(parents=True)
    for subject in (1, 2, 10, 68):
        rows = ["Red (a.u),Infra Red (a.u),Gender,Age (year),Hemoglobin (g/dL)"]
        for red, infrared in 1e5 + 1000 * noise(249 + subject % 2, 2, seed=subject):
            rows.append(f"{red:.0f},{infrared:.0f},Female,33,{11 + subject / 10}")
        (folder / f"{subject}.csv").write_text("\n".join(rows))
    other = root / "Preprocessing dataset per subject"
    other.mkdir()
    (other / "1.csv").write_text("Red (a.u),Infra Red (a.u)\n1,2\n")
    (root / "Final Dataset Hb PPG.csv").write_text("Red (a.u)\n1\n")


def make_fetal_fpcg(raw: Path) -> None:
    from scipy.io import wavfile

    raw.mkdir(parents=True)
    rows = ["Subject,Gestational age (weeks),Maternal age,FHR (bpm)"]
    for subject, rate in ((1, "141"), (2, "NA"), (3, "150"), (10, "136")):
        rows.append(f"{subject},36,24,{rate}")
        values = (3000 * noise(2000 * 13, seed=subject)).astype(np.int16)
        wavfile.write(raw / f"subject_{subject:02d}.wav", 2000, values)
    (raw / "Records.csv").write_text("\n".join(rows) + "\n")


# Samples of each class in order of the labels, or the targets; the number of subjects; the length.
