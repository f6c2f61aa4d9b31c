"""What nvcc makes of csrc/cuda: no spills, no stack, registers, shared memory, wide loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import cuda_checks
from normwear_fast import build, cuda_backend, ingest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc on the PATH: csrc/cuda is not compiled here"
)


HOPPER = ("linear_float8_kernel", "linear_kernel")
"""Empty on other architectures."""


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    return cuda_checks.compile_report()


def name_of(kernel: dict[str, Any]) -> str:
    return str(kernel["kernel"]).partition(" ")[0]


def test_every_kernel_for_every_architecture(report: list[dict[str, Any]]) -> None:
    names = {kernel["kernel"] for kernel in report}
    assert {name_of(kernel) for kernel in report} == set(cuda_checks.THREADS)
    # residual_norm: 4 pairs of types by 3 shapes; tokenize: 2 types by 2 precisions; linear: 3 epilogues.
    assert len(names) == 12 + 4 + 3 + 1 + 1
    assert {(k["kernel"], k["arch"]) for k in report} == {
        (name, f"sm_{arch}") for name in names for arch in cuda_checks.ARCHITECTURES
    }


def test_the_report_is_of_what_setup_builds() -> None:
    setup = (ROOT / "setup.py").read_text()
    listed = ", ".join(f'"{arch}"' for arch in cuda_checks.ARCHITECTURES)
    assert f"CUDA_ARCHITECTURES = [{listed}]" in setup
    extra = [flag for flags in cuda_checks.EXTRA.values() for flag in flags]
    assert extra == ["-fmad=false"]
    for flag in [*cuda_checks.FLAGS, *extra]:
        assert flag in setup


def test_no_spills_and_no_stack(report: list[dict[str, Any]]) -> None:
    for kernel in report:
        where = (kernel["kernel"], kernel["arch"])
        assert kernel["spill_stores"] == kernel["spill_loads"] == kernel["stack"] == 0, where


def test_products_are_not_waited_for_too_early(report: list[dict[str, Any]]) -> None:
    """ptxas says so where it makes warpgroups' products wait for one another."""
    assert all(kernel["serialized"] == [] for kernel in report)


