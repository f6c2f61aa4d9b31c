"""`normwear-fast evaluate`: its report, repeatable, of several sets and models, and wrong usage."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from evaluation_sets import small_set
from helpers import BASIC_MOTIONS, full_disk, run_command
from raw_sets import make_ecg_abnormal

from normwear_fast.errors import InputError, NormWearError, OutputError
from normwear_fast.evaluate import baselines
from normwear_fast.evaluate.registry import Task
from normwear_fast.evaluate.run import evaluate, write_report

command = partial(run_command, "probe")


def run_basic_motions(capsys: Any, *arguments: str) -> dict[str, Any]:
    code = command(
        str(BASIC_MOTIONS),
        "--model",
        "random-small",
        "--baseline",
        "statistics",
        "--json",
        *arguments,
    )
    assert code == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def tiny_random(monkeypatch, tiny):
    """`--model random-small` at a size that leaves the suite fast."""
    from normwear_fast.config import NormWearConfig

    monkeypatch.setattr(NormWearConfig, "small", classmethod(lambda cls: tiny.model.config))


def test_basic_motions_side_by_side_and_reproducible(capsys, tiny_random, tmp_path):
    seed = ("--resamples", "200", "--seed", "3")
    first = run_basic_motions(capsys, "--no-cache", *seed)
    again = run_basic_motions(capsys, "--cache", str(tmp_path / "c"), *seed)
    cached = run_basic_motions(capsys, "--cache", str(tmp_path / "c"), *seed)
    assert first == again == cached
    rows = {row["model"]: row for row in first["results"]}
    assert set(rows) == {"random-small", "statistics"}
    for row in rows.values():
        assert (row["train"], row["test"], row["metric"]) == (40, 40, "auc")
        assert row["score"] > 0.9  # random features already separate this set
        assert row["interval"]["low"] <= row["score"] <= row["interval"]["high"]
    assert first["comparisons"][0]["models"] == ["random-small", "statistics"]
    command(
        str(BASIC_MOTIONS), "--baseline", "raw", "--no-cache", "--protocol", "partial", "--json"
    )
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["train"], row["protocol"]) == (4, "partial")


@pytest.mark.slow
def test_basic_motions_with_the_small_model(capsys):
    found = run_basic_motions(capsys, "--no-cache")
    assert all(row["score"] > 0.99 for row in found["results"])


def test_the_command_writes_a_report(capsys, tiny_random, tmp_path):
    output = tmp_path / "out"
    code = command(
        *(str(BASIC_MOTIONS), "--baseline", "statistics", "--baseline", "raw", "--no-cache"),
        *("--output", str(output), "--resamples", "100", "--shuffle-channels"),
    )
    assert code == 0
    text = capsys.readouterr().out
    columns = "data model protocol train test metric score % 95 % interval accuracy %"
    assert text.splitlines()[0].split() == columns.split()
    assert "permutation p" in text
    page = (output / "report.html").read_text()
    assert page.count("<img") == page.count("data:image/png;base64,") >= 6
    assert "http" not in page.replace("http-equiv", "")
    names = {path.name for path in (output / "pictures").iterdir()}
    assert "scores-full.png" in names
    assert "ROC-basic-motions-raw-full.svg" in names
    assert json.loads((output / "results.json").read_text())["settings"]["shuffle_channels"]
    with pytest.raises(OutputError, match="exists"):
        command(str(BASIC_MOTIONS), "--baseline", "raw", "--output", str(output))


def test_a_set_given_twice_is_used_once(capsys, monkeypatch):
    monkeypatch.chdir(BASIC_MOTIONS.parent)
    again = [str(BASIC_MOTIONS), BASIC_MOTIONS.name, str(BASIC_MOTIONS)]
    options = ["--baseline", "statistics", "--no-cache", "--resamples", "0", "--json"]
    assert command(*again, *options) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [row["dataset"] for row in found["results"]] == ["basic_motions"]
    assert found["comparisons"] == []
    notes = [line for line in said.err.splitlines() if line.startswith("note:")]
    assert notes == [
        f"note: {BASIC_MOTIONS.name} is given twice, as {BASIC_MOTIONS} too; it is used once",
        f"note: {BASIC_MOTIONS} is given twice; it is used once",
    ]


def test_a_class_is_named_as_the_data_have_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"data": [[[1.0, 2.0, 4.0]]] * 6, "label": [1] * 6, "sampling_rate": [65.0] * 6}
    pq.write_table(pa.table(rows), tmp_path / "ones.parquet")
    with pytest.raises(InputError, match="label: class '1' alone in training; two or more"):
        command(str(tmp_path / "ones.parquet"), "--baseline", "raw", "--no-cache")


def test_the_command_lists_and_prepares(capsys, tmp_path):
    assert command("--list") == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 11 + 18
    assert command("--list", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 11
    make_ecg_abnormal(tmp_path / "raw")
    arguments = ["ecg-abnormal", "--prepare", str(tmp_path / "raw"), "--output"]
    assert command(*arguments, str(tmp_path / "a"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 20
    assert command(*arguments, str(tmp_path / "b")) == 0
    assert "ECG-Abnormal: 20 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no DATASET given"),
        (["x.npz"], "nothing to probe"),
        (["x.npz", "--baseline", "raw"], "no such data set"),
        (["x", "--prepare", "y"], "takes one DATASET"),
        (["x", "--prepare", "y", "--output", "z"], "no downstream set 'x'"),
        ([str(BASIC_MOTIONS), "--baseline", "raw", "--seed", "-1"], "0 or more"),
        ([str(BASIC_MOTIONS), "--baseline", "raw", "--device", "tpu"], "not on this machine"),
        ([str(BASIC_MOTIONS), "--baseline", "raw", "--protocol", "folds"], "without a subject"),
    ],
)
def test_wrong_usage_is_refused(arguments, message):
    with pytest.raises(NormWearError, match=message):
        command(*arguments)


@pytest.mark.usefixtures("capsys")  # in memory: a file that captures what is said would be full too
def test_results_that_cannot_be_written_leave_nothing_by_halves(tmp_path):
    """Known before any feature is made; and a disk that fills up later leaves nothing by halves."""
    output = tmp_path / "out"
    arguments = (str(BASIC_MOTIONS), "--baseline", "statistics", "--resamples", "0", "--no-cache")
    with full_disk(), pytest.raises(OutputError, match=r"out: cannot be written"):
        command("nowhere", *arguments[1:], "--output", str(output))
    assert not output.exists()
    with full_disk(50), pytest.raises(OutputError, match=r"results\.json: cannot be written"):
        command(*arguments, "--output", str(output))
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_a_report_of_several_sets_and_models_compares_them(tmp_path):
    other = small_set()
    other.name, other.tasks = "other", (Task("sick", "EEG", ("no", "yes")),)
    third = small_set(n=14)
    third.name = "third"
    result = evaluate([small_set(), other, third], [baselines.Statistics(), _Means()], resamples=20)
    names = {path.name for path in write_report(result, tmp_path / "out")}
    assert {"radar-full.png", "critical-difference-full.svg", "report.html"} <= names


class _Means:
    name = "means"

    def identity(self) -> dict[str, Any]:
        return {}

    def embed(self, windows: Any, rates: Any) -> np.ndarray:
        return np.stack([window.mean(axis=1, keepdims=True) for window in windows])
