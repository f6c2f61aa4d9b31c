"""Every file but recordings that a user hands to us, or that we left and read again: how a small good one
is written, and how it is read; and a process that reads damaged ones, which test_damaged_files drives.

A line of JSON in, {"name", "write"} or {"name", "path", "damaged"}; a line out: how it ended. The
process has an end to its memory, and its replacement costs the driver nothing when it crashes.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pickle
import re
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from damaged_reader import peak_resident
from helpers import write_llama

MEMORY = 8 << 30  # bytes of address space; the libraries alone map some 5 GB
GROWTH = 300 << 10  # kB that reading one small file may add to the most that was resident


@dataclass(frozen=True)
class Case:
    """One kind of file or folder.

    Args:
        write: writes a good one into an empty folder; returns what a user names, beside which it may
            put what the reading needs.
        read: reads it as a user would, and asserts what must hold of whatever is taken.
        slow: it needs a library that takes seconds to import.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    slow: bool = False


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@lru_cache(maxsize=1)
def tiny() -> Any:
    """The sizes of an encoder of some 10,000 values."""
    from normwear_fast.config import NormWearConfig

    return NormWearConfig(
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        grid_rows=3,
        pretrain_samples=30,
        pretrain_channels=2,
    )


@lru_cache(maxsize=1)
def encoder() -> Any:
    from normwear_fast import FastNormWear

    return FastNormWear(True, config=tiny(), precision="float32")


# --- labelled windows ------------------------------------------------------------------------------


def check_samples(found: Any) -> None:
    count = len(found)
    assert count
    assert all(w.ndim == 2 and w.size and w.dtype == np.float32 for w in found.windows)
    assert np.isfinite(found.sampling_rates).all()
    assert (found.sampling_rates > 0).all()
    for task, labels in zip(found.tasks, found.labels, strict=True):
        assert len(labels) == count
        if task.kind == "class":
            assert 0 <= labels.min() <= labels.max() < len(task.classes)
        else:
            assert np.isfinite(labels).all()
    assert found.is_test is None or found.is_test.shape == (count,)
    assert len(found.subjects) == len(found.ids) == count


def read_samples(path: Path) -> None:
    from normwear_fast.evaluate.samples import load_samples

    check_samples(load_samples(path))


def write_samples_npz(folder: Path) -> Path:
    np.savez(
        folder / "set.npz",
        x_train=noise(4, 2, 130),
        y_train=np.arange(4) % 2,
        x_test=noise(2, 2, 130, seed=1),
        y_test=np.arange(2) % 2,
        sampling_rate=65.0,
    )
    return folder / "set.npz"


def write_samples_parquet(folder: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "data": list(noise(4, 2, 130).astype(np.float32).tolist()),
        "sampling_rate": [65.0] * 4,
        "subject": ["a", "a", "b", "c"],
        "split": ["train", "train", "test", "test"],
        "label": ["rest", "stress", "rest", "stress"],
    }
    parquet.write_table(pa.table(columns), folder / "set.parquet")
    return folder / "set.parquet"


