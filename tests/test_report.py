"""report: what the page says, that names do no harm, and how a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import find_browser, open_browser
from helpers import full_disk

from normwear_fast import FastNormWear, NormWearConfig
from normwear_fast.cli.main import main
from normwear_fast.report import _channel_missing, build_report, guess_modality
from normwear_fast.report_pictures import _png, image, scatter, strip

CONFIG = replace(NormWearConfig.small(), depth=1)
NASTY = "<script>document.title='taken'<"
IMAGE = '"><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    FastNormWear(True, config=CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings of a minute and one that is none; one has gaps, names are hostile."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for i, name in enumerate(("walk", "gaps", NASTY)):
        data = np.cumsum(rng.standard_normal((2, 65 * 60)), axis=1)
        if name == "gaps":
            data[0, 65 * 30 :] = np.nan
        channels = ["ECG", "PPG" if i else IMAGE]
        np.savez(folder / f"{name}.npz", data=data, sampling_rate=65.0, channels=channels)
    (folder / "broken.npz").write_bytes(b"no archive")
    return folder


def encode(recordings: Path, weights: Path, output: Path, *words: object) -> Path:
    command = ["encode", recordings, "--weights", weights, "--output", output, "--window", 3]
    assert main([str(word) for word in (*command, *words)]) == 1  # broken.npz fails
    return output


@pytest.fixture(scope="module")
def output(recordings: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(recordings, weights, tmp_path_factory.mktemp("encoded") / "out & more")


def section(page: str, heading: str) -> str:
    return page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]


def test_the_page_says_what_the_output_holds(output: Path) -> None:
    page = build_report(output)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["counts"]["ok"] == 50
    assert "<b>50</b>windows encoded" in page
    assert "<b>10</b>windows skipped" in page
    assert "<b>1</b>recordings failed" in page
    assert "<h1>out &amp; more</h1>" in page
    cohort = section(page, "Recordings")
    assert "broken.npz: is no NPZ file" in cohort
    assert "<td>gaps</td><td>0:01:00</td><td>20</td><td>10</td><td>10</td><td>50 %</td>" in cohort
    assert "missing data" in section(page, "Skipped windows")
    assert "10 (17 %)" in section(page, "Skipped windows")
    missing = section(page, "Missing data over time")
    assert missing.count('class="strip"') == 3  # windows, ECG, PPG of gaps alone
    throughput = section(page, "Throughput by stage")
    for stage in ("read", "prepare", "encode", "write", "wall"):
        assert f'<th scope="row">{stage}</th>' in throughput
    maps = section(page, "Map of the embeddings")
    assert maps.count("<circle") == 2 * 100
    assert all(kind in maps for kind in ("</i>ECG", "</i>PPG", "</i>other"))
    window = section(page, "A window and its scalogram")
    assert window.count("data:image/png;base64,") == 2 * 3
    assert window.count("<polyline") == 2


def test_nothing_is_loaded_and_no_name_is_markup(output: Path) -> None:
    page = build_report(output)
    tags = set(re.findall(r"<([a-z][a-z0-9]*)", page))
    assert not tags & {"script", "link", "iframe", "object", "base", "form", "embed"}
    assert not re.findall(r"\bon[a-z]+\s*=", re.sub(r"<title>.*?</title>|>[^<]*<", "><", page))
    sources = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "@import" not in page
    assert "url(" not in page
    assert "&lt;script&gt;document.title=&#x27;taken&#x27;&lt;" in page


def test_the_window_asked_for_is_shown(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    window = section(
        build_report(output, recording="gaps", window_id="4"), "A window and its scalogram"
    )
    assert "Window 4 of gaps, from 12 s, 3 s long" in window
    assert main(["report", str(output), "--recording", "gaps", "--window", "15"]) == 2
    assert "no encoded window 15 of gaps" in capsys.readouterr().err  # it was skipped
    assert main(["report", str(output), "--recording", "nobody"]) == 2
    assert "--recording nobody: not in" in capsys.readouterr().err


@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_pooled_channels_are_one_point_a_window(
    recordings: Path, weights: Path, tmp_path: Path, pooling: str
) -> None:
    folder = encode(recordings, weights, tmp_path / "out", "--channel-pool", pooling)
    maps = section(build_report(folder), "Map of the embeddings")
    assert maps.count("<circle") == 2 * (50 if pooling == "mean" else 100)
    assert ("</i>ECG + PPG" in maps) == (pooling == "mean")


def test_recordings_that_are_gone_or_changed_are_said_to_be(
    recordings: Path, weights: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "recordings"
    shutil.copytree(recordings, moved)
    output = encode(moved, weights, tmp_path / "out")
    (moved / "gaps.npz").write_bytes(b"changed")
    shutil.rmtree(moved / "nobody", ignore_errors=True)
    page = build_report(output, recording="gaps")
    assert "Its channels are not told apart: changed since." in section(
        page, "Missing data over time"
    )
    assert "is not shown" in section(page, "A window and its scalogram")
    (moved / "walk.npz").unlink()
    page = build_report(output, recording="walk")
    assert "no such file or directory." in section(page, "A window and its scalogram")
    assert page.count("data:image/png") == 0


def test_missing_data_is_told_apart_by_channel(recordings: Path, output: Path) -> None:
    manifest = json.loads((output / "manifest.json").read_text())
    entry = next(e for e in manifest["inputs"] if e["recording"] == "gaps")
    (ecg, cells, share), (ppg, whole, none) = _channel_missing(entry, None)
    assert (ecg, ppg, share, none) == ("ECG", "PPG", 0.5, 0.0)
    np.testing.assert_array_equal(cells, np.repeat([0.0, 1.0], 60))
    np.testing.assert_array_equal(whole, 0)


def test_mistakes_are_one_line_and_replace_nothing(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no manifest.json there" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    part = next(copy.glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:1000])
    assert main(["report", str(copy)]) == 2
    streams = capsys.readouterr()
    assert "is damaged" in streams.err
    assert len(streams.err.splitlines()) == 1
    assert main(["report", str(output), "--output", str(tmp_path / "no" / "where.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.tmp"))
    # Nothing but a page is ever replaced, and nothing else written among an output's parts.
    for target in (part, copy / "manifest.json", copy / "new.txt"):
        before = target.read_bytes() if target.exists() else None
        assert main(["report", str(output), "--output", str(target)]) == 2
        assert "a report replaces nothing but a page" in capsys.readouterr().err
        assert (target.read_bytes() if target.exists() else None) == before
    page = tmp_path / "page.html"
    for _ in range(2):
        assert main(["report", str(output), "--output", str(page)]) == 0
    before = page.read_bytes()
    with full_disk(1000):
        assert main(["report", str(output), "--output", str(page)]) == 2
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".page*"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ECG", "ECG"),
        ("MLII", "ECG"),
        ("V5", "ECG"),
        ("aVR", "ECG"),
        ("PLETH", "PPG"),
        ("wrist_bvp", "other"),
        ("BVP", "PPG"),
        ("acc_x", "accelerometer"),
        ("gyro_z", "gyroscope"),
        ("EDA", "EDA"),
        ("Fp1", "EEG"),
        ("EEG Cz-Pz", "EEG"),
        ("Resp", "respiration"),
        ("TEMP", "temperature"),
        ("HR", "heart rate"),
        ("channel_1", "other"),
    ],
)
def test_modalities_are_guessed_from_names(name: str, kind: str) -> None:
    assert guess_modality(name) == kind


def test_pictures_hold_their_values_and_no_markup_of_names() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    data = _png(pixels)
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (4, 2)
    length = struct.unpack(">I", data[33:37])[0]
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(2, 13)
    np.testing.assert_array_equal(rows[:, 1:].reshape(2, 4, 3), pixels)
    assert 'alt="&lt;b&gt;"' in image(np.ones((2, 2)), "<b>")
    cells = strip(np.array([0.0, 1.0, 1.0, np.nan]), "")
    assert re.findall(r'x="(\d)" width="(\d)"', cells) == [("1", "2"), ("3", "1")]
    points = np.array([[0.0, 0.0], [1.0, 1.0]])
    svg = scatter(points, [0, 1], ["<t>", "u"], ["<n>", "m"], ("x", "y"))
    assert "<t>" not in svg
    assert "<n>" not in svg
    still = scatter(np.zeros((3, 2)), [0, 0, 0], ["", "", ""], ["a"], ("x", "y"))
    assert "nan" not in still


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (apt: chromium)")
def test_the_page_is_whole_in_a_browser(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As users see it: loads nothing, runs nothing, fits a phone, draws everything."""
    target = tmp_path / "page.html"
    assert main(["report", str(output), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    with open_browser(tmp_path / "profile") as page:
        for width, height, phone in ((1280, 800, False), (390, 844, True)):
            page.open(target, width, height, phone=phone)
            assert page.evaluate("document.title") == "out & more: embeddings"
            assert page.evaluate("document.scripts.length") == 0
            # Nothing makes the page itself scroll sideways.
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("innerWidth") == width
            assert page.evaluate("[...document.images].every(i => i.naturalWidth > 50)") is True
            assert page.evaluate("document.images.length") == 6
            boxes = page.evaluate(
                "[...document.querySelectorAll('svg, .bar b')].map(e => {"
                " const b = e.getBoundingClientRect(); return [b.left, b.right, b.height] })"
            )
            assert len(boxes) > 10
            assert all(0 <= left < right <= width and tall > 5 for left, right, tall in boxes)
            small = page.evaluate(
                "[...document.querySelectorAll('p, td, th, li, dd')]"
                ".filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length"
            )
            assert small == 0
            names = page.evaluate("document.body.innerText")
            assert NASTY in names
            assert IMAGE in names
        outside = [url for url in page.requests if not url.startswith("data:")]
        assert outside == [target.as_uri()] * 2
        assert page.problems == []
