"""The output folder: its own files alone, one writer, no input of itself, read back everywhere."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encode_runs import SETTINGS, StopAfter, make_cohort, rows, run

from normwear_fast.cli.main import main
from normwear_fast.encode import EncodeSettings, load_embeddings, pipeline
from normwear_fast.encode.output import METADATA_KEY, OutputFolder
from normwear_fast.encode.survey import find_inputs
from normwear_fast.errors import OutputError, UsageError
from normwear_fast.pretrain.prepare import prepare_series

pytestmark = pytest.mark.usefixtures("writer_keeps_up")


def test_overwrite_removes_its_own_files_only(cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(cohort, output)
    (output / "notes.txt").write_text("mine")
    summary = run(cohort / "b.npz", output, overwrite=True)
    assert summary.windows == 4
    assert len(load_embeddings(output)) == 4
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused(
    overwrite: bool, cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / "part-000000.parquet").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        run(cohort, tmp_path, overwrite=overwrite)
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(OutputError, match="not a manifest of encode"):
        run(cohort, tmp_path, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "part-000000.parquet"]


def test_a_part_of_another_run_or_damaged_is_refused(cohort: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(cohort / "b.npz", tmp_path / name)
    part = tmp_path / "one" / "part-000000.parquet"
    part.write_bytes((tmp_path / "two" / part.name).read_bytes())
    with pytest.raises(OutputError, match="belongs to another run"):
        run(cohort / "b.npz", tmp_path / "one")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(OutputError, match="damaged"):
        run(cohort / "b.npz", tmp_path / "one")
    part.unlink()
    assert run(cohort / "b.npz", tmp_path / "one").encoded == 4


def test_a_second_writer_is_refused(cohort: Path, tmp_path: Path) -> None:
    class Second(pipeline.Silent):
        error = ""

        def advance(self, windows: int) -> None:
            with pytest.raises(OutputError) as caught:
                run(cohort, tmp_path / "out", overwrite=True)
            self.error = str(caught.value)

    second = Second()
    assert run(cohort, tmp_path / "out", progress=second).exit_code == 0
    assert f"written by another run (process {os.getpid()})" in second.error


def test_output_inside_the_inputs_is_no_input(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "in")
    run(folder, folder / "out", progress=StopAfter(1))
    assert run(folder, folder / "out").failed == {}


def test_earlier_outputs_below_the_input_are_no_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of encode, prepare, finetune, pretrain and predict: not encoded, and no reason to refuse."""
    folder = make_cohort(tmp_path / "in")
    names = {each.id for each in find_inputs([folder], None)}
    run(folder, folder / "deep" / "out_mean")
    series = EncodeSettings(window=6.0)
    prepare_series([folder], folder / "series", series)
    for name, start, table in (
        ("tuned", ("finetune.json", '{\n  "format": "normwear-fast finetune",'), "epochs.csv"),
        ("run", ("steps.csv", "step,loss,learning_rate,gradient_norm,skipped\n"), "probes.csv"),
    ):
        (folder / name).mkdir()
        (folder / name / start[0]).write_text(start[1])
        (folder / name / table).write_text("time,value\n0,1\n")
    part = folder / "deep" / "out_mean" / "part-000000.parquet"
    shutil.copy(part, folder / "copy_of_a_part.parquet")
    metadata = {"normwear_fast_zeroshot": json.dumps({"question": "x" * 300})}
    answers = pa.table({"start_s": [0.0]}).replace_schema_metadata(metadata)
    pq.write_table(answers, folder / "answers.parquet")
    assert {each.id for each in find_inputs([folder], None)} == names

    run(folder, folder / "out_cls", replace(SETTINGS, pool="cls"))
    assert {row[0] for row in rows(folder / "out_cls")} == names
    # A run with a sibling that came later goes on.
    assert run(folder, folder / "deep" / "out_mean").already_complete
    assert prepare_series([folder], folder / "series", series).already_complete
    assert main(["inspect", str(folder), "--json"]) == 0
    assert {each["id"] for each in json.loads(capsys.readouterr().out)["recordings"]} == names
    with pytest.raises(UsageError, match="out_cls: was written by normwear-fast"):
        run(folder / "out_cls", tmp_path / "new")

    # Only by what is in them: tables and manifests of others are what they were.
    (folder / "manifest.json").write_text('{"format": "something else"}')
    pq.write_table(pa.table({"normwear_fast": [0.0] * 200}), folder / "mine.parquet")
    (folder / "cut.parquet").write_bytes(part.read_bytes()[:-20])
    found = {each.id for each in find_inputs([folder], None)}
    assert found == names | {"mine", "cut"}