def write_samples_folder(folder: Path) -> Path:
    path = folder / "set"
    path.mkdir()
    rows = [["file", "label", "subject", "split", "sampling_rate"]]
    for index in range(4):
        np.save(path / f"s{index}.npy", noise(2, 130, seed=index))
        split = "test" if index == 3 else "train"
        rows.append([f"s{index}.npy", f"{index % 2}", f"p{index}", split, "65"])
    with (path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_samples_released(folder: Path) -> Path:
    path = folder / "set"
    (path / "sample_for_downstream").mkdir(parents=True)
    names = [f"p{index}_0.pkl" for index in range(4)]
    for index, name in enumerate(names):
        sample = {
            "uid": f"p{index}",
            "data": noise(1, 390).astype(np.float16),
            "sampling_rate": 65,
            "label": [{"class": index % 2}],
        }
        (path / "sample_for_downstream" / name).write_bytes(pickle.dumps(sample, protocol=4))
    split = {"train": names[:3], "test": names[3:]}
    (path / "train_test_split.json").write_text(json.dumps(split, indent=0))
    (path / "dataset.json").write_text(json.dumps({"dataset": "ecg-abnormal"}))
    return path


def raw(key: str, without: str = "", make: Callable[[Path], None] | None = None) -> Case:
    """A public set as downloaded, through `prepare`, whose output must then be readable.

    Args:
        key: of the set.
        without: pattern of files that are not needed, of a large one.
        make: writes its files; that of `raw_sets` by default.
    """

    def write(folder: Path) -> Path:
        import raw_sets

        (make or getattr(raw_sets, f"make_{key.replace('-', '_')}"))(folder / "raw")
        for path in (folder / "raw").rglob(without) if without else ():
            path.unlink()
        return folder / "raw"

    def read(path: Path) -> None:
        from normwear_fast.evaluate.prepare import prepare
        from normwear_fast.evaluate.samples import load_samples

        output = path.parent / "prepared"
        prepare(key, path, output)
        for made in (output, output / "samples.parquet"):
            found = load_samples(made)
            check_samples(found)
            assert all(np.isfinite(window).all() for window in found.windows)

    return Case(write, read)


def make_epilepsy_uci(raw: Path) -> None:
    """The other layout of Epilepsy, a row a second."""
    raw.mkdir()
    header = ["", *(f"X{i}" for i in range(1, 179)), "y"]
    rows = [
        [f"X{second}.V1.{recording}", *np.round(100 * noise(178, seed=second)), 1 + recording % 5]
        for recording in range(1, 7)
        for second in (1, 2)
    ]
    with (raw / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_prepared(folder: Path) -> Path:
    """What preparation leaves as one Parquet, which names its set."""
    from normwear_fast.evaluate.prepare import prepare

    prepare("ecg-abnormal", raw("ecg-abnormal").write(folder), folder / "out")
    return folder / "out" / "samples.parquet"


def write_labelled(path: Path) -> Path:
    """Windows for zeroshot-train."""
    data, label = noise(4, 2, 60), ["Standing", "Walking"] * 2
    if path.suffix == ".npz":
        np.savez_compressed(path, data=data, sampling_rate=10.0, label=label, task=["motion"] * 4)
        return path
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"data": data.tolist(), "sampling_rate": [10.0] * 4, "label": label}
    parquet.write_table(pa.table({**columns, "task": ["motion"] * 4}), path)
    return path


def read_labelled(path: Path) -> None:
    from normwear_fast.errors import within
    from normwear_fast.zeroshot.training import at_model_rate, read_labelled

    data = read_labelled(path)
    assert len(data) == len(data.sampling_rates) == len(data.tasks) == len(data.labels) > 0
    assert all(w.ndim == 2 and w.size and w.dtype == np.float32 for w in data.windows)
    with within(path):
        ready = at_model_rate(data, "reference")
    assert all(np.isfinite(window).all() for window in ready.windows)


# --- tables ----------------------------------------------------------------------------------------


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
        return path
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


WINDOWS: dict[str, list[Any]] = {
    "recording": ["a", "a", "b/c"],
    "start_s": [0.0, 6.5, 12.25],
    "duration_s": [6.0, 6.0, 4.5],
    "window_id": ["first", "second", "third"],
}
LABELS: dict[str, list[Any]] = {
    "recording": ["a", "a", "b/c", "d"],
    "start_s": [0.0, 60.0, 12.25, 1.0],
    "duration_s": [30.0, 30.0, 44.5, 12.0],
    "label": ["rest", "stress", "rest", "stress"],
    "subject": ["s1", "s1", "s2", "s3"],
    "split": ["train", "train", "validation", "test"],
}


def read_windows(path: Path) -> None:
    from normwear_fast.encode.windows import read_window_list

    for listed in read_window_list(path).recordings.values():
        assert np.isfinite(listed.starts).all()
        assert (listed.durations > 0).all()
        assert len(set(listed.ids)) == len(listed)


def read_labels(path: Path) -> None:
    from normwear_fast.finetune.labels import read_labels

    table = read_labels(path)
    assert len(table.labels) == len(table.recordings) == len(table.subjects) > 0
    if table.stretches is not None:
        windows, row_of, _ = table.window_list(2.0, None)
        assert len(row_of) == sum(map(len, windows.recordings.values()))


# --- outputs of encode and of prepare --------------------------------------------------------------


def write_recordings(folder: Path) -> Path:
    folder.mkdir()
    for name, seconds in (("a", 9.0), ("b", 4.2)):
        data = noise(2, round(65 * seconds), seed=len(name))
        np.savez(folder / f"{name}.npz", data=data, sampling_rate=65.0, channels=["ECG", "PPG"])
    return folder


ROWS = 6  # windows of 2 s in the recordings


def encode(inputs: Path, output: Path) -> None:
    from normwear_fast.encode import EncodeSettings, encode_recordings, pipeline

    settings = EncodeSettings(window=2.0, batch_tokens=500, unit_tokens=900)
    before, pipeline.PART_SECONDS = pipeline.PART_SECONDS, 0.0  # every unit is a part
    try:
        encode_recordings([inputs], output, settings, lambda threads: [encoder()])
    finally:
        pipeline.PART_SECONDS = before


def write_encoded(folder: Path) -> Path:
    encode(write_recordings(folder / "recordings"), folder / "out")
    return folder / "out"


def write_stopped(folder: Path) -> Path:
    """An output whose last part is still to be made."""
    output = write_encoded(folder)
    (*_, last) = sorted(output.glob("part-*"))
    last.unlink()
    return output


def read_encoded(path: Path) -> None:
    from normwear_fast.encode import load_embeddings

    frame = load_embeddings(path)
    arrays = load_embeddings(path, "numpy")
    assert len(frame) == len(arrays["embedding"]) == ROWS


def go_on_encoding(path: Path) -> None:
    encode(path.parent / "recordings", path)
    read_encoded(path)


def read_report(path: Path) -> None:
    from normwear_fast.report import write_report

    page = write_report(path).read_text(encoding="utf-8")
    assert page.endswith("</html>\n")


def prepare_series(inputs: Path, output: Path) -> Any:
    from normwear_fast.encode import EncodeSettings
    from normwear_fast.pretrain import prepare as module

    before = module.SHARD_SECONDS, module.UNIT_CHANNELS
    module.SHARD_SECONDS, module.UNIT_CHANNELS = 0.0, 4
    try:
        return module.prepare_series([inputs], output, EncodeSettings(window=2.0))
    finally:
        module.SHARD_SECONDS, module.UNIT_CHANNELS = before


def write_series(folder: Path) -> Path:
    prepare_series(write_recordings(folder / "recordings"), folder / "series")
    (*_, last) = sorted((folder / "series").glob("part-*"))
    last.unlink()
    return folder / "series"


def go_on_preparing(path: Path) -> None:
    summary = prepare_series(path.parent / "recordings", path)
    assert summary.windows == ROWS


def shards(suffix: str) -> Case:
    def write(folder: Path) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        path = folder / "shards"
        path.mkdir()
        kind = pa.list_(pa.list_(pa.float32(), 130))
        table = pa.table({"series": pa.array(noise(3, 2, 130).tolist(), kind)})
        if suffix == ".parquet":
            parquet.write_table(table, path / "part.parquet")
        else:
            with pa.ipc.new_file(path / "part.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return path

    def read(path: Path) -> None:
        from normwear_fast.pretrain.data import SeriesShards

        found = SeriesShards(path, samples=130)
        for index in range(len(found)):
            series = found.series(index)
            assert series.shape[1] == 130
            assert np.isfinite(series).all()

    return Case(write, read)


# --- weights and models ----------------------------------------------------------------------------


def write_weights(folder: Path) -> Path:
    encoder().save_pretrained(folder / "weights")
    return folder / "weights"


def read_weights(path: Path) -> None:
    from normwear_fast import FastNormWear

    model = FastNormWear.from_pretrained(path, precision="float32")
    model.requires_grad_(False)
    embedding = model.get_embedding(noise(1, 2, 130).astype(np.float32))
    assert embedding.shape[3] == model.config.embed_dim


def pickled(**options: Any) -> Case:
    def write(folder: Path) -> Path:
        import torch

        torch.save({"model": encoder().state_dict()}, folder / "w.pth", **options)
        return folder / "w.pth"

    def read(path: Path) -> None:
        from normwear_fast.weights import convert

        report = convert(path, path.parent / "converted", config=tiny())
        assert report.names > 10

    return Case(write, read)


def write_fusion(folder: Path) -> Path:
    from normwear_fast.zeroshot import MSiTF

    fusion = MSiTF(16, 24)
    fusion.description = {"text_encoder": "a-text-encoder", "preprocess": "reference"}
    fusion.save_pretrained(folder / "fusion")
    return folder / "fusion"


def read_fusion(path: Path) -> None:
    import torch

    from normwear_fast.encode import EncodeSettings
    from normwear_fast.zeroshot import MSiTF

    fusion = MSiTF.from_pretrained(path)
    tokens = torch.zeros(2, 5, fusion.embed_dim)
    assert fusion.fuse([tokens], torch.zeros(1, fusion.query_dim)).shape == (1, fusion.query_dim)
    EncodeSettings(preprocess=fusion.description.get("preprocess") or "reference")
    Path(fusion.description.get("text_encoder") or "")


def write_wording(folder: Path) -> Path:
    words = {
        "motion": {
            "questions": ["What is done?", "How does the wearer move?"],
            "frames": ["The person is {}.", "Someone is {}."],
            "classes": {"walk": ["walking", "strolling"], "run": ["running"]},
        },
        "rate": {
            "questions": ["How fast is the heart?"],
            "frames": ["The heart beats {}."],
            "unit": "a minute",
            "decimals": 1,
        },
    }
    (folder / "wording.json").write_text(json.dumps(words, indent=1))
    return folder / "wording.json"


def read_wording(path: Path) -> None:
    from normwear_fast.zeroshot import load_wording

    for words in load_wording(path).values():
        for label in words.classes or (words.label(61.25),):
            assert words.training_answers(label)
            assert words.held_out_answer(words.label(label))
        assert words.held_out_question() in words.questions


WORDS = ["yes", "no", "a", "person", "is", "walking", "?"]


def write_text_encoder(folder: Path) -> Path:
    return write_llama(folder / "text", WORDS)


def write_sentences(folder: Path) -> Path:
    """The same as a sentence-transformers folder."""
    path = write_text_encoder(folder)
    modules = [
        {"idx": i, "name": str(i), "path": where, "type": f"sentence_transformers.models.{kind}"}
        for i, (where, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    (path / "modules.json").write_text(json.dumps(modules, indent=1))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=1))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}, indent=1))
    return path


