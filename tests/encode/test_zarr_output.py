"""Patch-level output: what the Zarr store holds, that xarray reads it, and that kills leave no trace."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_runs import PATCH, SETTINGS, content, make_cohort, models, run

from normwear_fast import engine
from normwear_fast.encode import load_embeddings, read_window_list
from normwear_fast.encode.output import PATCHES
from normwear_fast.encode.patches import STATUSES, group_path
from normwear_fast.encode.pipeline import Silent, default_tokens
from normwear_fast.encode.prepare import MISSING, OK
from normwear_fast.encode.settings import EncodeSettings
from normwear_fast.errors import UsageError

zarr = pytest.importorskip("zarr")

RECORDINGS = ("a", "b", "c/d", "c/e", "f")


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output") / "out"
    summary = run(cohort, output, PATCH)
    assert summary.exit_code == 0
    assert sorted(os.listdir(output)) == ["manifest.json", "part-000000.parquet", PATCHES]
    return output


def opened(output: Path, recording: str) -> Any:
    import xarray

    return xarray.open_zarr(output / PATCHES, group=group_path(recording), consolidated=False)


def test_xarray_reads_windows_channels_tokens(undisturbed: Path) -> None:
    table = load_embeddings(undisturbed)
    assert "embedding" not in table.columns
    for recording in RECORDINGS:
        rows = table[table.recording == recording]
        data = opened(undisturbed, recording)
        assert data.attrs["recording"] == recording
        assert data.embedding.dims == ("window", "channel", "token", "dimension")
        assert data.embedding.dtype == np.float16
        assert list(data.channel.values) == list(rows.channels.iloc[0])
        assert list(data.window_id.values) == list(rows.window_id)
        np.testing.assert_array_equal(data.start_s, rows.start_s)
        np.testing.assert_array_equal(data.duration_s, rows.duration_s)
        np.testing.assert_array_equal(data.missing_fraction, rows.missing_fraction)
        assert [STATUSES[code] for code in data.status.values] == list(rows.status)
        absent = np.isnan(data.embedding.values).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(absent, rows.status != OK)
    gap = opened(undisturbed, "c/e")
    assert STATUSES.index(MISSING) in gap.status.values
    assert gap.status.attrs["flag_meanings"].split()[STATUSES.index(MISSING)] == "missing_data"
    one = gap.sel(channel="S1").swap_dims(window="start_s").sel(start_s=0.0)
    assert np.isfinite(one.embedding.values).all()


def test_tokens_pool_to_the_pooled_output(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "out", SETTINGS)
    pooled = load_embeddings(tmp_path / "out")
    for recording in RECORDINGS:
        patches = opened(undisturbed, recording).embedding.values.astype(np.float32)
        rows = pooled[pooled.recording == recording]
        for tokens, row in zip(patches, rows.itertuples(), strict=True):
            if row.status == OK:
                # float16 keeps 11 bits of values of about 1.
                np.testing.assert_allclose(tokens.mean(axis=1), row.embedding, atol=2e-3)


def test_store_is_sharded_by_units_of_float16(undisturbed: Path) -> None:
    array = zarr.open_group(undisturbed / PATCHES, mode="r")["a/embedding"]
    assert array.metadata.zarr_format == 3
    assert array.shape == (16, 2, 183, 64)
    assert array.chunks == (1, 1, 183, 64)
    assert array.shards == (4, 2, 183, 64)
    shards = [name for name in content(undisturbed) if name.startswith("a/embedding/c/")]
    assert len(shards) == 4


def test_listed_windows_of_several_lengths_share_an_array(cohort: Path, tmp_path: Path) -> None:
    listed = tmp_path / "windows.csv"
    listed.write_text(
        "recording,window_id,start_s,duration_s\n"
        "a,first,0,2\na,long,3.5,4\na,last,20,1\n"
        "a,x1,21,1\na,x2,22,1\na,x3,23,1\na,x4,24,1.5\na,x5,25,2\nb,only,1,3\n"
    )
    windows = read_window_list(listed)
    settings = replace(PATCH, window=None, hop=None, windows=windows.digest, unit_tokens=1800)
    output = tmp_path / "out"
    summary = run(cohort, output, settings, windows=windows)
    assert summary.units > 2
    data = opened(output, "a")
    assert list(data.window_id.values) == ["first", "long", "last", "x1", "x2", "x3", "x4", "x5"]
    assert data.sizes["token"] == data.tokens.max()
    assert len(set(data.tokens.values.tolist())) == 4
    for window in range(data.sizes["window"]):
        count = int(data.tokens[window])
        values = data.embedding[window].values
        assert np.isfinite(values[:, :count]).all()
        assert np.isnan(values[:, count:]).all()
    assert opened(output, "b").sizes["window"] == 1


class Damage(Silent):
    """Spoils a recording that has been looked at already."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, windows: int, done: int) -> None:
        self.path.write_bytes(b"PK\x03\x04")