@pytest.mark.parametrize("how", ["keep", "mean", "concat"])
def test_the_output_reads_back_everywhere(how: str, cohort: Path, tmp_path: Path) -> None:
    """Null and ragged rows included, in pyarrow, pandas, polars, duckdb and NumPy."""
    import duckdb
    import pandas
    import polars
    import pyarrow.dataset

    output = tmp_path / "out"
    run(cohort, output, replace(SETTINGS, channel_pool=how))
    files = str(output / "part-*.parquet")
    wanted = load_embeddings(output)
    embeddings = [None if e is None else e.tolist() for e in wanted.embedding]
    assert embeddings.count(None) == 2

    assert load_embeddings(output, "pyarrow")["embedding"].to_pylist() == embeddings
    dataset = pyarrow.dataset.dataset(str(output), exclude_invalid_files=True)
    assert dataset.to_table()["embedding"].to_pylist() == embeddings
    assert load_embeddings(output, "polars")["embedding"].to_list() == embeddings
    assert polars.scan_parquet(files).collect()["embedding"].to_list() == embeddings
    found = duckdb.sql(f"select embedding, status from '{files}'").fetchall()
    assert [
        None if e is None else [list(c) if how == "keep" else c for c in e] for e, _ in found
    ] == (embeddings)
    assert [status for _, status in found] == wanted.status.tolist()
    frame = pandas.read_parquet(output / "part-000000.parquet")
    assert [e is None for e in frame.embedding] == [e is None for e in embeddings]
    np.testing.assert_array_equal(np.stack(frame.embedding[0]), wanted.embedding[0])

    arrays = load_embeddings(output, "numpy")
    if how == "mean":
        assert arrays["embedding"].shape == (len(wanted), 64)
        assert np.isnan(arrays["embedding"]).all(axis=1).sum() == 2
    else:
        assert arrays["embedding"].dtype == object
    assert list(arrays["window_id"]) == wanted.window_id.tolist()
    some = load_embeddings(output, columns=["recording", "status"])
    assert list(some.columns) == ["recording", "status"]
    with pytest.raises(UsageError, match="no column colour"):
        load_embeddings(output, columns=["colour"])
    with pytest.raises(UsageError, match=r"columns is 'status'; it must be a list .*\['status'\]"):
        load_embeddings(output, columns="status")
    with pytest.raises(UsageError, match="columns is empty; name at least one"):
        load_embeddings(output, columns=[])


def test_parts_are_written_for_reading(undisturbed: Path) -> None:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(undisturbed / "part-000000.parquet")
    columns = {
        (column := metadata.row_group(0).column(i)).path_in_schema: column
        for i in range(metadata.num_columns)
    }
    embedding = columns["embedding.list.element.list.element"]
    assert "BYTE_STREAM_SPLIT" in embedding.encodings
    assert not embedding.has_dictionary_page
    assert embedding.compression == "ZSTD"
    described = json.loads(metadata.metadata[METADATA_KEY])
    assert described["schema"] == 1
    assert described["scalogram"] == "conv"
    assert sum(count for _, count in described["units"]) == metadata.num_rows


def test_lock_is_gone_and_empty_folders_too(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "b") as folder:
        assert (folder.path / ".lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