def read_text_encoder(path: Path) -> None:
    from normwear_fast.zeroshot import load_text_encoder

    text = load_text_encoder(path)
    assert text.encode(["a person is walking", "yes"]).shape == (2, text.width)


def write_finetuned(folder: Path) -> Path:
    from normwear_fast.evaluate.registry import Task
    from normwear_fast.finetune.data import Preparation
    from normwear_fast.finetune.network import Head
    from normwear_fast.finetune.predictor import Predictor

    task = Task("label", "state recognition", ("rest", "stress"))
    preparation = Preparation(window=2.0, hop=1.0, channels=("ECG", "PPG"), channel_count=2)
    predictor = Predictor(encoder(), Head(32, task), task, "mean", "concat", preparation)
    predictor.save_pretrained(folder / "model")
    return folder / "model"


def read_finetuned(path: Path) -> None:
    from normwear_fast.finetune.pipeline import _settings
    from normwear_fast.finetune.predictor import Predictor

    predictor = Predictor.from_pretrained(path, precision="float32")
    _settings(predictor, None if predictor.preparation.window else 2.0, None, None, None)
    channels, seconds = predictor.preparation.channel_count, predictor.preparation.window or 2.0
    found = predictor.predict(noise(1, channels, round(65 * seconds)))
    assert found.values.shape == (1, len(predictor.task.classes or predictor.task.targets))


