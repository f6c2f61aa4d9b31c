"""The training loop: resume, schedule, what bad numbers do, and the command."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import full_disk
from pretrain_runs import CPU, SETTINGS, TINY, Waves

import normwear_fast.pretrain.data as pretrain_data
from normwear_fast import FastNormWear
from normwear_fast.checkpoint import CHECKPOINT_FILE, Checkpoint, locked
from normwear_fast.cli.main import main
from normwear_fast.errors import InputError, OutputError, UsageError
from normwear_fast.pretrain.autoencoder import MaskedAutoencoder
from normwear_fast.pretrain.logs import PROBES_FILE, STEPS_FILE
from normwear_fast.pretrain.settings import PretrainSettings
from normwear_fast.pretrain.trainer import MAX_SKIPPED, Order, _Task, parameter_groups, pretrain
from normwear_fast.weights import load_checkpoint


def curve(folder, columns=("step", "loss", "learning_rate", "gradient_norm", "skipped")):
    with (folder / STEPS_FILE).open(newline="") as file:
        return [tuple(row[name] for name in columns) for row in csv.DictReader(file)]


def weights_of(folder):
    return load_checkpoint(folder).state_dict


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    report = pretrain(Waves(), TINY, SETTINGS, folder, run=CPU)
    assert (report.step, report.steps, report.skipped) == (6, 6, 0)
    return folder


# -- what a run leaves -----------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_model(whole):
    losses = [float(loss) for _, loss in curve(whole, ("step", "loss"))]
    assert len(losses) == SETTINGS.steps
    assert losses[-1] < 0.9 * losses[0]
    model = FastNormWear.from_pretrained(whole)
    assert model.config == TINY
    assert model.optimized_cwt
    assert model.get_embedding(np.ones((1, 2, 390), np.float32)).shape == (1, 2, 560, 32)
    assert any((whole / "tensorboard").iterdir())
    kinds = {name: value.dtype for name, value in weights_of(whole).items()}
    plain = MaskedAutoencoder(TINY).state_dict()
    assert kinds == {name: value.dtype for name, value in plain.items()}


def test_batch_norm_statistics_are_saved(whole):
    saved = weights_of(whole)
    assert saved["spatial_recon.norm.num_batches_tracked"] == SETTINGS.steps * SETTINGS.accumulate
    assert not torch.equal(
        saved["spatial_recon.norm.running_mean"], torch.zeros(4 * TINY.decoder_embed_dim)
    )


# -- going on --------------------------------------------------------------------------------------


RUN = """
import sys
sys.path[:0] = {path!r}
from dataclasses import replace
from pretrain_runs import CPU, SETTINGS, TINY, Waves
from normwear_fast.pretrain.trainer import pretrain
pretrain(Waves(), TINY, SETTINGS, {folder!r}, run=replace(CPU, checkpoint_every=2))
"""


def test_killed_in_the_middle_of_an_epoch(whole, tmp_path):
    """SIGKILL between two checkpoints, epochs of 5 windows against steps of 4: the same losses, bit
    for bit, and the same weights."""
    torch_threads = str(torch.get_num_threads())
    code = RUN.format(path=sys.path, folder=os.fspath(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": torch_threads}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        while not (tmp_path / STEPS_FILE).exists() or len(curve(tmp_path)) < 3:
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    said = []
    pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU, say=said.append)
    assert said[0].startswith("going on after step ")
    assert curve(tmp_path) == curve(whole)
    wanted = weights_of(whole)
    for name, value in weights_of(tmp_path).items():
        assert torch.equal(value, wanted[name]), name


def test_ctrl_c_saves_and_goes_on(whole, tmp_path, monkeypatch):
    def make(*args, **options):
        make.calls += 1
        if make.calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(*args, **options)

    make.calls, batch = 0, pretrain_data.training_batch
    monkeypatch.setattr(pretrain_data, "training_batch", make)
    before = signal.getsignal(signal.SIGINT)
    report = pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU)
    assert 0 < report.step < SETTINGS.steps
    assert signal.getsignal(signal.SIGINT) is before
    assert pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU).step == SETTINGS.steps
    assert curve(tmp_path) == curve(whole)


def test_a_run_that_goes_on_holds_its_weights_once(tmp_path, monkeypatch):
    def load(self, folder):
        state = loaded(self, folder)
        if state is not None:
            seen.append(weakref.ref(state["model"]["cls_token"]))
        return state

    def step(self, *args):
        seen.append(seen[0]() is None)
        return taken(self, *args)

    def killed(self, *args):
        if args[4] == 4:
            raise RuntimeError("killed")
        return taken(self, *args)

    seen, loaded, taken = [], Checkpoint.load, _Task._step
    monkeypatch.setattr(_Task, "_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(Waves(), TINY, SETTINGS, tmp_path, run=replace(CPU, checkpoint_every=3))
    monkeypatch.setattr(Checkpoint, "load", load)
    monkeypatch.setattr(_Task, "_step", step)
    pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU)
    assert seen[1:] == [True] * 3


@pytest.mark.parametrize(
    ("settings", "shards", "message"),
    [
        (replace(SETTINGS, seed=6), Waves(), "seed was 5, is 6"),
        (replace(SETTINGS, steps=9), Waves(), "steps was 6, is 9"),
        (SETTINGS, Waves(6), "series was 5, is 6"),
    ],
)
def test_another_run_in_the_folder(settings, shards, message, whole):
    before = (whole / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(OutputError, match=message):
        pretrain(shards, TINY, settings, whole, run=CPU)
    assert (whole / CHECKPOINT_FILE).read_bytes() == before


def test_finished_run_is_left_as_it_is(whole):
    before = (whole / "model.safetensors").stat().st_mtime_ns
    assert pretrain(Waves(), TINY, SETTINGS, whole, run=CPU).step == SETTINGS.steps
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


def test_folder_of_a_run_in_progress(tmp_path):
    with locked(tmp_path), pytest.raises(OutputError, match="another run is writing it"):
        pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint(whole, tmp_path):
    content = (whole / CHECKPOINT_FILE).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        (tmp_path / CHECKPOINT_FILE).write_bytes(damaged)
        with pytest.raises(OutputError, match=r"damaged; nothing in it was run"):
            pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b"weights", "config.json": b"{}"},
        {"manifest.json": b"{}", "part-000000.arrow": b"series"},
        {"night.edf": b"recording"},
        {"steps.csv": b"time,steps\n1,2\n"},
        {"pictures/holiday.jpg": b"picture"},
        {".hidden": b""},
    ],
    ids=lambda files: next(iter(files)),
)
def test_a_folder_of_something_else_is_refused(files, overwrite, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="not an output of pretrain"):
        pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_program_is_not_overwritten(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / CHECKPOINT_FILE)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"not a checkpoint of|not an output of pretrain"):
            pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_overwrite_starts_anew_and_leaves_other_files(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "notes.txt").write_text("mine")
    other = replace(SETTINGS, seed=6)
    pretrain(Waves(), TINY, other, folder, run=CPU, overwrite=True)
    assert len(curve(folder)) == SETTINGS.steps
    assert curve(folder) != curve(whole)
    assert (folder / "notes.txt").read_text() == "mine"
    # Weights whose checkpoint was removed are not replaced by a run that begins again.
    (folder / CHECKPOINT_FILE).unlink()
    before = contents(folder)
    with pytest.raises(OutputError, match=r"but no checkpoint\.pt to go on from"):
        pretrain(Waves(), TINY, other, folder, run=CPU)
    assert contents(folder) == before


def test_pictures_of_an_earlier_run_are_gone(tmp_path):
    """With --overwrite all that it drew, and nothing else; a run that goes on redraws the later ones."""
    drawing = replace(CPU, picture_every=2, checkpoint_every=4)
    pretrain(Waves(), TINY, SETTINGS, tmp_path, run=drawing)
    pictures = tmp_path / "pictures"
    drawn = {f"reconstruction-00000{step}.png" for step in (2, 4, 6)}
    assert {path.name for path in contents(pictures)} == drawn
    mine = {"reconstruction-000002 best.png": b"mine", "holiday.png": b"mine"}
    for name, content in mine.items():
        (pictures / name).write_bytes(content)
    other = replace(SETTINGS, steps=4, seed=6)
    rarely = replace(drawing, picture_every=4)
    pretrain(Waves(), TINY, other, tmp_path, run=rarely, overwrite=True)
    found = {path.name: content for path, content in contents(pictures).items()}
    assert set(found) == {*mine, "reconstruction-000004.png"}
    assert {name: found[name] for name in mine} == mine
    # As a kill after step 6 leaves it, whose last checkpoint is of step 4.
    (pictures / "reconstruction-000006.png").write_bytes(b"of steps that are not counted")
    pretrain(Waves(), TINY, other, tmp_path, run=rarely)
    assert {path.name: content for path, content in contents(pictures).items()} == found


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("normwear_fast.pretrain.trainer.MaskedAutoencoder", None)
    with pytest.raises(OutputError, match=r"run: cannot be written \(Read-only file system\)"):
        pretrain(Waves(), TINY, SETTINGS, tmp_path / "run", run=CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line(tmp_path):
    """In whatever file: the weights' checkpoint, the curves, TensorBoard's; nothing stays by halves."""
    for size in (10, 300, 5000):
        folder = tmp_path / str(size)
        with full_disk(size), pytest.raises(OutputError, match="cannot be written"):
            pretrain(Waves(), TINY, SETTINGS, folder, run=CPU)
        assert not {"checkpoint.pt", "model.safetensors"} & {path.name for path in folder.iterdir()}
    assert pretrain(Waves(), TINY, SETTINGS, folder, run=CPU).step == SETTINGS.steps


# -- numbers that are none -------------------------------------------------------------------------


def test_steps_without_a_finite_loss_change_nothing(tmp_path, monkeypatch):
    """Steps 2 and 4 meet a NaN and an infinity: skipped, counted, no weight and no statistic of them."""
    batch = pretrain_data.training_batch
    # A micro-batch is known by the generator it is given.
    poison = [
        (np.random.default_rng((SETTINGS.seed, 1, number)).bit_generator.state, value)
        for number, value in ((2, np.nan), (7, np.inf))
    ]

    def poisoned(shards, indices, *, rng, **options):
        start = rng.bit_generator.state
        found = batch(shards, indices, rng=rng, **options)
        for state, value in poison:
            if start == state:
                found[0, 1, 100] = value
        return found

    monkeypatch.setattr(pretrain_data, "training_batch", poisoned)
    report = pretrain(Waves(), TINY, SETTINGS, tmp_path, run=CPU)
    assert report.skipped == 2
    rows = curve(tmp_path, ("step", "loss", "skipped"))
    assert [skipped for _, _, skipped in rows] == ["0", "1", "1", "2", "2", "2"]
    assert [math.isfinite(float(loss)) for _, loss, _ in rows] == [True, False] * 2 + [True] * 2
    saved = weights_of(tmp_path)  # load_checkpoint refuses what is not finite
    assert saved["spatial_recon.norm.num_batches_tracked"] == 4 * SETTINGS.accumulate


def test_a_run_that_only_skips_ends(tmp_path, monkeypatch):
    batch = pretrain_data.training_batch
    monkeypatch.setattr(
        pretrain_data, "training_batch", lambda *a, **o: batch(*a, **o) * np.float32(np.nan)
    )
    settings = replace(SETTINGS, steps=200, batch_size=1, accumulate=1)
    with pytest.raises(InputError, match=f"steps 1 to {MAX_SKIPPED}: no finite loss"):
        pretrain(Waves(), TINY, settings, tmp_path, run=CPU)


# -- the recipe ------------------------------------------------------------------------------------


def test_learning_rate():
    settings = PretrainSettings(steps=100, warmup=10)
    rates = [settings.learning_rate(step, 512) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(2e-3)
    assert rates[55] == pytest.approx(1e-3)
    assert 0 < rates[99] < 1e-6 + 2e-3 * 3.1e-4
    assert PretrainSettings(steps=100).learning_rate(9, 256) == pytest.approx(1e-3)


def test_weight_decay_groups():
    model = MaskedAutoencoder(TINY)
    decayed, free = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    names = {id(value): name for name, value in model.named_parameters()}
    without = {names[id(value)] for value in free["params"]}
    assert {"cls_token", "mask_token", "norm.weight", "patch_embed.proj.bias"} <= without
    assert all(n.endswith(("bias", "token")) or "norm" in n for n in without)
    trained = [value for value in model.parameters() if value.requires_grad]
    assert len(decayed["params"]) + len(free["params"]) == len(trained)


def test_order_is_epochs():
    order = Order(7, seed=1)
    drawn = [int(i) for first in range(0, 21, 3) for i in order(first, 3)]
    epochs = [drawn[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [int(i) for i in Order(7, seed=1)(9, 4)] == drawn[9:13]
    assert [int(i) for i in Order(7, seed=2)(0, 7)] != epochs[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"mask": "blocks"},
        {"base_learning_rate": math.nan},
        {"warmup": 7},
        {"clip": 0.0},
        {"precision": "fp8"},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        PretrainSettings(**{**asdict(SETTINGS), **wrong})


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Waves as a shard on disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "shards"
    folder.mkdir()
    kind = pa.list_(pa.list_(pa.float32()))
    values = [list(map(list, each)) for each in Waves().values]
    pq.write_table(pa.table({"series": pa.array(values, kind)}), folder / "part.parquet")
    return folder


def labelled(folder):
    generator = np.random.default_rng(0)
    data = {}
    for half, count in (("train", 8), ("test", 6)):
        y = np.arange(count) % 2
        wave = np.sin((1 + 8 * y[:, None, None]) * np.arange(390) / 65)
        data[f"x_{half}"] = wave + 0.1 * generator.standard_normal((count, 1, 390))
        data[f"y_{half}"] = y
    np.savez(folder / "labelled.npz", sampling_rate=65.0, **data)
    return folder / "labelled.npz"


def test_command(shards, tmp_path, capsys):
    sizes = tmp_path / "tiny.json"
    sizes.write_text(TINY.to_json())
    output = tmp_path / "run"
    command = ["pretrain", shards, "--output", output, "--config", sizes, "--device", "cpu"]
    command += ["--steps", 2, "--batch-size", 2, "--accumulate", 1, "--probe", labelled(tmp_path)]
    command += ["--probe-every", 2, "--picture-every", 2, "--precision", "bfloat16"]
    assert main([*map(str, command), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["skipped"]) == (2, 0)
    assert (output / "pictures" / "reconstruction-000002.png").stat().st_size > 10_000
    with (output / PROBES_FILE).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row.pop("step") == "2"
    assert all(0 <= float(score) <= 1 for score in row.values())
    command[command.index("--config") : command.index("--config") + 2] = ["--start-from", output]
    command[command.index("--output") + 1] = tmp_path / "further"
    assert main([*map(str, command)]) == 0
    assert "2 of 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "said"),
    [([], "the same command goes on"), (["--overwrite"], "command without --overwrite goes on")],
)
def test_a_stopped_command_says_how_to_go_on(extra, said, shards, tmp_path, capsys, monkeypatch):
    def make(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)  # once: the second ends the process
        monkeypatch.setattr(pretrain_data, "training_batch", batch)
        return batch(*args, **options)

    batch = pretrain_data.training_batch
    monkeypatch.setattr(pretrain_data, "training_batch", make)
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    command = ["pretrain", str(shards), "--output", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--config", str(tmp_path / "tiny.json"), "--batch-size", "2", "--steps", "3"]
    assert main([*command, *extra]) == 130
    assert capsys.readouterr().err.endswith(f"{said}\n")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--config", "huge"], "neither base nor small"),
        (["--steps", "0"], "--steps is 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--weight-decay", "nan"], "--weight-decay is nan"),
        (["--devices", "many"], "devices many"),
        (["--device", "tpu9"], "device"),
        (["--probe", "nowhere"], "nowhere"),
        (["--start-from", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_command_used_wrongly(extra, message, shards, tmp_path, capsys):
    command = ["pretrain", str(shards), "--output", str(tmp_path / "run"), *extra]
    if "--config" not in extra:
        command += ["--config", "small"]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_by_the_command(shards, tmp_path):
    """Both train the same weights, one speaks and writes; the run goes on with as many."""
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    output = tmp_path / "run"
    command = [sys.executable, "-m", "normwear_fast.cli", "pretrain", shards, "--output", output]
    command += ["--config", tmp_path / "tiny.json", "--steps", 4, "--batch-size", 1, "--device"]
    command += ["cpu", "--devices", 2, "--strategy", "ddp", "--accumulate", 2, "--json"]

    def start(*extra):
        return subprocess.run(
            [*map(str, command), *extra], capture_output=True, text=True, check=False, timeout=240
        )

    done = start("--picture-every", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 4
    assert len(curve(output)) == 4
    assert len(list((output / "pictures").iterdir())) == 2
    again = start()
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["loss"] == json.loads(done.stdout)["loss"]
    refused = start("--devices", "1", "--strategy", "auto")
    assert refused.returncode == 2
    assert "processes was 2, is 1" in refused.stderr
