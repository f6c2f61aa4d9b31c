"""csrc/cuda compiled for the host (cuda_emulation.cpp), and the package's launches led to it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch

from normwear_fast import cuda_backend

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (ROOT / "tests" / "cuda_emulation.cpp", ROOT / "csrc" / "cuda" / "bind.cpp")
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
OPTIMIZE = ("-O1", "-O0")  # the bindings compile twice as fast unoptimized


def compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    return named or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@cache
def load() -> ModuleType:
    """The emulation, compiled where its sources have changed since the last time."""
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler to compile the kernels' source for the host")
    digest = hashlib.sha256(shlex.join([*cxx, *FLAGS, *OPTIMIZE]).encode())
    for path in sorted([*(ROOT / "csrc" / "cuda").iterdir(), *SOURCES]):
        digest.update(path.read_bytes())
    name = sysconfig.get_config_var("SOABI")
    library = ROOT / "build" / "cuda-emulation" / f"{digest.hexdigest()[:16]}.{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        include = [
            f"-I{ROOT / 'csrc'}",
            f"-I{sysconfig.get_path('include')}",
            f"-isystem{pybind11.get_include()}",
        ]
        objects = [library.with_suffix(f".{os.getpid()}.{i}.o") for i in range(len(SOURCES))]
        running = [
            subprocess.Popen(
                [
                    *cxx,
                    *FLAGS,
                    *include,
                    f"-I{ROOT / 'csrc'}",
                    "-c",
                    str(source),
                    "-o",
                    str(target),
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, level, target in zip(SOURCES, OPTIMIZE, objects, strict=True)
        ]
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        made = library.with_suffix(f".{os.getpid()}.so")
        subprocess.run([*cxx, "-shared", *map(str, objects), "-o", str(made)], check=True)
        for path in objects:
            path.unlink()
        made.replace(library)  # atomic: test workers build side by side
    spec = importlib.util.spec_from_file_location("cuda_emulation", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launcher(order: int) -> Callable[[str, torch.device, dict[str, Any]], None]:
    """In place of `cuda_backend.launch`: threads of a block run upward (0) or downward (1)."""
    module = load()

    def launch(operator: str, device: torch.device, fields: dict[str, Any]) -> None:
        assert device.type == "cpu"
        getattr(module, f"cuda_{operator}")(cuda_backend.addresses(fields), order)

    return launch


@pytest.fixture(params=["upward", "downward"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA operators take CPU tensors and run on the host."""
    monkeypatch.setattr(cuda_backend, "launch", launcher(int(request.param == "downward")))