class _Stopped(Exception):
    pass


def tune(folder: Path, say: Callable[[str], None] = lambda line: None) -> Any:
    from normwear_fast.finetune import FineTuner, FineTuneSettings, LabelledWindows

    data = LabelledWindows.from_arrays(noise(8, 1, 65), list("abababab"), subjects=list("11223344"))
    settings = FineTuneSettings(mode="full", epochs=1, batch_size=4)
    tuner = FineTuner(encoder(), settings, device="cpu", precision="float32", progress=say)
    return tuner.fit(data, folder)


def write_begun_tuning(folder: Path) -> Path:
    """The folder of a run that ended as its encoder was trained."""
    from normwear_fast.finetune import resume

    def stop(line: str) -> None:
        if line.startswith("full, epoch 1"):
            raise _Stopped

    before = resume.LEAST_SECONDS, resume.TIMES_ITS_WRITING
    resume.LEAST_SECONDS = resume.TIMES_ITS_WRITING = 0  # type: ignore[assignment]
    try:
        with contextlib.suppress(_Stopped):
            tune(folder / "run", stop)
    finally:
        resume.LEAST_SECONDS, resume.TIMES_ITS_WRITING = before
    return folder / "run"


def go_on_tuning(path: Path) -> None:
    assert len(tune(path).history) > 2


