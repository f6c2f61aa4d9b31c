"""gpu_check without a GPU: the compile-time part, and every measuring step at small sizes on the CPU,
with the operators' definitions in the kernels' place."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import chart, devices, encoder_gpu, gpu_check, kernel_report, power
from bench.kernels import measure
from bench.kernels.measure import sustained
from normwear_fast import NormWearConfig, backends, operators
from normwear_fast.gpu import GpuEncoder
from normwear_fast.kernels import bias_gelu, tuning
from normwear_fast.kernels.tuning import Choice
from normwear_fast.linear_float8 import FLOAT8_MAX

CPU = torch.device("cpu")
SIZES = encoder_gpu.Sizes(
    config=NormWearConfig(
        embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=0
    ),
    sequences=4,
    channels=2,
    samples=32,
    batches=2,
    rounds=2,
    repeats=1,
    latency_rounds=2,
    batch_tokens=256,
    ragged_samples=(11, 40),
    ragged_channels=(1, 3),
    goldens="encoder_small_b1c1L32",
)


def _quantised(values: Tensor, out: Tensor, scale: Tensor) -> Tensor:
    scale.copy_(values.abs().amax(1) / FLOAT8_MAX)
    return out.copy_((values / scale[:, None]).to(out.dtype))


def _residual_norm(residual, carried, eps, *, update=None, dtype=None, out=None, scale=None):
    if scale is None:
        return operators.residual_norm(residual, carried, eps, update=update, dtype=dtype, out=out)
    normed = operators.residual_norm(residual, carried, eps, update=update, dtype=torch.float32)
    return _quantised(normed, out, scale)


def _bias_gelu(x, bias, *, out=None, scale=None):
    operators.bias_gelu(x, bias)
    if scale is not None:
        _quantised(x.float(), out, scale)


PLAIN = dataclasses.replace(backends.TORCH, residual_norm=_residual_norm, bias_gelu=_bias_gelu)


def plain(monkeypatch: pytest.MonkeyPatch, ops: backends.Backend = PLAIN) -> None:
    """The GPU's encoder around plain operators, under the name of Triton's backend."""
    backend = dataclasses.replace(
        ops,
        name="triton",
        encoder=lambda *arguments: GpuEncoder(*arguments, ops, bucketed=False),
        precisions=("float32", "bfloat16", "fp8"),
    )
    monkeypatch.setitem(backends.BACKENDS, "triton", lambda: backend)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> encoder_gpu.Bench:
    plain(monkeypatch)
    return encoder_gpu.Bench(CPU, SIZES)


# --- every step -------------------------------------------------------------------------------------


def test_right_and_fast_sections(bench, monkeypatch, tmp_path) -> None:
    """The four sections that a GPU sees first, and what the report makes of them."""
    timings = [{"name": f"channel_attention {case} torch.bfloat16", "over_flash_attention": 2.0}
               for case in ("equal", "mix 1:6")]  # fmt: skip
    module = SimpleNamespace(timings=lambda device: [{"seconds": 1e-4, **row} for row in timings])
    monkeypatch.setattr(kernel_report, "operators", lambda: {"channel_attention": module})
    # Compiling takes a minute and is torch's business.
    monkeypatch.setattr(encoder_gpu.benchmarks, "compiled", encoder_gpu.benchmarks.eager)
    parts = {}
    for name in ("right", "fast", "memory", "baselines"):
        output = tmp_path / f"{name}.json"
        gpu_check.work(name, output, bench)
        parts[name] = json.loads(output.read_text())
        assert list(gpu_check.failures(name, parts[name])) == []
    assert {row["name"].split()[1] for row in parts["right"]["goldens"]} == {
        "float32",
        "bfloat16",
        "fp8",
    }
    assert len(parts["right"]["repetition"]) == 6
    assert len(parts["right"]["graphs"]) == 18
    ceilings = parts["fast"]["ceilings"]
    assert set(ceilings) == {"bfloat16", "tf32", "float32", "fp8", "copy_bytes_per_s"}
    assert all(ceilings[name]["sustained"] > 0 for name in ceilings if name != "copy_bytes_per_s")
    for stack in parts["fast"]["stack"].values():
        assert sum(stack["shares"].values()) == pytest.approx(1)
        assert all(share > 0 for share in stack["shares"].values()), stack
        assert 0 < stack["light_share"] < 1
    goals = gpu_check.judged(parts)
    missing = [goal["name"] for goal in goals if goal["value"] is None]
    assert missing == [goal.name for goal in gpu_check.GOALS if "memory" in goal.name]
    assert all(isinstance(g["reached"], bool) for g in goals if g["value"] is not None)
    rows = gpu_check.rows_of(parts)
    assert rows["reference, bfloat16, max-autotune"]["ratio"] == 1
    assert len(rows) == 4
    baselines = parts["baselines"]
    over = baselines["compiled_reference"]["ratio"]
    assert rows["encode bfloat16"]["ratio"] == pytest.approx(over)
    slow = rows["one window at a time"]["ratio"]
    assert over / slow == pytest.approx(baselines["one_at_a_time"]["ratio"])
    gpu_check.print_report(parts, goals)
    report = tmp_path / "a-gpu.json"
    gpu_check.write({"machine": gpu_check.machine(), "rows": rows}, report)
    assert chart.draw(report).stat().st_size > 10_000


def test_a_baseline_that_is_not_the_model_is_told(bench, monkeypatch) -> None:
    def compiled(reference: Any, optimized_cwt: bool) -> Any:
        run = encoder_gpu.benchmarks.eager(reference, optimized_cwt)
        return lambda x: run(x).flip(-1)

    monkeypatch.setattr(encoder_gpu.benchmarks, "compiled", compiled)
    with pytest.raises(RuntimeError, match="the compiled reference is not the model: worst cosine"):
        encoder_gpu.compiled_reference(bench)


def test_power_counts_samples_after_it_has_settled() -> None:
    """A program in nvidia-smi's place: its first figures are those of before."""
    program = """if True:
        import time
        print("[N/A], [N/A], [N/A]", flush=True)
        began = time.monotonic()
        while True:
            late = time.monotonic() > began + 0.3
            print("1500, 690.5, 700" if late else "1980, 90, 700", flush=True)
            time.sleep(0.01)
    """
    command = [sys.executable, "-c", program]
    calls = []
    found = power._sampled(lambda: calls.append(time.sleep(0.01)), command, 2.0, 0.5)
    assert found == {"sm_clock_mhz": 1500, "watts": 690.5, "limit_watts": 700}
    assert len(calls) > 10
    with pytest.raises(RuntimeError, match="no samples from"):
        power._sampled(lambda: None, [sys.executable, "-c", "print('no devices')"], 0.1, 0.1)
    assert power.drawn(lambda: None, CPU) is None


