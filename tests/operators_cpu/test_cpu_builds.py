"""The tile unit's emulation, and all of the native operators' tests under the sanitisers."""

from __future__ import annotations

import ast
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_operators import ROOT, has, kernels

TILES = """
#define NORMWEAR_ISA {space}
#include "cpu/tiles.h"
extern "C" void {space}(const void* a, const void* b, void* c, long count, int whole) {{
    using namespace normwear::{space};
    const Tiles tiles;
    for (long i = 0; i < count; ++i) {{
        tile_load<2>(static_cast<const char*>(a) + 1024 * i, 64);
        tile_stream<3>(static_cast<const char*>(b) + 1024 * i, 64);
        tile_load<1>(static_cast<char*>(c) + 1024 * i, 64);
        if (whole) tile_int8<1, 2, 3>();
        else tile_bfloat16<1, 2, 3>();
        tile_store<1>(static_cast<char*>(c) + 1024 * i, 64);
    }}
}}
"""


@pytest.mark.parametrize("name", [pytest.param("amx", marks=has("amx"))])
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_emulated_tiles_have_the_processors_bits(name, tmp_path, rng):
    """Which the sanitised run below and processors without the unit rely on."""
    assert kernels(name).name == name  # it has asked the system for the unit
    spaces = {"unit": ["-mamx-tile"], "emulated": ["-mfma", "-DNORMWEAR_EMULATE_TILES"]}
    for space in spaces:
        (tmp_path / f"{space}.cpp").write_text(TILES.format(space=space))
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        command += [*spaces[space], f"{tmp_path / space}.cpp", "-o", f"{tmp_path / space}.so"]
        subprocess.run(command, check=True)

    def run(space: str, a, b, c, whole: bool):
        c = c.copy()
        function = getattr(ctypes.CDLL(f"{tmp_path / space}.so"), space)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, c)]
        function(*pointers, ctypes.c_long(len(a)), ctypes.c_int(whole))
        return c

    shape = (200, 16, 16)
    a, b, c = (rng.integers(0, 2**32, shape, dtype=np.uint32) for _ in range(3))
    assert np.array_equal(run("unit", a, b, c, True), run("emulated", a, b, c, True))

    def bits(x) -> Any:
        return np.ascontiguousarray(x, np.float32).view(np.uint32)

    def values(low: int, high: int, special: float) -> Any:
        """Pairs of bfloat16 of exponents low .. high; a share of subnormal, infinite and NaN ones."""
        wide = (*shape, 2)
        x = bits(rng.standard_normal(wide) * np.exp2(rng.integers(low, high, wide))) >> 16
        odd = rng.choice(
            np.array([0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8055, 0x0000], np.uint32), wide
        )
        x = np.where(rng.random(wide) < special, odd, x)
        return np.ascontiguousarray(x[..., 0] | x[..., 1] << 16)

    for low, high, special in ((0, 1, 0), (-68, -58, 0), (-126, 127, 0), (-8, 8, 0.002)):
        a, b = values(low, high, special), values(low, high, special)
        c = bits(rng.standard_normal(shape) * np.exp2(rng.integers(2 * low, high, shape)))
        c[rng.random(shape) < 0.1] &= np.uint32(0x807FFFFF)  # subnormal
        got, expected = (run(space, a, b, c, False).view(np.float32) for space in spaces)
        nan = np.isnan(got)
        assert np.array_equal(nan, np.isnan(expected))
        assert np.array_equal(bits(got)[~nan], bits(expected)[~nan])


SANITISED = """
import importlib.util, sys, pytest, normwear_fast
spec = importlib.util.spec_from_file_location("normwear_fast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["normwear_fast._C"] = normwear_fast._C = module
# What is left out asks for values alone, starts processes of its own, or takes minutes here.
left_out = "golden emulated every_conversion float32_stays refused_is forked_child python_threads"
chosen = "not (" + left_out.replace(" ", " or ") + ")"
options = ["-q", "-s", "-x", "-p", "no:cacheprovider", "--timeout=1200"]
code = pytest.main([*sys.argv[2:], *options, "-k", chosen])
sys.exit(int(code))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_outside_the_buffers(tmp_path):
    """The native operators' tests once more, compiled with the address and behaviour sanitisers."""
    flags = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-O1",
        "-g1",
        "-fPIC",
    ]
    # libstdc++ too, or libasan would not find what throws.
    preloaded = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not os.path.isabs(preloaded[0]):
        pytest.skip("g++ has no libasan")
    import pybind11

    # setup.py's table of flags, without running setup.
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = {"AVX2", "AVX512", "INSTRUCTION_SETS"}
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted
    ]
    scope: dict[str, Any] = {}
    exec(compile(tree, "setup.py", "exec"), scope)
    sets = scope["INSTRUCTION_SETS"]
    # What the tile unit loads and stores is seen only where it is plain C++.
    flags += ["-DNORMWEAR_X86", "-DNORMWEAR_AMX", "-DNORMWEAR_EMULATE_TILES"]
    (tmp_path / "build_info.h").write_text(
        "".join(
            f'#define NORMWEAR_{n} ""\n' for n in ("BUILD_ID", "PYTHON_ID", "COMPILER", "FLAGS")
        )
    )
    include = [tmp_path, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    jobs, objects = [], []
    for source in [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = ["g++", "-std=c++17", "-fopenmp", "-ffp-contract=fast", *flags]
        command += sets.get(source.stem.removeprefix("kernels_"), [])
        command += [f"-I{folder}" for folder in include] + ["-c", str(source), "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        assert job.wait() == 0, job.stderr.read() if job.stderr else shlex.join(job.args)
    library = tmp_path / "_C.so"
    subprocess.run(["g++", "-shared", "-fopenmp", *flags, *objects, "-o", str(library)], check=True)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(ROOT),
    }
    files = sorted(map(str, Path(__file__).parent.glob("test_*.py")))
    command = [sys.executable, "-c", SANITISED, str(library), *files]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
