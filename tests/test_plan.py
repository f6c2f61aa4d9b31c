"""plan: its counts against what encode then writes, its devices, its words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from normwear_fast import FastNormWear, NormWearConfig, load_embeddings
from normwear_fast.benchmarking import channel_flops
from normwear_fast.cli.main import main
from normwear_fast.planning import Device, _bytes, _si, _span, known_devices, named_devices


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, seconds, channels in (("one", 13.7, 2), ("two", 7.0, 3), ("three", 40.0, 1)):
        data = rng.standard_normal((channels, round(65 * seconds)))
        if name == "three":
            data[:, 650:1950] = np.nan  # windows there become rows without an embedding
        np.savez(folder / f"{name}.npz", data=data, sampling_rate=65.0)
    return folder


def planned(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    capsys.readouterr()
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("pooling", ["keep", "mean", "concat", "patch"])
def test_counts_and_bytes_are_those_of_the_run(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pooling: str
) -> None:
    choices = [recordings, "--window", 3, "--hop", "0.25"]
    choices += ["--pool", "patch"] if pooling == "patch" else ["--channel-pool", pooling]
    plan = planned(capsys, *choices, "--model-size", "small")
    weights = tmp_path / "weights"
    # As wide as the small model, and quicker: width decides the bytes, depth does not.
    config = replace(NormWearConfig.small(), depth=1)
    FastNormWear(True, config=config).save_pretrained(weights)
    out = tmp_path / "out"
    words = ["encode", *choices, "--weights", weights, "--output", out]
    assert main([str(word) for word in words]) == 0
    rows = load_embeddings(out, columns=["channels", "status"])
    assert plan["windows"] == len(rows)
    assert plan["channel_windows"] == rows.channels.map(len).sum()
    assert (rows.status != "ok").sum() > 50
    manifest = json.loads((out / "manifest.json").read_text())
    assert plan["units"] == manifest["counts"]["units"]
    # Of the skipped rows nothing is stored: before reading nobody knows them.
    share = (rows.channels.map(len) * (rows.status == "ok")).sum() / plan["channel_windows"]
    if pooling == "mean":
        share = (rows.status == "ok").mean()
    files = (out / "patches.zarr").rglob("*") if pooling == "patch" else out.glob("part-*")
    written = sum(file.stat().st_size for file in files)
    assert written == pytest.approx(plan["output_bytes"] * share, rel=0.15)


def test_flops_are_counted_window_by_window(
    recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, recordings, "--window", 6)
    config = NormWearConfig.base()
    counts = {2: 2, 3: 1, 1: 6}  # channels -> windows
    expected = sum(n * c * channel_flops(config, 390, c) for c, n in counts.items())
    assert plan["flops"] == pytest.approx(expected, rel=1e-12)
    assert plan["flops"] / plan["channel_windows"] == pytest.approx(107e9, rel=0.01)


def test_a_list_of_windows_is_planned_as_listed(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = tmp_path / "windows.csv"
    listing.write_text("recording,start_s,duration_s\none,0,3\none,1,6\nthree,0,6\n")
    plan = planned(capsys, recordings, "--windows", listing)
    config = NormWearConfig.base()
    assert (plan["windows"], plan["channel_windows"], plan["recordings"]) == (3, 5, 2)
    expected = 2 * channel_flops(config, 195, 2) + 2 * channel_flops(config, 390, 2)
    assert plan["flops"] == pytest.approx(expected + channel_flops(config, 390, 1), rel=1e-12)
    assert main(["plan", str(recordings), "--windows", str(listing), "--hop", "1"]) == 2
    assert "leave out --window and --hop" in capsys.readouterr().err


def test_dry_run_prints_the_plan(recordings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(recordings), "--window", "3"]
    assert main(["plan", *words]) == 0
    plan = capsys.readouterr().out
    assert main(["encode", *words, "--dry-run", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == plan
    assert "would encode 19 windows (27 channel-windows" in plan
    for device in known_devices():
        assert f"{device.name} " in plan
        assert f"{device.basis} {device.date}: {device.source}" in plan


def test_devices_are_found_by_name_and_number(
    recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, float8, eight, _ = named_devices(["h100", "8xH100"])
    assert (one.precision, float8.precision) == ("bfloat16", "fp8")
    assert one.hours(8e15) == pytest.approx([8 * hours for hours in eight.hours(8e15)])
    assert one.hours(one.flops_per_s[1] * 3600)[0] == pytest.approx(1)
    plan = planned(capsys, recordings, "--device", "8xH100", "--device", "H100")
    assert [device["count"] for device in plan["devices"]] == [8, 8, 1, 1]
    for device, named in zip(plan["devices"][::2], (eight, one), strict=True):
        assert device["hours"] == pytest.approx(named.hours(plan["flops"]))
    assert main(["plan", str(recordings), "--device", "Z80"]) == 2
    error = capsys.readouterr().err
    assert "--device Z80: not known; it must be one of " in error
    assert "H100" in error


def test_every_device_says_what_it_rests_on() -> None:
    devices = known_devices()
    assert len({(device.name, device.precision) for device in devices}) == len(devices)
    for device in devices:
        assert device.basis in ("measured", "modelled")
        assert 1e9 < device.flops_per_s[0] <= device.flops_per_s[1] < 1e16
        assert device.date
        assert device.source


def test_a_recording_that_cannot_be_encoded_is_left_out_of_the_plan(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    assert main(["plan", str(recordings), str(tmp_path), "--json"]) == 1
    streams = capsys.readouterr()
    assert len(streams.err.splitlines()) == 1
    plan = json.loads(streams.out)
    assert (plan["recordings"], plan["recordings_failed"], plan["windows"]) == (4, 1, 9)


def test_numbers_have_units_that_people_read() -> None:
    assert [_si(v) for v in (1.07e11, 5.13e12, 2e20)] == ["107 G", "5.13 T", "200 E"]
    assert [_bytes(v) for v in (12, 1.5e3, 2.34e12)] == ["12 bytes", "1.5 kB", "2.34 TB"]
    assert _span((200.4, 250.6)) == "200 to 251 h"
    assert _span((0.5, 0.75)) == "30 to 45 min"
    assert _span((0.001, 0.001)) == "3.6 s"
    device = Device("a", "float32", "measured", (3.6e12, 3.6e12), "2026-01-01", "here")
    assert _span(device.hours(3.6e12 * 3600)) == "1 h"