def test_a_step_that_raises_hides_nothing(bench, monkeypatch, tmp_path) -> None:
    def broken(bench: Any) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(encoder_gpu, "goldens", broken)
    gpu_check.work("right", tmp_path / "part.json", bench)
    part = json.loads((tmp_path / "part.json").read_text())
    (line,) = gpu_check.failures("right", part)
    assert line == "right: broken raised: RuntimeError: an illegal memory access"
    assert len(part["graphs"]) == 18


def test_a_precision_that_raises_hides_no_other(bench, monkeypatch, tmp_path) -> None:
    """fp8's products refused, as by a library that lacks them: bfloat16 is checked and timed."""

    def refused(*arguments: Any) -> Any:
        raise RuntimeError("not supported")

    monkeypatch.setattr("normwear_fast.gpu.scaled_product", refused)
    monkeypatch.setattr(encoder_gpu, "scaled_product", refused)
    monkeypatch.setattr(kernel_report, "operators", dict)
    parts = {}
    for name in ("right", "fast"):
        gpu_check.work(name, tmp_path / f"{name}.json", bench)
        parts[name] = json.loads((tmp_path / f"{name}.json").read_text())
        lines = list(gpu_check.failures(name, parts[name]))
        assert lines
        assert all("fp8" in line and "RuntimeError: not supported" in line for line in lines)
    for step in ("goldens", "repetition", "graphs"):
        passed = {row["name"]: row["passed"] for row in parts["right"][step]}
        assert all(ok == ("fp8" not in name) for name, ok in passed.items()), passed
    for step in ("encode", "stack", "latency"):
        assert set(parts["fast"][step]["fp8"]) == {"raised", "passed"}
    values = {goal["name"]: goal["value"] for goal in gpu_check.judged(parts)}
    assert values["bfloat16 encode, of the GEMM ceiling"] > 0
    assert values["fp8 over bfloat16"] is None
    assert set(gpu_check.rows_of(parts)) == {"encode bfloat16"}
    gpu_check.print_report(parts, gpu_check.judged(parts))


