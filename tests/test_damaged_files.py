"""Damaged files of every kind beside the recordings: labelled windows, tables, weights, models, outputs
that a command goes on with, caches. Each ends in one line that names it, or is read; and whatever is
read holds what a good one does."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import raw_sets
import safetensors.torch
import torch
from damaged_files import CASES, is_named
from other_values import change
from pyarrow import parquet
from test_damaged_inputs import SECONDS, Reader, damage, summary

from normwear_fast.encode.output import METADATA_KEY
from normwear_fast.errors import NormWearError, OutputError, WeightsError
from normwear_fast.evaluate.baselines import Clap
from normwear_fast.evaluate.samples import load_samples
from normwear_fast.files import COUNT, fits
from normwear_fast.pretrain.checkpoint import CHECKPOINT
from normwear_fast.pretrain.data import SeriesShards
from normwear_fast.pretrain.logs import Log
from normwear_fast.weights import load_checkpoint

BENCH = Path(__file__).parent.parent / "bench" / "results" / "damaged-files.json"

GOOD_ENDS = {"refused", "read"}

IMPORTS = 200.0
"""Seconds for the first of a kind, which imports what it needs."""

OTHER = 0.4
"""Share of the damaged files that are whole and hold something else."""


def torture(folder: Path, seed: int, count: int, names: list[str]) -> dict[str, Any]:
    """Damages files in turn through the cases, `count` in all, and has each read."""
    random = np.random.default_rng(seed)
    good: dict[str, Path] = {}
    reader = Reader("damaged_files.py")
    results: list[dict[str, Any]] = []

    def ask(name: str, place: Path, damaged: Path | None = None) -> dict[str, Any]:
        path = place / good[name].relative_to(folder / "good" / name)
        request = {"name": name, "path": str(path), "damaged": str(damaged or path)}
        return reader.ask(request, SECONDS if damaged else IMPORTS)

    try:
        for name in names:
            place = folder / "good" / name
            place.mkdir(parents=True)
            answer = reader.ask({"name": name, "write": str(place)}, IMPORTS)
            assert answer["class"] == "written", (name, answer)
            good[name] = Path(answer["path"])
            shutil.copytree(place, folder / "copy" / name)
            answer = ask(name, folder / "copy" / name)  # a good one is read, or nothing is shown
            assert answer["class"] == "read", (name, answer)
        for number in range(count):
            name = names[number % len(names)]
            place = folder / "damaged" / f"{number:05d}"
            shutil.copytree(folder / "good" / name, place)
            given = place / good[name].relative_to(folder / "good" / name)
            files = sorted(f for f in [given, *given.rglob("*")] if f.is_file())
            file = files[int(random.integers(len(files)))]
            other = random.random() < OTHER and change(file, random)
            how = "other value" if other else damage(file, random)
            answer = ask(name, place, file)
            about = {"number": number, "file_kind": name, "damage": how, "file": file.name}
            results.append({**about, **answer})
            if answer["class"] in GOOD_ENDS:
                shutil.rmtree(place)
    finally:
        reader.end()
    return summary(seed, results, "file_kind", GOOD_ENDS)


def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some of each kind, other ones every time; those that take seconds to import are left out."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    names = [name for name, case in CASES.items() if not case.slow]
    result = torture(tmp_path, seed, 2 * len(names), names)
    with capsys.disabled():
        print(f"\ndamaged files, seed {seed}: {result['classes']}")
    assert not result["bad"], (seed, result["bad"])


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_damaged_files_by_the_thousand(tmp_path: Path) -> None:
    count = int(os.environ.get("DAMAGE_COUNT", "6000"))
    seed = int(os.environ.get("DAMAGE_SEED", "2026"))
    result = torture(tmp_path, seed, count, list(CASES))
    BENCH.parent.mkdir(parents=True, exist_ok=True)
    BENCH.write_text(json.dumps(result, indent=1) + "\n")
    assert not result["bad"], result["bad"]


# --- what was found by damage, each by itself ------------------------------------------------------


def written(name: str, folder: Path) -> Path:
    """A good file of that kind."""
    return CASES[name].write(folder)


def refusal(name: str, path: Path, damaged: Path) -> str:
    """The line that a file is refused with, which names it and leaves nothing behind."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(NormWearError) as caught:
        CASES[name].read(path)
    assert sorted(path.parent.rglob("*")) == before
    assert is_named(damaged, str(caught.value))
    return str(caught.value)