def test_recording_that_cannot_be_read_has_no_group(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "cohort")
    summary = run(folder, tmp_path / "out", PATCH, progress=Damage(folder / "b.npz"))
    assert list(summary.failed) == ["b"]
    assert (opened(tmp_path / "out", "a").status.values == STATUSES.index(OK)).all()
    assert not (tmp_path / "out" / PATCHES / "b").exists()
    # It shared a unit with the recording after it, whose windows are where they should be.
    data = opened(tmp_path / "out", "c/d")
    assert (data.status.values == STATUSES.index(OK)).all()
    assert np.isfinite(data.embedding.values).all()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import encode_runs
from normwear_fast.encode import output, pipeline
pipeline.PART_SECONDS = 0.0
cohort, folder = Path(sys.argv[1]), Path(sys.argv[2])
replace = output._replace
left = 0

def dying(path, content):
    # Half of the file is written, or the file is there and what should follow is not.
    global left
    left -= 1
    if left == 0:
        if how == "half":
            path.with_name("." + path.name + ".tmp").write_bytes(content[: len(content) // 2])
        else:
            replace(path, content)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(path, content)

def child(steps):
    global left
    pid = os.fork()
    if pid == 0:
        left = steps
        encode_runs.run(cohort, folder, encode_runs.PATCH)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

output._replace = dying
kills = 0
for i, steps in enumerate(map(int, sys.argv[3:])):
    how = ("half", "whole")[i % 2]
    code = child(steps)
    assert code in (0, -signal.SIGKILL), code
    kills += code != 0
assert child(0) == 0
print(kills)
"""


def test_killed_in_the_middle_of_shards_ends_in_the_same_store(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    seed = np.random.SeedSequence().entropy % 2**32  # type: ignore[operator]
    print(f"kill seed {seed}")  # shown by pytest on failure
    steps = np.random.default_rng(seed).integers(1, 50, 6).tolist()  # of some 130 files
    script = KILLED.format(tests=str(Path(__file__).parents[1]))
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", script, str(cohort), str(output), *map(str, steps)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 2
    assert content(output) == content(undisturbed)  # no temporary files either
    rows = load_embeddings(output)
    assert rows.equals(load_embeddings(undisturbed))
    assert not rows.duplicated(["recording", "window_id"]).any()
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    assert run(cohort, output, PATCH).already_complete
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_overwrite_removes_the_store(cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(cohort, output, PATCH)
    run(cohort, output, SETTINGS, overwrite=True)
    assert not (output / PATCHES).exists()
    assert "embedding" in load_embeddings(output).columns


def test_every_recording_has_a_group_of_its_own() -> None:
    ids = ["a", "a/embedding", "a/b", "%", "%25", "..", "__x", "status", "zarr.json", "é/channel"]
    paths = [group_path(recording) for recording in ids]
    assert len(set(paths)) == len(ids)
    assert paths[0] == "a"
    assert paths[1] == "a/%65mbedding"
    assert not any(name in ("embedding", "..", "zarr.json") for p in paths for name in p.split("/"))


def test_a_recording_above_another_keeps_its_group(tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    for name in ("x/y", "x"):
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, data=np.random.default_rng(0).standard_normal((1, 300)), sampling_rate=65.0)
    run(folder, tmp_path / "out", PATCH)
    for name in ("x/y", "x"):
        assert opened(tmp_path / "out", name).attrs["recording"] == name


def test_patches_keep_channels_and_bounded_units(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="channel_pool 'mean' pools what pool 'patch' keeps"):
        EncodeSettings(pool="patch", channel_pool="mean")
    for memory, tokens in ((0, 131_072), (16 * 2**30, 131_072), (24 * 2**30, 262_144)):
        monkeypatch.setattr(engine, "_smallest_gpu", lambda memory=memory: memory)
        assert default_tokens(EncodeSettings(), "cuda").unit_tokens == 8 * tokens
        large = default_tokens(EncodeSettings(pool="patch"), "cuda")
        assert large.unit_tokens == large.batch_tokens == 131_072
        assert default_tokens(EncodeSettings(), "cpu").batch_tokens == 3_360


def test_values_that_float16_cannot_hold_are_skipped(cohort: Path, tmp_path: Path) -> None:
    def loud(threads: int | None) -> list[Any]:
        (model,) = models(threads)
        encode = model.encode_unit
        model.encode_unit = lambda *args, **options: [1e6 * v for v in encode(*args, **options)]
        return [model]

    summary = run(cohort, tmp_path / "out", PATCH, load_models=loud)
    assert summary.tally.ok == 0
    assert set(load_embeddings(tmp_path / "out").status) == {
        "values beyond the model's range",
        MISSING,
    }