def test_launches_are_not_timed(monkeypatch) -> None:
    """The device is kept waiting before every start of the clock, while the host launches."""
    steps: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            steps.append("event")

        def synchronize(self) -> None:
            steps.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: steps.append("sleep"))
    gpu: Any = SimpleNamespace(type="cuda")
    assert measure.seconds(lambda: steps.append("run"), gpu, 2) == 2e-3
    assert steps == ["run", "run"] + ["sleep", "event", "run", "event", "wait"] * 2


def test_changing_bits_are_seen(bench, monkeypatch) -> None:
    attention = operators.channel_attention

    def racing(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return attention(query, *arguments, **options) * (1 + torch.rand(1).to(query.dtype))

    plain(monkeypatch, dataclasses.replace(PLAIN, channel_attention=racing))
    assert not any(row["passed"] for row in encoder_gpu.repetition(bench))


def test_a_wrong_encoder_fails_the_goldens(bench, monkeypatch) -> None:
    def wrong(x: Tensor, bias: Tensor, **options: Any) -> None:
        _bias_gelu(x, 0.9 * bias, **options)

    plain(monkeypatch, dataclasses.replace(PLAIN, bias_gelu=wrong))
    found = encoder_gpu.goldens(bench)
    assert found
    assert not found[0]["passed"]


def test_goldens_of_some_rows(bench, monkeypatch) -> None:
    """As the base model's files are: rows of the output, not all of it."""
    helpers = encoder_gpu._helpers()
    name = next(n for n in helpers.ENCODER_GOLDENS if n.startswith(SIZES.goldens))
    whole = helpers.golden(name)
    rows = np.array([0, 3, whole["out"].shape[2] - 1])

    def some(wanted: str) -> dict[str, Any]:
        arrays = {key: whole[key] for key in whole if key != "out"}
        return arrays | {"rows": rows, "out_rows": whole["out"][:, :, rows]}

    monkeypatch.setattr(encoder_gpu, "_helpers", lambda: helpers)
    monkeypatch.setattr(helpers, "golden", some)
    monkeypatch.setattr(helpers, "ENCODER_GOLDENS", [name])
    found = encoder_gpu.goldens(bench)
    assert [row["passed"] for row in found] == [True] * 3
    assert 0 < found[0]["max_abs_error"] < 2e-5


def test_an_encoder_wrong_at_full_size_is_seen(bench, monkeypatch) -> None:
    whole = bench.windows_a_batch * bench.sizes.channels * bench.tokens

    def wrong(x: Tensor, bias: Tensor, **options: Any) -> None:
        _bias_gelu(x, bias, **options)
        x *= 0.5 if len(x) >= whole else 1

    assert encoder_gpu.encode(bench)["bfloat16"]["full_batch_worst_cosine"] > 0.999
    plain(monkeypatch, dataclasses.replace(PLAIN, bias_gelu=wrong))
    found = encoder_gpu.encode(encoder_gpu.Bench(CPU, SIZES))["bfloat16"]
    assert found["mean_cosine"] > 0.999
    assert found["full_batch_worst_cosine"] < 0.999


def test_the_extension_is_looked_for_after_it_was_built(monkeypatch) -> None:
    steps: list[str] = []

    def step(name: str, result: Any) -> Any:
        steps.append(name)
        return result

    def described() -> Any:
        step("machine", None)
        raise SystemExit

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "build", lambda: step("build", []))
    monkeypatch.setattr(gpu_check, "machine", described)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert steps == ["build", "machine"]