def test_registers_fit(report: list[dict[str, Any]]) -> None:
    """65,536 registers a multiprocessor, given out by 8 a thread."""
    for kernel in report:
        name = name_of(kernel)
        threads = cuda_checks.THREADS[name] * cuda_checks.BLOCKS[name]
        given = -(-kernel["registers"] // 8) * 8
        assert given * threads <= 65_536, (kernel["kernel"], kernel["arch"])


def test_what_warpgroups_give_others_take(report: list[dict[str, Any]]) -> None:
    """setmaxnreg waits for registers until they are there: a compiler that launches Hopper's kernels with
    fewer than the two warpgroups that multiply ask for would have them wait for ever."""
    for kernel in report:
        if name_of(kernel) in HOPPER and kernel["arch"] == "sm_90a":
            threads = cuda_checks.THREADS[name_of(kernel)]
            assert kernel["registers"] * threads >= 24 * 128 + 240 * 256, kernel["kernel"]


def test_shared_memory_fits(report: list[dict[str, Any]]) -> None:
    longest = [
        cuda_backend.bank_tables((samples,), method, "mexh", 65)["span"]
        for samples in (638, 639, 640, 641, 1298)
        for method in ("conv", "scipy")
    ]
    # csrc/cuda/tokenize.cuh: 136 rows of 72 floats, and three stretches of series.
    tokenize = 4 * (136 * 72 + 3 * max(longest))
    # csrc/cuda/linear_float8.cu: 6 tiles of 128 lines and 4 of 192, 8 bytes a column, 20 barriers.
    linear = 128 * (6 * 128 + 4 * 192) + 8 * 3072 + 20 * 8
    dynamic = {
        "tokenize_kernel": tokenize,
        "ingest_kernel": 8 * ingest.SHARED_VALUES,
        "linear_float8_kernel": linear,
        # csrc/cuda/linear.cu: 5 stages of 128 and 192 lines of 128 bytes, and 12 barriers.
        "linear_kernel": 5 * 128 * (128 + 192) + 8 * 3072 + 12 * 8,
    }
    for kernel in report:
        if name_of(kernel) in HOPPER and kernel["arch"] != "sm_90a":
            continue  # empty: it is for Hopper alone
        used = kernel["shared"] + dynamic.get(name_of(kernel), 0)
        assert used <= cuda_checks.SHARED_LIMIT[kernel["arch"]], kernel["kernel"]
    # Three thread blocks a multiprocessor from sm_90 up, each with a kilobyte of the system's.
    assert 3 * (tokenize + 1024) <= cuda_checks.SHARED_LIMIT["sm_90a"]


def test_loads_are_wide_and_products_on_tensor_cores(report: list[dict[str, Any]]) -> None:
    if cuda_checks.cuobjdump() is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    for kernel in report:
        counts = kernel["instructions"]
        if kernel["kernel"] == "linear_float8_kernel":
            # Two tiles a round, six steps each, four products a step.
            products = sum(n for name, n in counts.items() if name.startswith("QGMMA"))
            assert products == (48 if kernel["arch"] == "sm_90a" else 0)
        if name_of(kernel) == "linear_kernel":
            # A step's eight, of 16 or 32 values.
            kind = "QGMMA" if kernel["kernel"].endswith("Li2E") else "HGMMA"
            products = sum(n for name, n in counts.items() if name.startswith(kind))
            assert products == (8 if kernel["arch"] == "sm_90a" else 0)
        if name_of(kernel) not in HOPPER or kernel["arch"] == "sm_90a":
            assert counts, kernel["kernel"]
        assert not any(name.startswith(("LDL", "STL")) for name in counts), kernel["kernel"]
        wide = sum(n for name, n in counts.items() if name.startswith("LDG") and ".128" in name)
        loads = sum(n for name, n in counts.items() if name.startswith("LDG"))
        stores = [name for name in counts if name.startswith("STG")]
        if kernel["kernel"].startswith("residual_norm"):
            # Only the shape for widths that are no multiple of 8 loads 8 bytes of bfloat16 at a time.
            if kernel["kernel"].endswith(("Li8ELi3ELi1E", "Li8ELi4ELi4E")):
                assert wide == loads, kernel
            else:
                assert kernel["kernel"].endswith("Li4ELi8ELi4E")
                assert wide > 0
        if kernel["kernel"].startswith("tokenize"):
            assert wide >= 9  # a tap of each of the unrolled nine; weights; templates
            tensor = sum(n for name, n in counts.items() if "HMMA" in name and "TF32" in name)
            assert (tensor >= 8) == ("Lb1E" in kernel["kernel"])
            assert any(".128" in name for name in stores) or "bfloat16ELb0E" in kernel["kernel"]


def test_build_info_says_so() -> None:
    info = build.build_info()
    if not info["cuda"]:
        pytest.skip("normwear_fast._C was built without CUDA")
    assert info["cuda_architectures"] == [f"sm_{arch}" for arch in cuda_checks.ARCHITECTURES]


def test_a_spill_would_be_seen() -> None:
    """The reader of the compiler's report, on a report with a spill."""
    log = (
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized"
        " in the function '_ZN8normwear15tokenize_kernelIfLb1EEEvNS0_8TokenizeE'\n"
        "ptxas info    : Compiling entry function '_ZN8normwear15tokenize_kernelIfLb1EEEvNS0_8TokenizeE'"
        " for 'sm_90a'\nptxas info    : Function properties for x\n"
        "    24 bytes stack frame, 16 bytes spill stores, 28 bytes spill loads\n"
        "ptxas info    : Used 96 registers, used 1 barriers, 5120 bytes smem, 456 bytes cmem[0]\n"
    )
    (kernel,) = cuda_checks._ptxas(log)
    assert kernel == {
        "kernel": "tokenize_kernel IfLb1E",
        "arch": "sm_90a",
        "registers": 96,
        "stack": 24,
        "spill_stores": 16,
        "spill_loads": 28,
        "shared": 5120,
        "serialized": ["C7514"],
    }
