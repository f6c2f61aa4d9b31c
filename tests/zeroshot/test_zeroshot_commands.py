"""`zeroshot-train` and `zeroshot`: from labelled files to answers, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import full_disk, run_command
from zeroshot_parts import MOTION, motion

from normwear_fast.errors import OutputError, UsageError, WeightsError
from normwear_fast.model import FastNormWear
from normwear_fast.zeroshot import MSiTF, ZeroShotClassifier, load_text_encoder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, encoder: FastNormWear) -> Path:
    """An encoder's folder, labelled windows, and recordings."""
    folder = tmp_path_factory.mktemp("workshop")
    encoder.save_pretrained(folder / "encoder")
    data = motion("train")
    np.savez(
        folder / "labelled.npz",
        data=np.stack(data.windows[::4]),
        sampling_rate=10.0,
        label=data.labels[::4],
    )
    words = {
        "questions": list(MOTION.questions),
        "frames": list(MOTION.frames),
        "classes": {label: list(phrases) for label, phrases in MOTION.classes.items()},
    }
    (folder / "wording.json").write_text(json.dumps({"motion": words}))
    (folder / "recordings").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        signal = rng.standard_normal((2, 1300)).cumsum(axis=1)
        if name == "b":
            signal[1, 400:600] = np.nan
        np.savez(
            folder / "recordings" / f"{name}.npz",
            data=signal,
            sampling_rate=100.0,
            channels=np.array(["x", "y"]),
        )
    return folder


@pytest.fixture(scope="module")
def trained(workshop: Path, tiny_llama: Path) -> Path:
    code = run_command(
        "zeroshot_train", workshop / "labelled.npz", "--wording", workshop / "wording.json",
        "--task", "motion", "--weights", workshop / "encoder", "--text", tiny_llama,
        "--output", workshop / "fusion", "--epochs", 1, "--preprocess", "none",
    )  # fmt: skip
    assert code == 0
    return workshop / "fusion"


def ask(workshop: Path, trained: Path, *words: Any) -> int:
    return run_command(
        "zeroshot", *words, "--weights", workshop / "encoder", "--fusion", trained,
        "--question", "is the person still ?", "--option", "yes", "--option", "no",
    )  # fmt: skip