def alter(path: Path, where: str, value: Any) -> None:
    """Sets a value of a JSON file, given its place as "inputs/0/windows"; a new last one by "+"."""
    values = json.loads(path.read_text())
    *outer, last = [int(name) if name.isdigit() else name for name in where.split("/")]
    inner = values
    for name in outer:
        inner = inner[name]
    if last == "+":
        inner.append(value)
    else:
        inner[last] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "file", "where", "value", "said"),
    [
        ("encoded_resumed", "manifest.json", "inputs/0/windows", 10**12, "1000000000000 windows"),
        ("encoded_resumed", "manifest.json", "inputs/0/duration_s", 1e30, "cannot have 4 windows"),
        ("encoded_resumed", "manifest.json", "model/threads", "x", "is damaged"),
        ("encoded_resumed", "manifest.json", "settings/unit_tokens", None, "is damaged"),
        ("encoded_resumed", "manifest.json", "run", "x", "belongs to another run"),
        ("encoded_reported", "manifest.json", "inputs/+", [], "is damaged"),
        ("encoded_reported", "manifest.json", "model/weights", 1, "is damaged"),
        ("encoded_reported", "manifest.json", "inputs/0/recording", "x", "is not in manifest.json"),
        ("series_resumed", "manifest.json", "settings", None, "is damaged"),
        ("finetuned", "finetune.json", "preparation/channel_count", 10**9, "not what finetune"),
        ("finetuned", "finetune.json", "preparation/window", -1, "window is -1"),
        ("finetuned", "finetune.json", "preparation/more", 1, "preparation"),
        ("finetuned", "finetune.json", "pool", [], "not what finetune writes"),
        ("fusion", "fusion.json", "text_encoder", 1, "text_encoder is 1"),
        ("fusion", "fusion.json", "preprocess", "x", "preprocess is 'x'"),
        ("weights", "config.json", "depth", 10**30, "at most 256"),
        ("weights", "config.json", "patch_size", [9, 10**30], "patch_size"),
        ("weights", "config.json", "wavelet", "x", "not one of PyWavelets'"),
        ("weights", "config.json", "fusion", "A" * 100_000, "must be one of cls"),
        ("pretrain_config", "", "fusion", [], "it must be like 'cls'"),
        ("pretrain_config", "", "mlp_ratio", "4", "it must be like 4.0"),
        ("wording", "", "rate/decimals", [], "decimals"),
        ("wording", "", "rate/decimals", 10**9, "decimals"),
        ("wording", "", "rate/frames", ["{} }"], "one {}"),
        ("text_encoder", "config.json", "num_hidden_layers", 3, "weights are in no file"),
        ("text_encoder", "config.json", "num_hidden_layers", 10**30, "layers"),
        ("text_encoder", "config.json", "num_attention_heads", 3, "cannot be loaded"),
        ("text_encoder", "tokenizer.json", "model/vocab/yes", 99, "knows 10"),
        ("text_encoder", "tokenizer.json", "model", 1, "cannot be loaded"),
        ("sentence_encoder", "modules.json", "0/path", 1, "no list of modules"),
        ("sentence_encoder", "modules.json", "1/path", "x", "names 'x'"),
        ("sentence_encoder", "modules.json", "1/path", "", "pooling None"),
        ("sentence_encoder", "sentence_bert_config.json", "max_seq_length", {}, "max_seq_length"),
        ("samples_released", "dataset.json", "dataset", [], "not what preparation wrote"),
        ("raw_noninvasive_bp", "1.json", "data_PPG/+", 10**400, "no series data_PPG"),
        ("raw_noninvasive_bp", "1.json", "data_BP/0/SBP", None, "data_BP"),
    ],
)
def test_json_that_says_something_else(
    name: str, file: str, where: str, value: Any, said: str, tmp_path: Path
) -> None:
    if CASES[name].slow:
        pytest.importorskip("transformers")
    path = written(name, tmp_path)
    damaged = path / file if file else path
    alter(damaged, where, value)
    assert said in refusal(name, path, damaged)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("encoded_resumed", "manifest.json"),
        ("finetuned", "finetune.json"),
        ("fusion", "fusion.json"),
        ("weights", "config.json"),
        ("pretrain_config", ""),
        ("wording", ""),
        ("samples_released", "train_test_split.json"),
        ("samples_released", "dataset.json"),
        ("raw_noninvasive_bp", "1.json"),
    ],
)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"])
def test_json_that_python_cannot_read(name: str, file: str, text: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    damaged = path / file if file else path
    damaged.write_bytes(text.encode("latin-1"))
    assert len(refusal(name, path, damaged)) <= 1000


@pytest.mark.parametrize("name", ["samples_npz", "labelled_npz"])
def test_zip_archives_fail_in_every_way(name: str, tmp_path: Path) -> None:
    """A checksum, a cut, encryption, a method of compression that nobody has."""
    path = written(name, tmp_path)
    whole = path.read_bytes()
    local, central = whole.index(b"PK\x03\x04"), whole.index(b"PK\x01\x02")
    for place, value in ((len(whole) // 3, 0xAA), (central + 8, 1), (central + 10, 99)):
        content = bytearray(whole)
        content[place] ^= value
        if place > central:  # said twice
            content[place - central + local - 2] ^= value
        path.write_bytes(bytes(content))
        assert "not an NPZ file of plain arrays" in refusal(name, path, path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "not an NPZ file of plain arrays" in refusal(name, path, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sampling_rate", b"bytes")
    assert "sampling_rate is none" in refusal(name, path, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling_rate": 10**400}, "sampling_rate"),
        ({"sampling_rate": 1e-9}, "0.001 to 1e+06"),  # a second would last for years
        ({"data": [[1, 2], [3]]}, "data is no array of numbers"),
        ({"label": [{"reg": 10**400}]}, "a finite number is right"),
    ],
)
def test_samples_that_hold_something_else(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = written("samples_released", tmp_path)
    (path / "dataset.json").unlink()
    for damaged in (path / "sample_for_downstream").iterdir():
        damaged.write_bytes(pickle.dumps(pickle.loads(damaged.read_bytes()) | changes))
    assert said in refusal("samples_released", path, damaged.with_name("p0_0.pkl"))


def test_a_sample_whose_subject_is_an_array_is_named_by_its_file(tmp_path: Path) -> None:
    path = written("samples_released", tmp_path)
    sample = path / "sample_for_downstream" / "p0_0.pkl"
    sample.write_bytes(pickle.dumps(pickle.loads(sample.read_bytes()) | {"uid": np.zeros(3)}))
    assert load_samples(path).subjects[0] == "p0"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array(["2020-01-01", "2021-01-01"] * 2, "M8[D]"), "text, a number or a list"),
        (np.zeros(4, complex), "text, a number or a list"),
        (np.array(["a", "b"] * 2), "both text and numbers"),
    ],
)
def test_labels_of_no_kind(labels: np.ndarray, said: str, tmp_path: Path) -> None:
    path = written("samples_npz", tmp_path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"y_train": labels})
    assert said in refusal("samples_npz", path, path)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("samples_parquet", "label"),
        ("labelled_parquet", "label"),
        ("windows_parquet", "recording"),
        ("labels_parquet", "recording"),
    ],
)
def test_parquet_text_that_is_no_text(name: str, column: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    table = parquet.read_table(path)
    binary = pa.array([b"\xff\xfe"] * len(table), pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(table), binary.buffers())
    parquet.write_table(table.set_column(table.column_names.index(column), column, text), path)
    refusal(name, path, path)


@pytest.mark.parametrize("duration", ["1e308", "1e30"])
def test_durations_beyond_counting(duration: str, tmp_path: Path) -> None:
    """The first overflowed on its way to samples, the second is more windows than memory holds."""
    path = written("labels_csv", tmp_path)
    path.write_text(path.read_text().replace("44.5", duration))
    assert re.search("above 0|are these seconds", refusal("labels_csv", path, path))


def altered_part(path: Path, change: Callable[[Any], object]) -> None:
    """A Parquet part whose metadata is changed."""
    table = parquet.read_table(path)
    metadata = dict(table.schema.metadata)
    values = json.loads(metadata[METADATA_KEY])
    change(values)
    metadata[METADATA_KEY] = json.dumps(values).encode()
    parquet.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("encoded", lambda v: v.update(units=[[0, 1]])),  # would have lost the other rows
        ("encoded", lambda v: v.update(units=[0])),
        ("encoded_resumed", lambda v: v.update(units=[[10**6, 1]])),
        ("encoded_resumed", lambda v: v["units"][0].__setitem__(1, 99)),
        ("encoded_resumed", lambda v: v.update(tally=[])),
        ("encoded_reported", lambda v: v.pop("tally")),
    ],
)
def test_parts_that_say_something_else(
    name: str, change: Callable[[Any], object], tmp_path: Path
) -> None:
    path = written(name, tmp_path)
    part = path / "part-000000.parquet"
    altered_part(part, change)
    assert "remove it and run" in refusal(name, path, part)


