"""The tuned folder: it predicts recordings as training judged them, is whole, or is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pulse_windows import RATE, encoder, pulses, write_table

from normwear_fast.cli.main import main
from normwear_fast.encode import load_embeddings
from normwear_fast.errors import InputError, OutputError, WeightsError
from normwear_fast.finetune import FineTuner, FineTuneSettings, LabelledWindows, Predictor
from normwear_fast.finetune import predictor as predictor_module


def predict(cohort: Path, model: Path, output: Path, *arguments: str) -> int:
    inputs = [str(cohort / "recordings"), "--model", str(model), "--output", str(output)]
    return main(["predict", *inputs, "--precision", "float32", "--workers", "0", *arguments])


def test_predictions_of_recordings_are_what_training_judged(
    cohort: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(cohort, tuned, tmp_path / "out.parquet") == 1
    assert "damaged.npz" in capsys.readouterr().err
    table = pq.read_table(tmp_path / "out.parquet").to_pandas()
    assert list(table.columns[:6]) == [
        *("recording", "window_id", "start_s", "duration_s", "status", "predicted")
    ]
    assert len(table) == 6 * 9
    assert (table.duration_s == 2).all()
    skipped = table[table.status != "ok"]
    assert set(skipped.recording) == {"r2"}
    assert skipped[["predicted", "probability_fast", "probability_slow"]].isna().all(axis=None)
    good = table[table.status == "ok"]
    np.testing.assert_allclose(good.probability_fast + good.probability_slow, 1, atol=1e-6)
    about = json.loads((tuned / "finetune.json").read_text())
    held = pq.read_table(tuned / "held_out.parquet").to_pandas()
    both = held.merge(table, on=["recording", "window_id"], suffixes=("", "_now"))
    assert len(both) == len(held) == about["data"]["windows"]["validation"]
    np.testing.assert_allclose(both.probability_fast, both.probability_fast_now, atol=1e-6)
    labels = dict(list(csv.reader((cohort / "labels.csv").open()))[i][:2] for i in range(1, 7))
    accuracy = np.mean(
        [labels[r] == p for r, p in zip(both.recording, both.predicted_now, strict=True)]
    )
    assert accuracy == about["metrics"]["validation"]["accuracy"]
    assert accuracy > 0.8
    assert about["data"]["skipped"] == {"missing data": len(skipped)}
    assert about["data"]["recordings_failed"] == 1
    # A second run leaves the file alone, and the same windows by a list are the same.
    assert predict(cohort, tuned, tmp_path / "out.parquet") == 2
    rows = [["r1", 3.0, 2.0], ["r4", 0.0, 2.0]]
    listed = write_table(tmp_path / "list.csv", ["recording", "start_s", "duration_s"], rows)
    assert predict(cohort, tuned, tmp_path / "two.parquet", "--windows", str(listed)) == 0
    two = pq.read_table(tmp_path / "two.parquet").to_pandas()
    want = [
        table[(table.recording == r) & (table.start_s == s)].probability_fast for r, s, _ in rows
    ]
    np.testing.assert_allclose(two.probability_fast, np.concatenate(want), atol=1e-6)


def test_encode_takes_the_folder_and_arrays_predict_like_recordings(
    cohort: Path, tuned: Path, tmp_path: Path
) -> None:
    one = str(cohort / "recordings" / "r1.npz")
    arguments = ["--weights", str(tuned), "--output", str(tmp_path / "out"), "--window", "2"]
    assert main(["encode", one, *arguments, "--precision", "float32", "--workers", "0"]) == 0
    embeddings = load_embeddings(tmp_path / "out", library="numpy")["embedding"]
    found = Predictor.from_pretrained(tuned, precision="float32")
    by_hand = found.predict_embeddings(np.stack(list(embeddings)).reshape(5, -1))
    with np.load(one) as arrays:
        data = arrays["data"]
    windows = [data[:, 128 * k : 128 * (k + 1)] for k in range(5)]
    prediction = found.predict(windows, RATE)
    np.testing.assert_allclose(prediction.values, by_hand, atol=1e-6)
    assert prediction.predicted == ["fast"] * 5
    windows[1] = windows[1].copy()
    windows[1][0, :100] = np.nan
    prediction = found.predict(windows, RATE)
    assert prediction.statuses[1] == "missing data"
    assert np.isnan(prediction.values[1]).all()
    assert prediction.predicted[1] is None


def test_predict_refuses_what_does_not_fit(
    cohort: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Predictor.from_pretrained(tuned, precision="float32")
    with pytest.raises(InputError, match=r"window 0 has 3 channels.*2 channels \(ECG, PPG\)"):
        found.predict(np.zeros((1, 3, 128)), RATE)
    with pytest.raises(InputError, match="lasts 3 s; this model was trained on windows of 2 s"):
        found.predict(np.zeros((1, 2, 192)), RATE)
    other = tmp_path / "other.npz"
    np.savez(other, data=np.zeros((1, 640)), sampling_rate=RATE, channels=np.array(["EDA"]))
    output = str(tmp_path / "out.parquet")
    arguments = ["predict", str(other), "--model", str(tuned), "--workers", "0"]
    assert main([*arguments, "--output", output]) == 2
    assert "no recording has a channel ECG, PPG" in capsys.readouterr().err
    assert main([*arguments, "--output", output, "--window", "4"]) == 2
    assert "trained on windows of 2 s" in capsys.readouterr().err
    names, rows = ["recording", "start_s", "duration_s"], [["other", 0, 3]]
    listed = str(write_table(tmp_path / "list.csv", names, rows))
    assert main([*arguments, "--output", output, "--windows", listed]) == 2
    assert "window 0 of other lasts 3 s" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "out.csv")]) == 2
    assert "end it in .parquet" in capsys.readouterr().err
    arguments.insert(1, str(cohort / "recordings" / "r0.npz"))
    assert main([*arguments, "--output", output]) == 1
    assert "has no channel ECG, PPG; it has EDA" in capsys.readouterr().err
    assert set(pq.read_table(output).to_pandas().recording) == {"r0"}


def test_unnamed_channels_are_counted_and_several_lengths_need_a_window(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows, labels, _, who = pulses(4, 2)
    windows = [window[:, : 100 + 10 * (i % 2)] for i, window in enumerate(windows)]
    data = LabelledWindows.from_arrays(windows, labels, RATE, subjects=who)
    settings = FineTuneSettings(epochs=1, channel_pool="mean", pool="cls", validation=0.5)
    FineTuner(cohort / "weights", settings, precision="float32").fit(data).save_pretrained(
        tmp_path / "model"
    )
    one = tmp_path / "three.npz"
    np.savez(one, data=np.random.default_rng(0).random((3, 256)), sampling_rate=RATE)
    output = tmp_path / "out.parquet"
    assert predict(cohort, tmp_path / "model", output) == 2
    assert "several lengths" in capsys.readouterr().err
    arguments = ["predict", str(one), str(cohort / "recordings" / "r0.npz"), "--workers", "0"]
    arguments += ["--model", str(tmp_path / "model"), "--output", str(output), "--window", "1.6"]
    assert main(arguments) == 1
    assert "has 3 channels" in capsys.readouterr().err
    table = pq.read_table(output).to_pandas()
    assert len(table) == 6
    assert table.probability_fast.notna().all()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "finetune.json").unlink(), "holds no finetune.json"),
        (lambda folder: (folder / "finetune.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "finetune.json").write_text("{}"), "not what finetune writes"),
        (lambda folder: (folder / "head.safetensors").unlink(), "has no head.safetensors"),
        (lambda folder: (folder / "head.safetensors").write_bytes(b"x"), "was replaced or damaged"),
        (lambda folder: encoder(seed=1).save_pretrained(folder), "was replaced or damaged"),
        (lambda folder: edit(folder, format_version=2), "this normwear-fast reads 1"),
        (lambda folder: edit(folder, channel_pool="mean"), "not a head for 2 channels"),
        (lambda folder: edit(folder, preparation={}), "not what finetune writes"),
    ],
)
def test_a_folder_that_does_not_hold_together_is_refused(
    damage: Any, said: str, tuned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tuned, folder)
    damage(folder)
    with pytest.raises(WeightsError, match=said):
        Predictor.from_pretrained(folder)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "finetune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_appears_whole_or_not_at_all(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Predictor.from_pretrained(tuned, precision="float32")
    output = tmp_path / "model"
    written: list[str] = []

    def fails(path: Path, tensors: Any) -> None:
        written.append(path.name)
        raise OSError(28, "No space left on device")

    (tmp_path / ".model.new").mkdir()  # what a killed run left behind
    (tmp_path / ".model.new" / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module, "write_safetensors", fails)
        with pytest.raises(OutputError, match="No space left"):
            found.save_pretrained(output)
    assert written == ["head.safetensors"]
    assert list(tmp_path.iterdir()) == []
    found.save_pretrained(output)
    with pytest.raises(OutputError, match="exists"):
        found.save_pretrained(output)
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module, "write_safetensors", fails)
        with pytest.raises(OutputError, match="No space left"):
            found.save_pretrained(output, overwrite=True)
    Predictor.from_pretrained(output)
    found.save_pretrained(output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (output / "notes.txt").write_text("mine")
    found.save_pretrained(output, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years")
    with pytest.raises(OutputError, match="is no fine-tuned model"):
        found.save_pretrained(foreign, overwrite=True)
    assert (foreign / "chapter.txt").exists()