def test_commands_train_then_ask(
    workshop: Path, trained: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    import pyarrow.parquet as pq

    description = json.loads((trained / "fusion.json").read_text())
    assert description["text_encoder"] == str(tiny_llama)
    assert description["preprocess"] == "none"
    capsys.readouterr()
    assert ask(workshop, trained, workshop / "recordings", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["windows"], result["skipped"], result["failed"]) == (4, 1, [])
    assert result["settings"]["preprocess"] == "none"  # what the fusion module was trained with
    skipped = [row for row in result["rows"] if row["probabilities"] is None]
    assert [(row["recording"], row["window_id"]) for row in skipped] == [("b", "0")]
    # The same numbers as the classifier gives in Python, in the same order.
    with np.load(workshop / "recordings" / "a.npz") as arrays:
        signal = arrays["data"]
    classifier = ZeroShotClassifier(
        FastNormWear.from_pretrained(workshop / "encoder", optimized_cwt=True),
        MSiTF.from_pretrained(trained),
        load_text_encoder(tiny_llama),
    )
    windows = [signal[:, :600], signal[:, 600:1200]]
    expected = classifier.predict_proba(windows, "is the person still ?", ["yes", "no"], 100.0)
    rows = [row["probabilities"] for row in result["rows"] if row["recording"] == "a"]
    assert np.abs(np.array(rows) - expected).max() < 1e-5

    output, picture = tmp_path / "out" / "answers.parquet", tmp_path / "why.png"
    code = ask(workshop, trained, workshop / "recordings", "--output", output, "--picture", picture)
    assert code == 0
    table = pq.read_table(output)
    assert [path.name for path in output.parent.iterdir()] == ["answers.parquet"]
    assert table["recording"].to_pylist() == ["a", "a", "b", "b"]
    assert table["probabilities"].to_pylist()[:2] == rows
    assert table["answer"].to_pylist()[2] is None
    provenance = json.loads(table.schema.metadata[b"normwear_fast_zeroshot"])
    assert provenance["options"] == ["yes", "no"]
    assert len(provenance["fusion"]["sha256"]) == 64
    import matplotlib.image

    image = matplotlib.image.imread(picture)
    assert image.shape[0] > 300
    assert image.std() > 0.1

    capsys.readouterr()
    assert ask(workshop, trained, workshop / "recordings" / "a.npz", "--hop", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["p1: yes", "p2: no"]
    assert len(lines) == 3 + 3


def test_nothing_is_replaced_without_being_asked(
    workshop: Path, trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious.parquet"
    precious.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"precious.parquet: exists; choose another"):
        ask(workshop, trained, workshop / "recordings", "--output", precious)
    assert precious.read_bytes() == b"mine"
    assert ask(workshop, trained, workshop / "recordings", "--output", precious, "--overwrite") == 0
    assert precious.read_bytes()[:4] == b"PAR1"
    picture = tmp_path / "why.png"
    picture.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"why.png: exists"):
        ask(workshop, trained, workshop / "recordings", "--picture", picture)
    before = (trained / "fusion.safetensors").read_bytes()
    words = (
        workshop / "labelled.npz", "--wording", workshop / "wording.json", "--task", "motion",
        "--weights", workshop / "encoder", "--text", tiny_llama, "--epochs", 1, "--seed", 3,
    )  # fmt: skip
    with pytest.raises(OutputError, match=r"fusion.safetensors: exists"):
        run_command("zeroshot_train", *words, "--output", trained)
    assert (trained / "fusion.safetensors").read_bytes() == before
    twice = tmp_path / "fusion"
    shutil.copytree(trained, twice)
    assert run_command("zeroshot_train", *words, "--output", twice, "--overwrite") == 0
    assert (twice / "fusion.safetensors").read_bytes() != before


@pytest.mark.usefixtures("capsys")  # in memory: a file that captures what is said would be full too
def test_a_full_disk_is_one_line_and_leaves_nothing(
    workshop: Path, trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    rows, picture = tmp_path / "z.parquet", tmp_path / "z.png"
    with full_disk(10), pytest.raises(OutputError, match=r"z\.parquet: cannot be written"):
        ask(workshop, trained, workshop / "recordings", "--output", rows, "--picture", picture)
    assert list(tmp_path.iterdir()) == []
    # A picture that cannot be written does not cost the rows.
    with full_disk(12_000), pytest.raises(OutputError, match=r"z\.png: cannot be written"):
        ask(workshop, trained, workshop / "recordings", "--output", rows, "--picture", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["z.parquet"]
    for size, message in ((0, "fusion: cannot be written"), (1000, r"tokens\.float16: cannot be")):
        with full_disk(size), pytest.raises(OutputError, match=message):
            run_command(
                "zeroshot_train", workshop / "labelled.npz", "--wording", workshop / "wording.json",
                "--task", "motion", "--weights", workshop / "encoder", "--text", tiny_llama,
                "--output", tmp_path / "fusion", "--epochs", 1,
            )  # fmt: skip
        assert not [path for path in (tmp_path / "fusion").rglob("*") if path.is_file()]


def test_a_damaged_recording_is_listed_and_the_rest_done(
    workshop: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    (tmp_path / "good.npz").write_bytes((workshop / "recordings" / "a.npz").read_bytes())
    assert ask(workshop, trained, tmp_path, "--json") == 1
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert [item["recording"] for item in result["failed"]] == ["bad"]
    assert result["windows"] == 2
    assert shown.err.count("bad.npz") == 1
    assert result["failed"][0]["error"].count("bad.npz") == 1


def test_command_mistakes_are_refused(workshop: Path, trained: Path, tmp_path: Path) -> None:
    recordings = workshop / "recordings"
    base = ("zeroshot", recordings, "--question", "q ?", "--option", "yes")
    with pytest.raises(UsageError, match="at least twice"):
        run_command(*base, "--random-weights", 0, "--fusion", trained)
    with pytest.raises(UsageError, match="--fusion is required"):
        run_command(*base, "--option", "no", "--random-weights", 0)
    with pytest.raises(UsageError, match=r"must end in .parquet"):
        ask(workshop, trained, recordings, "--output", tmp_path / "a.csv")
    with pytest.raises(UsageError, match=r"must end in .png"):
        ask(workshop, trained, recordings, "--picture", tmp_path / "a.bmp")
    with pytest.raises(WeightsError, match="must hold one fusion module"):
        run_command(*base, "--option", "no", "--weights", workshop / "encoder")
    with pytest.raises(UsageError):
        ask(workshop, trained, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no task"):
        run_command(
            "zeroshot_train", workshop / "labelled.npz", "--random-weights", 0, "--output", tmp_path
        )