@pytest.mark.parametrize("name", ["encoded", "encoded_reported"])
@pytest.mark.parametrize("column", ["embedding", "recording", "start_s"])
def test_parts_with_other_columns(name: str, column: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    part = path / "part-000001.parquet"
    table = parquet.read_table(part)
    other = pa.array([{"a": 1}] * len(table))
    place = table.column_names.index(column)
    parquet.write_table(table.set_column(place, column, other), part)
    assert f"column {column} is struct" in refusal(name, path, part)


def test_a_report_leaves_out_what_no_map_can_show(tmp_path: Path) -> None:
    """A bit of an embedding that makes it infinite, times beyond a calendar's, a path with a NUL."""
    path = written("encoded_reported", tmp_path)
    part = path / "part-000000.parquet"
    table = parquet.read_table(part)
    place = table.column_names.index("embedding")
    kind = table.schema.field("embedding").type
    values = table["embedding"].to_pylist()
    values[0][0][0] = float("inf")
    parquet.write_table(table.set_column(place, "embedding", pa.array(values, kind)), part)
    alter(path / "manifest.json", "inputs/0/duration_s", 1e200)
    alter(path / "manifest.json", "inputs/0/path", "/a\0b.npz")
    CASES["encoded_reported"].read(path)


def test_an_arrow_shard_whose_offsets_point_beyond_it_is_left_out(tmp_path: Path) -> None:
    """It is mapped: memory beside it would be read, or none be there."""
    path = written("shards_arrow", tmp_path)
    kind = pa.list_(pa.list_(pa.float32(), 130))
    table = pa.table({"series": pa.array([np.ones((7, 130)).tolist()], kind)})
    with pa.ipc.new_file(path / "more.arrow", table.schema) as writer:
        writer.write_table(table)
    whole = (path / "more.arrow").read_bytes()
    place = whole.rindex(np.array([0, 7], np.int32).tobytes())
    for offsets in ([0, 2**20], [0, -5], [5, 1]):
        content = bytearray(whole)
        content[place : place + 8] = np.array(offsets, np.int32).tobytes()
        (path / "more.arrow").write_bytes(bytes(content))
        with pytest.warns(UserWarning, match=r"more\.arrow: left out"):
            assert len(SeriesShards(path, samples=130)) == 3


def test_a_file_that_a_set_lacks_is_the_one_named(tmp_path: Path) -> None:
    """Not the output, which an error of the system was taken for."""
    path = written("raw_physionet_emg", tmp_path)
    damaged = path / "emg_myopathy.dat"
    damaged.unlink()
    assert "No such file" in refusal("raw_physionet_emg", path, damaged)


def test_a_table_that_lacks_a_subject_is_named(tmp_path: Path) -> None:
    path = written("raw_ppg_bp", tmp_path)
    (table,) = path.rglob("*.xlsx")
    rows = [row for row in raw_sets.PPG_BP_ROWS if row[:2] != [2, 3]]
    with zipfile.ZipFile(table, "w") as archive:
        for name, text in raw_sets.xlsx(rows).items():
            archive.writestr(name, text)
    assert "subject 3 is not in" in refusal("raw_ppg_bp", path, table)


def test_workbooks_fail_in_every_way(tmp_path: Path) -> None:
    path = written("raw_ppg_bp", tmp_path)
    (table,) = path.rglob("*.xlsx")
    parts = raw_sets.xlsx(raw_sets.PPG_BP_ROWS)
    for method, place in ((zipfile.ZIP_DEFLATED, 120), (zipfile.ZIP_LZMA, 90)):
        with zipfile.ZipFile(table, "w", method) as archive:
            for name in reversed(parts):
                archive.writestr(name, parts[name])
        content = bytearray(table.read_bytes())
        content[place : place + 40] = b"\xff" * 40
        table.write_bytes(bytes(content))
        assert "not a plain .xlsx" in refusal("raw_ppg_bp", path, table)
    with zipfile.ZipFile(table, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    assert "no sheet in it" in refusal("raw_ppg_bp", path, table)


def test_a_wav_file_without_samples(tmp_path: Path) -> None:
    path = written("raw_fetal_fpcg", tmp_path)
    damaged = path / "subject_03.wav"
    damaged.write_bytes(damaged.read_bytes().replace(b"data", b"dada", 1))
    assert "not a WAV file" in refusal("raw_fetal_fpcg", path, damaged)


def test_a_cnt_file_without_samples(tmp_path: Path) -> None:
    path = written("raw_driver_fatigue", tmp_path)
    damaged = path / "1" / "Fatigue state.cnt"
    damaged.write_bytes(damaged.read_bytes()[: 900 + 75 * len(raw_sets.CNT_ELECTRODES) + 3])
    assert "no samples in it" in refusal("raw_driver_fatigue", path, damaged)


@pytest.mark.parametrize("name", ["w.pth", "checkpoint.pt"])
def test_an_endless_name_in_a_pickle(name: str, tmp_path: Path) -> None:
    """torch.load searched its own message for minutes, in the square of the name's length."""
    path = tmp_path / name
    path.write_bytes(b"\x80\x02c" + b"A" * 200_000 + b"\nx\n.")
    load = load_checkpoint if name == "w.pth" else lambda path: CHECKPOINT.load(path.parent)
    began = time.process_time()
    with pytest.raises(NormWearError, match=f"{name}: not a checkpoint"):
        load(path)
    assert time.process_time() - began < 10  # it took a hundred times as long


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("steps.csv", "step,loss\n1,\xff\n"),
        ("steps.csv", "step,loss\nx,0.5\n"),
        ("steps.csv", "step,loss\n1,much\n"),
        ("steps.csv", "step,loss\n1,0.5,7\n"),
        ("probes.csv", "stop,label\n1,0.5\n"),
    ],
)
def test_curves_that_cannot_be_gone_on_with(file: str, text: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(OutputError, match=rf"{file}: is damaged; move it away"):
        Log(tmp_path, 5).last_losses(3)
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("lacks", ["identity", "step", "model", "optimizer"])
def test_a_checkpoint_without_a_part(lacks: str, tmp_path: Path) -> None:
    state = {"identity": {}, "step": 3, "skipped": 0, "model": {}, "optimizer": {}}
    CHECKPOINT.save(tmp_path, {name: value for name, value in state.items() if name != lacks})
    with pytest.raises(OutputError, match=r"checkpoint\.pt: is damaged"):
        CHECKPOINT.load(tmp_path)


def test_fusion_weights_of_no_use(tmp_path: Path) -> None:
    path = written("fusion", tmp_path)
    file = path / "fusion.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "msitf_aggregator.k.bias"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, file)
    assert "of the wrong type: k.bias float8_e4m3fn" in refusal("fusion", path, file)


def test_a_baseline_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(WeightsError, match=f"^{tmp_path}: cannot be loaded"):
        Clap(str(tmp_path)).embed([np.zeros((1, 65), np.float32)], np.array([65.0]))


@pytest.mark.parametrize("place", [-1, -200, 0, 130])
def test_a_damaged_cache_is_made_anew(place: int, tmp_path: Path) -> None:
    path = written("features_cached", tmp_path)
    (file,) = path.iterdir()
    whole = file.read_bytes()
    content = bytearray(whole)
    content[place] ^= 1
    file.write_bytes(bytes(content))
    CASES["features_cached"].read(path)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("value", "form", "fit"),
    [
        (1, COUNT, True),
        (-1, COUNT, False),
        (True, COUNT, False),
        (2**63, COUNT, False),
        (1, float, True),
        (float("nan"), float, False),
        (10**400, float, False),
        (None, (str, None), True),
        ([], [str], True),
        (["a", 1], [str], False),
        ([[1, 2], [3, 4]], [[COUNT, COUNT]], True),
        ([[1, 2, 3]], [[COUNT, COUNT]], False),
        ({"a": 1, "more": []}, {"a": COUNT}, True),
        ({"b": 1}, {"a": COUNT}, False),
        ({"a": 1, "b": 2}, {str: COUNT}, True),
        ({"a": 1, "b": []}, {str: COUNT}, False),
        ([], {"a": COUNT}, False),
    ],
)
def test_forms(value: Any, form: Any, fit: bool) -> None:
    assert fits(value, form) is fit