# --- pretraining -----------------------------------------------------------------------------------


class _Waves:
    """Series in memory."""

    def __len__(self) -> int:
        return 3

    def series(self, index: int) -> np.ndarray:
        return noise(2, 390, seed=index).astype(np.float32)


def pretrain(folder: Path) -> Any:
    from normwear_fast.pretrain.settings import PretrainSettings, RunSettings
    from normwear_fast.pretrain.trainer import pretrain

    settings = PretrainSettings(steps=1, batch_size=1, accumulate=1, warmup=0)
    run = RunSettings(accelerator="cpu", devices=1, picture_every=0, probe_every=0)
    return pretrain(_Waves(), tiny(), settings, folder, run=run)


def write_pretrained(folder: Path) -> Path:
    pretrain(folder / "run")
    (folder / "run" / "probes.csv").write_text("step,set label\n1,0.5\n")
    return folder / "run"


def go_on_pretraining(path: Path) -> None:
    report = pretrain(path)
    assert report.step >= 1


def write_config(folder: Path) -> Path:
    (folder / "sizes.json").write_text(tiny().to_json())
    return folder / "sizes.json"


def read_config(path: Path) -> None:
    from normwear_fast.cli.pretrain import _config
    from normwear_fast.weights import expected_shapes

    assert expected_shapes(_config(str(path)))


# --- caches ----------------------------------------------------------------------------------------


def features(cache: Path | None) -> np.ndarray:
    from normwear_fast.evaluate.baselines import Statistics, embeddings
    from normwear_fast.evaluate.samples import SampleSet

    samples = SampleSet(
        name="mine",
        windows=list(noise(3, 2, 130).astype(np.float32)),
        sampling_rates=np.full(3, 65.0),
        subjects=np.full(3, ""),
        tasks=(),
        labels=(),
        is_test=None,
        ids=["0", "1", "2"],
    )
    return embeddings(samples, Statistics(), cache)


def write_features(folder: Path) -> Path:
    features(folder / "cache")
    return folder / "cache"


def read_features(path: Path) -> None:
    np.testing.assert_array_equal(features(path), features(None))