def test_tuning_takes_every_choice_in_turn(monkeypatch, tmp_path) -> None:
    """bias_gelu in Triton, interpreted; the other operators have nothing to choose."""
    plain(monkeypatch, dataclasses.replace(PLAIN, bias_gelu=bias_gelu.bias_gelu))
    path = tmp_path / "kernels.json"
    monkeypatch.setattr(tuning, "cache_path", lambda device: path)
    sizes = dataclasses.replace(SIZES, sequences=1, channels=1, samples=20, rounds=1)
    pick = bias_gelu.pick
    found = encoder_gpu.tune(encoder_gpu.Bench(CPU, sizes))
    assert bias_gelu.pick is pick
    bfloat16 = found["bias_gelu torch.bfloat16"]
    assert len(bfloat16) == len(tuning.choices(bias_gelu.CHOICES, 80))
    assert any(name.startswith("bias_gelu torch.bfloat16 torch.float8") for name in found)
    assert min(bfloat16.values()) > 0
    refused = [name for name in found["mlp bfloat16"] if "refused" in name]
    assert len(refused) == 1  # the fused one: these operators have no such kernel
    kept = json.loads(path.read_text())
    assert set(kept) == set(found)
    gpu: Any = SimpleNamespace(type="cuda")
    monkeypatch.setattr(tuning, "capability", lambda device: 80)
    monkeypatch.setattr(tuning, "_device_path", lambda device: path)
    for name in ("bias_gelu torch.bfloat16", "mlp bfloat16"):
        operator, case = name.split(maxsplit=1)
        table = {80: [Choice({"ROWS": 7}), Choice(**kept[name]["choice"]), Choice({"ROWS": 8})]}
        assert dataclasses.asdict(tuning.pick(operator, case, table, gpu)) == kept[name]["choice"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": []}', '{"a": {}}', '{"a": {"choice": 3}}', "[" * 9000, "{"]
)
def test_a_damaged_cache_of_choices_is_none(monkeypatch, tmp_path, content: str) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(content)
    monkeypatch.setattr(tuning, "capability", lambda device: 80)
    monkeypatch.setattr(tuning, "_device_path", lambda device: path)
    gpu: Any = SimpleNamespace(type="cuda")
    assert tuning.pick("a", "", bias_gelu.CHOICES, gpu) == bias_gelu.CHOICES[80][0]
    assert tuning.measured_choices(gpu) == {}


# --- sections and their processes -------------------------------------------------------------------


def test_checks_are_judged(tmp_path) -> None:
    def broken() -> dict[str, float]:
        raise ValueError("no")

    recorded: dict[str, Any] = {}
    outcomes = [
        ("good", lambda: {"error": 1.0, "bound": 1.0, "stable": 1.0}),
        ("far", lambda: {"error": 2.0, "bound": 1.0, "stable": 1.0}),
        ("nan", lambda: {"error": float("nan"), "bound": 1.0, "stable": 1.0}),
        ("unstable", lambda: {"error": 0.0, "bound": 1.0, "stable": 0.0}),
        ("broken", broken),
    ]
    gpu_check.checked(recorded.__setitem__, outcomes)
    passed = [row["passed"] for row in recorded["checks"]]
    assert passed == [True, False, False, False, False]
    assert len(list(gpu_check.failures("operator", recorded))) == 4


def test_every_operator_has_a_section() -> None:
    found = gpu_check.sections()
    assert set(kernel_report.operators()) <= set(found)
    alone = [name for name, section in found.items() if section.alone]
    assert alone == ["tune", "fast", "cuda timings", "memory", "baselines"]


@pytest.mark.parametrize("tune", [False, True])
def test_the_encoder_is_checked_with_the_choices_it_is_timed_with(
    tune, monkeypatch, tmp_path
) -> None:
    order: list[str] = []

    def process(name: str, limit: int, options: list[str]) -> tuple[dict[str, Any], str | None]:
        order.append(name)
        return {}, None

    monkeypatch.setattr(gpu_check, "in_a_process", process)
    gpu_check.check_device({}, tmp_path / "r.json", [], tune=tune)
    last = ["tune", "right"] if tune else []
    assert order[-len(last) - 4 :] == [*last, "fast", "cuda timings", "memory", "baselines"]
    assert order.count("right") == 1
    assert tune or order.index("right") < 4  # of the first to start, for it takes longest


def test_a_section_runs_its_operators_checks(monkeypatch, tmp_path) -> None:
    asked = []

    def checks(device: torch.device) -> list[tuple[str, Any]]:
        asked.append(device)
        return [("one", lambda: {"error": 0.0, "bound": 1.0, "stable": 1.0})]

    module = SimpleNamespace(checks=checks)
    monkeypatch.setattr(kernel_report, "operators", lambda names: dict.fromkeys(names, module))
    gpu_check.work("bias_gelu", tmp_path / "part.json", SimpleNamespace(device=CPU))
    (row,) = json.loads((tmp_path / "part.json").read_text())["checks"]
    assert asked == [CPU]
    assert row["passed"]


def test_a_process_and_its_time_limit() -> None:
    part, ended = gpu_check.in_a_process("memory", 100, ["--quick"])
    assert ended is None
    if not torch.cuda.is_available():
        assert part["memory"] == {"peak_bytes": None, "longer_peak_bytes": None}
    part, ended = gpu_check.in_a_process("memory", 0.01, [])
    assert part == {}
    assert ended == "memory took more than 0.01 s and was ended"


def test_what_a_section_said_is_kept_where_it_failed(tmp_path, monkeypatch) -> None:
    """Its whole standard error, for a run to see a traceback costs minutes. What it started ends too."""
    started = tmp_path / "started"
    script = tmp_path / "section"
    script.write_text(
        f"#!/bin/sh\nsleep 60 &\necho $! > {started}\necho why >&2\necho RuntimeError: no >&2\nexit 3\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(script))
    part, ended = gpu_check.in_a_process("right", 20, [])
    assert ended == "right ended early: RuntimeError: no"
    assert part == {"stderr": "why\nRuntimeError: no"}
    for _ in range(100):
        if not alive(int(started.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("what the section started is still there")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_what_is_timed_waits_for_the_compilers(monkeypatch, tmp_path) -> None:
    compiling: Future[None] = Future()
    order: list[str] = []

    def process(name: str, limit: int, options: list[str]) -> tuple[dict[str, Any], str | None]:
        order.append(name if compiling.done() else f"{name} beside the compilers")
        return {}, None

    def compiled() -> None:
        order.append("compiled")
        compiling.set_result(None)

    monkeypatch.setattr(gpu_check, "in_a_process", process)
    timer = Timer(0.5, compiled)
    timer.start()
    gpu_check.check_device({}, tmp_path / "r.json", [], tune=False, compilers=(compiling,))
    timer.join()
    assert order[order.index("compiled") + 1 :] == ["fast", "cuda timings", "memory", "baselines"]


def test_every_section_is_kept_as_it_ends(monkeypatch, tmp_path) -> None:
    def process(name: str, limit: int, options: list[str]) -> tuple[dict[str, Any], str | None]:
        if name == "fast":
            return {}, "fast took more than 240 s and was ended"
        return {"checks": [{"name": "one", "passed": name != "bias_gelu"}]}, None

    monkeypatch.setattr(gpu_check, "in_a_process", process)
    found: dict[str, Any] = {}
    output = tmp_path / "report.json"
    wrong = gpu_check.check_device(found, output, [], tune=False)
    assert sorted(line.split()[0] for line in wrong) == ["bias_gelu:", "fast"]
    written = json.loads(output.read_text())
    assert set(written["sections"]) == set(gpu_check.sections()) - {"tune"}
    assert written["wrong"] == wrong
    assert all(goal["reached"] is None for goal in written["goals"])


def test_a_report_becomes_a_device_of_plan(tmp_path) -> None:
    rates = {"encode bfloat16": 4_500.0, "encode fp8": 6_000.0, "one window at a time": 100.0}
    report = tmp_path / "a-gpu.json"
    machine = gpu_check.machine() | {"gpu": "NVIDIA H100 80GB HBM3"}
    rows = {name: {"channel_windows_per_s": rate} for name, rate in rates.items()}
    gpu_check.write({"machine": machine, "rows": rows}, report)
    found = {(d["name"], d["precision"]): d["flops_per_s"] for d in devices.measured(report)}
    assert set(found) == {("H100", "bfloat16"), ("H100", "fp8")}
    assert found["H100", "bfloat16"][0] == pytest.approx(4_500 * 107e9, rel=0.01)


def test_measured_devices_are_what_the_files_say(monkeypatch, tmp_path) -> None:
    """Ranges over files; what has no file any more goes, what is modelled stays."""
    monkeypatch.setattr(devices, "RESULTS", tmp_path)
    monkeypatch.setattr(devices, "DEVICES", tmp_path / "table" / "devices.json")
    monkeypatch.setattr(devices.sys, "argv", ["bench.devices"])
    old = [
        {"name": "H100", "precision": "bfloat16", "basis": "modelled"},
        {"name": "cpu-avx2-2", "precision": "float32", "basis": "modelled"},
        {"name": "cpu-gone-2", "precision": "float32", "basis": "measured"},
    ]
    gpu_check.write({"schema": 1, "devices": old}, devices.DEVICES)
    machine = gpu_check.machine() | {"gpu": None, "instruction_set": "avx2", "threads": 2}
    for day, rate in (("2026-01-02", 2.0), ("2026-01-03", 1.0)):
        rows = {"FastNormWear float32": {"channel_windows_per_s": rate}}
        gpu_check.write(
            {"machine": machine | {"date": day}, "rows": rows}, tmp_path / f"{day}.json"
        )
    assert devices.main() == 0
    found = {d["name"]: d for d in json.loads(devices.DEVICES.read_text())["devices"]}
    assert set(found) == {"H100", "cpu-avx2-2"}
    assert found["H100"] == old[0]
    measured = found["cpu-avx2-2"]
    assert measured["flops_per_s"] == pytest.approx([107e9, 214e9], rel=0.01)
    assert measured["date"] == "2026-01-03"
    assert measured["source"] == "bench/results: 2026-01-02, 2026-01-03"


def test_result_names() -> None:
    name = gpu_check.default_output("NVIDIA H100 80GB HBM3", "2026-01-02").name
    assert name == "nvidia-h100-80gb-hbm3-2026-01-02.json"
    assert gpu_check.default_output(None, "2026-01-02").parent.name == "build"


def test_what_is_kept_up_is_timed_in_turn() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    taken = sustained(runs, torch.device("cpu"), rounds=2, settle=0, measure=0)
    assert set(taken) == {"a", "b"}
    assert all(value > 0 for value in taken.values())
    assert calls[-4:] == ["a", "b", "b", "a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_command_without_a_gpu(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "TARGETS", (90,))  # as tests/test_kernel_report.py has it
    assert gpu_check.main(["--output", str(tmp_path / "found.json")]) == 0
    assert "no GPU here" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] is None
    assert found["wrong"] == []
    assert len(found["compiled"]) in (0, 63)  # without and with nvcc
    assert {kernel["target"] for kernel in found["triton"]} == {"sm_90"}
