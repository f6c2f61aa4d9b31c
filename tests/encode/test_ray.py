"""The Ray engine on a real local Ray: the local engine's rows, whatever dies on the way."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from encode_runs import SETTINGS, TINY, content, make_cohort, rows

from normwear_fast import FastNormWear
from normwear_fast.cli.main import main
from normwear_fast.encode import encode_recordings, load_embeddings, pipeline
from normwear_fast.encode.ray_engine import RayEngine, _check_same, _failure
from normwear_fast.errors import NormWearError, WeightsError

pytest.importorskip("ray")


def loader(config: dict[str, Any]) -> Callable[[int | None], list[FastNormWear]]:
    """Pickled by value, as it is local: Ray's workers cannot import a test."""

    def load(threads: int | None) -> list[FastNormWear]:
        import torch

        from normwear_fast import FastNormWear, NormWearConfig

        torch.set_num_threads(threads or 1)
        model = FastNormWear(True, config=NormWearConfig(**config), precision="float32", seed=0)
        return [model.freeze()]

    return load


LOAD = loader(
    {
        name: getattr(TINY, name)
        for name in (
            "embed_dim",
            "depth",
            "num_heads",
            "decoder_embed_dim",
            "decoder_num_heads",
            "decoder_depth",
        )
    }
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_cohort(tmp_path_factory.mktemp("cohort"))
    (folder / "damaged.npz").write_bytes(b"PK\x03\x04")
    return folder


@pytest.fixture(scope="module")
def local(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("local") / "out"
    assert encode_recordings([cohort], output, SETTINGS, LOAD).exit_code == 1
    return output


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, of which the two encoders take three quarters."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
    yield
    ray.shutdown()


def actors(kind: str) -> list[psutil.Process]:
    """Processes of ours that are such an actor."""
    return [p for p in psutil.Process().children(recursive=True) if kind in _title(p)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class KillAfter(pipeline.Silent):
    """Kills an actor of each kind named when so many units have been encoded."""

    def __init__(self, units: int, *kinds: str) -> None:
        self.left, self.kinds, self.killed = units, kinds, 0

    def advance(self, windows: int) -> None:
        self.left -= 1
        if self.left == 0:
            for kind in self.kinds:
                actors(kind)[0].send_signal(signal.SIGKILL)
                self.killed += 1


def test_two_encoders_one_killed_give_the_local_engines_rows(
    cohort: Path, local: Path, cluster: None, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    progress = KillAfter(2, "(Encoder)")
    engine = RayEngine("cpu", actors=2, readers=1)
    summary = encode_recordings([cohort], output, SETTINGS, LOAD, progress=progress, engine=engine)
    assert progress.killed == 1
    assert summary.exit_code == 1
    assert list(summary.failed) == ["damaged"]
    assert summary.units_done == summary.units
    assert rows(output) == rows(local)


class Stop(pipeline.Silent):
    """Ctrl-C when the first unit has been encoded."""

    def advance(self, windows: int) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_stopped_killed_and_resumed_patches_give_the_local_engines_store(
    cluster: None, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    for i in range(12):  # jobs enough for the reader to be at work still
        make_cohort(many / f"{i:02d}")
    settings = replace(SETTINGS, pool="patch")
    encode_recordings([many], tmp_path / "local", settings, LOAD)
    output = tmp_path / "out"
    engine = RayEngine("cpu", actors=2, readers=1)
    stopped = encode_recordings([many], output, settings, LOAD, progress=Stop(), engine=engine)
    assert stopped.exit_code == 130
    assert 0 < stopped.units_done < stopped.units
    progress = KillAfter(2, "(Encoder)", "(Reader)")
    summary = encode_recordings([many], output, settings, LOAD, progress=progress, engine=engine)
    assert progress.killed == 2
    assert summary.units_done == summary.units
    assert content(output) == content(tmp_path / "local")
    assert load_embeddings(output).equals(load_embeddings(tmp_path / "local"))
    # What one engine began the other ends.
    assert encode_recordings([many], output, settings, LOAD).already_complete


@pytest.mark.slow
def test_the_command_joins_the_cluster_at_ray_address(cohort: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # this cluster's own: Ray lets in who knows it
        "OMP_NUM_THREADS": "1",
    }
    folder = Path(sys.executable).parent
    port, address = "26379", "127.0.0.1:26379"
    start = ["start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    session = subprocess.Popen(
        [folder / "ray", *start, "--block", f"--temp-dir={tmp_path.parent / 'ray'}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        common = [
            *(sys.executable, "-m", "normwear_fast.cli", "encode", str(cohort), "--window", "2"),
            *("--random-weights", "0", "--model-size", "small", "--precision", "float32", "--json"),
        ]
        done = {}
        for name, more in (("ray", ["--engine", "ray"]), ("local", [])):
            done[name] = subprocess.run(
                [*common, "--output", str(tmp_path / name), *more],
                env=environment | {"RAY_ADDRESS": address},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done[name].returncode == 1, done[name].stderr
            assert "Traceback" not in done[name].stderr
            assert list(json.loads(done[name].stdout)["failed"]) == ["damaged"]
        assert rows(tmp_path / "ray") == rows(tmp_path / "local")
    finally:
        for process in [*psutil.Process(session.pid).children(recursive=True), session]:
            process.kill()  # asked kindly, Ray would wait for half a minute
        session.wait(30)


# --- refusals --------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], cohort: Path, output: Path, *more: str) -> str:
    """The one line on stderr; nothing was written."""
    arguments = ["encode", str(cohort), "--output", str(output), "--random-weights", "0", *more]
    assert main(arguments) == 2
    assert not output.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_without_ray_one_line_names_the_extra(
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    line = refused(capsys, cohort, tmp_path / "out", "--engine", "ray")
    assert "pip install 'normwear-fast[ray]'" in line


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--actors", "2"], "--actors is for --engine ray"),
        (
            ["--engine", "ray", "--actors", "0"],
            "--actors 0: with --engine ray it must be 1 or more",
        ),
        (["--engine", "ray", "--workers", "0"], "--workers 0: with --engine ray"),
        (["--engine", "ray", "--device", "cuda:1"], "--device cuda:1: Ray hands out its GPUs"),
    ],
)
def test_options_that_contradict(
    more: list[str],
    expected: str,
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in refused(capsys, cohort, tmp_path / "out", *more)


def test_a_model_elsewhere_that_differs_is_refused_by_node() -> None:
    wanted = {"torch": "2.13.0", "blas": "mkl", "weights": {"path": "/a", "sha256": "1"}}
    _check_same(wanted | {"version": "1", "weights": {"path": "/b", "sha256": "1"}}, wanted, "1")
    other = wanted | {"version": "2", "blas": "other", "weights": {"path": "/a", "sha256": "2"}}
    with pytest.raises(NormWearError) as error:
        _check_same(other, wanted, "1")
    for part in ("blas is other, elsewhere mkl", "version is 2", "weights' sha256 differs"):
        assert part in str(error.value)


def test_what_a_worker_says_is_one_line() -> None:
    class TaskError(Exception):
        cause: Exception | None = None

    error = TaskError(
        "Traceback:\n  File x\nModuleNotFoundError: No module named 'normwear_fast'\n"
    )
    assert str(_failure(error)) == (
        "a worker of the Ray cluster failed: ModuleNotFoundError: No module named 'normwear_fast'"
    )
    error.cause = WeightsError("w.pth: no such file")
    assert _failure(error) is error.cause


def test_actors_leave_a_part_of_every_core_to_readers() -> None:
    def sizes(cpus: float, gpus: int, threads: int, gpu: bool) -> tuple[int, float, int, float]:
        engine = RayEngine()
        engine._gpu, engine._threads = gpu, threads
        engine._size(cpus, gpus)
        return engine._encoders, engine._encoder_cpus, engine._reading, engine._reader_cpus

    assert sizes(2, 0, 1, gpu=False) == (2, 0.75, 1, 0.25)
    assert sizes(2, 0, 2, gpu=False) == (1, 1.5, 1, 0.25)
    assert sizes(128, 8, 1, gpu=True) == (8, 0.5, 64, 1.0)
    assert sizes(16, 1, 1, gpu=True) == (1, 0.5, 8, 1.0)
    for cpus, gpus, threads, gpu in ((1, 1, 1, True), (4, 4, 1, True), (64, 0, 32, False)):
        encoders, each, readers, reader = sizes(cpus, gpus, threads, gpu)
        assert encoders * each + readers * reader <= max(cpus, encoders * each + 0.25)
