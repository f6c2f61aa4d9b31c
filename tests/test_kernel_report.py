"""Triton's kernels, compiled for GPUs that need not be here: registers, memory, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import kernel_report

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;              /* 0x0000000402047981 */
        /*0020*/                   LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*1050*/                   MUFU.EX2 R5, R5 ;
        /*1060*/                   MUFU.RCP R5, R5 ;
        /*1070*/             @P1   STL [R1+0x4], R5 ;
        /*1080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
"""


def run_report(folder: Path, *targets: int) -> list[dict[str, Any]]:
    """The command in a process of its own: in this one Triton interprets."""
    output = folder / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernel_report", "--json", str(output), "--targets"]
    run = subprocess.run(
        [*command, *map(str, targets)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=kernel_report.ROOT,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(output.read_text())
    assert found["device"] is None
    assert found["wrong"] == []
    kernels: list[dict[str, Any]] = found["kernels"]
    return kernels


def hold(kernels: list[dict[str, Any]], targets: tuple[int, ...]) -> None:
    """What the command has judged, seen again in its figures."""
    assert {kernel["name"].split()[0] for kernel in kernels} >= set(kernel_report.operators())
    assert {kernel["target"] for kernel in kernels} == {f"sm_{target}" for target in targets}
    assert {kernel["name"] for kernel in kernels} >= set(kernel_report.LAUNCHES)
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert 0 < kernel["registers"] <= 255
        assert kernel["blocks"] >= 1, kernel
        assert 0 < kernel["occupancy"] <= 1
        assert kernel["seconds"] > 0, kernel
        if kernel["dot"]:
            mix = kernel["instructions"]
            assert mix.get("wgmma") or mix.get("tcgen05") or mix.get("mma.sync"), kernel


def test_compiled_for_sm_90(tmp_path: Path) -> None:
    hold(run_report(tmp_path, 90), (90,))


@pytest.mark.slow
def test_compiled_for_sm_80_and_sm_100(tmp_path: Path) -> None:
    hold(run_report(tmp_path, 80, 100), (80, 100))


def test_committed_report_is_of_these_kernels() -> None:
    found = json.loads(kernel_report.RESULT.read_text())
    assert found["device"] is None
    assert found["wrong"] == []
    names = {kernel["name"] for kernel in found["kernels"]}
    current = {entry.name for _, _, entry in kernel_report.entries()}
    assert names == current, "run python -m bench.kernel_report and commit its result"


def test_reading_a_disassembly() -> None:
    assert kernel_report.counted(SASS) == {
        "wgmma": 1,
        "cp.async": 1,
        "load 16 B": 2,
        "load 8 B": 1,
        "load": 3,
        "store 16 B": 1,
        "store": 1,
        "ex2": 1,
        "spill": 1,
    }
    usage = " Function kernel:\n  REG:168 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:588 TEXTURE:0\n"
    assert kernel_report.resource_usage(usage) == {"registers": 168, "stack": 8}
    with pytest.raises(ValueError, match="no resource usage"):
        kernel_report.resource_usage("")


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "blocks"),
    [
        (90, 255, 8, 0, 1),  # 8 warps x 8,192 registers: all there are
        (90, 128, 8, 0, 2),
        (90, 32, 4, 0, 16),  # 64 warps
        (90, 16, 1, 0, 32),  # never more than 32
        (90, 64, 4, 113 * 1024, 2),  # 114 KB each of 228
        (80, 64, 4, 113 * 1024, 1),
        (90, 24, 4, 4 * 1024, 16),
    ],
)
def test_resident_blocks(target, registers, warps, shared, blocks) -> None:
    assert kernel_report.resident_blocks(target, registers, warps, shared) == blocks


def test_what_is_wrong_is_said() -> None:
    good: dict[str, Any] = {
        "name": "channel_attention bfloat16",
        "target": "sm_90",
        "spills": 0,
        "shared": 64 * 1024,
        "dot": True,
        "rows": 128,
        "tensor_cores": ["wgmma"],
        "instructions": {"wgmma": 8, "load": 4, "load 16 B": 4},
    }
    assert kernel_report.wrong(good) == []

    def said(**changes: Any) -> str:
        (line,) = kernel_report.wrong(good | changes)
        return line

    assert "spills: 3" in said(spills=3)
    assert "shared memory" in said(shared=228 * 1024)
    assert "no wgmma" in said(tensor_cores=["mma.sync"])
    assert "no tcgen05" in said(target="sm_100")
    assert "no mma.sync" in said(rows=16)
    assert "no 16-byte load" in said(instructions={"wgmma": 8, "load": 4})
    assert "does not compile: ValueError: no" in said(raised="ValueError: no\nmore")
    assert kernel_report.wrong(good | {"instructions": {"TMA": 2}}) == []


def test_modelled_time() -> None:
    """One layer's attention: 4 T^2 E FLOPs a channel, 12 of them 11 % of the encoder."""
    entry = kernel_report.Compiled(
        name="channel_attention bfloat16",
        kernel=None,
        signature={},
        constants={},
        table={},
        flops=234 * 4 * 560**2 * 768.0,
        bytes=131_040 * 768 * 2 * 4.0,
        programs=len,
        unit="bfloat16",
    )
    made = kernel_report.modelled(entry)
    assert made["bound"] == "arithmetic"
    assert made["seconds"] == pytest.approx(282e-6, rel=0.01)
    assert made["share"] == pytest.approx(0.108, rel=0.02)
    assert kernel_report.encoder_seconds() == pytest.approx(234 * 107e9 / 798e12, rel=0.01)