CASES: dict[str, Case] = {
    "samples_npz": Case(write_samples_npz, read_samples),
    "samples_parquet": Case(write_samples_parquet, read_samples),
    "samples_folder": Case(write_samples_folder, read_samples),
    "samples_released": Case(write_samples_released, read_samples),
    "samples_prepared": Case(write_prepared, read_samples),
    "raw_wesad": raw("wesad"),
    "raw_uci_har": raw("uci-har"),
    "raw_driver_fatigue": raw("driver-fatigue"),
    "raw_epilepsy": raw("epilepsy"),
    "raw_epilepsy_uci": raw("epilepsy", make=make_epilepsy_uci),
    "raw_gameemo": raw("gameemo", without="S*G[234]*"),
    "raw_ecg_abnormal": raw("ecg-abnormal"),
    "raw_ppg_bp": raw("ppg-bp"),
    "raw_physionet_emg": raw("physionet-emg"),
    "raw_noninvasive_bp": raw("noninvasive-bp", without="14.json"),
    "raw_ppg_hgb": raw("ppg-hgb"),
    "raw_fetal_fpcg": raw("fetal-fpcg"),
    "labelled_npz": Case(lambda folder: write_labelled(folder / "l.npz"), read_labelled),
    "labelled_parquet": Case(lambda folder: write_labelled(folder / "l.parquet"), read_labelled),
    "windows_csv": Case(lambda folder: write_table(folder / "w.csv", WINDOWS), read_windows),
    "windows_parquet": Case(
        lambda folder: write_table(folder / "w.parquet", WINDOWS), read_windows
    ),
    "labels_csv": Case(lambda folder: write_table(folder / "l.csv", LABELS), read_labels),
    "labels_parquet": Case(lambda folder: write_table(folder / "l.parquet", LABELS), read_labels),
    "encoded": Case(write_encoded, read_encoded),
    "encoded_resumed": Case(write_stopped, go_on_encoding),
    "encoded_reported": Case(write_encoded, read_report),
    "series_resumed": Case(write_series, go_on_preparing),
    "shards_arrow": shards(".arrow"),
    "shards_parquet": shards(".parquet"),
    "pretrain_resumed": Case(write_pretrained, go_on_pretraining, slow=True),
    "pretrain_config": Case(write_config, read_config),
    "weights": Case(write_weights, read_weights),
    "weights_pth": pickled(),
    "weights_pth_legacy": pickled(_use_new_zipfile_serialization=False),
    "fusion": Case(write_fusion, read_fusion),
    "wording": Case(write_wording, read_wording),
    "text_encoder": Case(
        lambda folder: write_llama(folder / "text", WORDS), read_text_encoder, slow=True
    ),
    "sentence_encoder": Case(write_sentences, read_text_encoder, slow=True),
    "finetune_resumed": Case(write_begun_tuning, go_on_tuning, slow=True),
    "finetuned": Case(write_finetuned, read_finetuned),
    "features_cached": Case(write_features, read_features),
}


# --- the process -----------------------------------------------------------------------------------


def is_named(damaged: Path, text: str) -> bool:
    """Whether a text names a file, or a folder that it lies in and not another file of that folder."""
    if damaged.name in text:
        return True
    return any(
        re.search(re.escape(str(folder)) + r"(?![\w/.-])", text) for folder in damaged.parents
    )


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def outcome(name: str, path: Path, damaged: Path) -> dict[str, str]:
    from normwear_fast.errors import NormWearError

    place = path.parent
    before = files_below(place)
    try:
        with warnings.catch_warnings(record=True):
            CASES[name].read(path)
    except NormWearError as error:
        text = str(error)
        if not text.isprintable() or len(text) > error.longest:
            return {"class": "not one line", "why": text[:2000]}
        if not is_named(damaged, text):
            return {"class": "names another file", "why": text[:2000]}
        left = files_below(place) - before
        if left and name not in ("encoded_resumed", "series_resumed"):
            return {"class": "half written", "why": f"{text[:1000]}; {sorted(map(str, left))}"}
        return {"class": "refused", "why": text[:2000]}
    return {"class": "read"}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    read: set[str] = set()
    for line in sys.stdin:
        request = json.loads(line)
        before = peak_resident()
        name = request["name"]
        try:
            if "write" in request:
                path = CASES[name].write(Path(request["write"]))
                answer = {"class": "written", "path": str(path)}
            else:
                answer = outcome(name, Path(request["path"]), Path(request["damaged"]))
                grown = peak_resident() - before
                if grown > GROWTH and name in read:
                    answer = {"class": "memory", "why": f"{grown >> 10} MB more resident"}
                read.add(name)  # from now on its libraries are imported
        except BaseException as error:
            answer = {"class": "traceback", "why": "".join(traceback.format_exception(error))}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
