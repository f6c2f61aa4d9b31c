"""Builds normwear_fast._C from csrc/ with pybind11 and ninja; everything else is in pyproject.toml.

Ninja compiles the sources in parallel and, in an editable install, only those that changed. Without
a working C++17 compiler the package installs without `_C`, says so, and runs on plain PyTorch and
NumPy. Where nvcc is found, on the PATH or in CUDA_HOME, `_C` also holds the CUDA operators;
NORMWEAR_FAST_CUDA=0 leaves them out. CXX, CXXFLAGS and LDFLAGS are honoured.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
IDENTITY = runpy.run_path(str(ROOT / "normwear_fast" / "_identity.py"))

# Portable code only, for one wheel must run on every processor of its architecture.
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
OPENMP = ["-fopenmp"]
# csrc/cpu/kernels_*.cpp is one source compiled for every instruction set, chosen at run time.
KERNELS = ["-ffp-contract=fast"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
AVX2 = ["-mavx2", "-mfma"]
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX2 + AVX512,
    "avx512bf16": [*AVX2, *AVX512, "-mavx512bf16"],
    "amx": [*AVX2, *AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
LINK = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
# A100, H100 and H200, B200; PTX of the last for what comes after it.
CUDA_ARCHITECTURES = ["80", "90a", "100"]
# An assembler older than its compiler may not know the tile unit's instructions.
PROBE = """\
#include <Python.h>
#include <vector>
#ifdef __AMX_INT8__
void tiles() { __asm__ volatile("tdpbusd %tmm2, %tmm1, %tmm0"); }
#endif
int main_() { return std::vector<int>{1}[0]; }
"""
NINJA_BUILD = """\
ninja_required_version = 1.10
cxx = {cxx}
cxxflags = {cxxflags}
ldflags = {ldflags}

rule compile
  command = $cxx $cxxflags $extra -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in

rule link
  command = $cxx $in -o $out $ldflags
  description = link $out

"""
NINJA_CUDA = """\
rule cuda
  command = {nvcc} $extra -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in

"""


def compiler() -> list[str] | None:
    """The C++ compiler as a command: CXX, else the first of the usual names on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def python_includes() -> list[str]:
    paths = sysconfig.get_paths()
    return [f"-I{path}" for path in dict.fromkeys((paths["include"], paths["platinclude"]))]


def compiles(cxx: list[str], flags: list[str]) -> bool:
    """Whether a small extension compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        command = [*cxx, *flags, *python_includes(), str(source), "-o", f"{source}.so", *LINK]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def cuda_toolkit(cxx: list[str]) -> tuple[list[str], list[str]] | None:
    """nvcc as a command with flags, and how to link what it makes; None where there is none."""
    if os.environ.get("NORMWEAR_FAST_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if nvcc is None:
        return None
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
    for name in CUDA_ARCHITECTURES:
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
    newest = f"compute_{CUDA_ARCHITECTURES[-1]}"
    command = [nvcc, "-ccbin", cxx[0], *flags, f"-gencode=arch={newest},code={newest}"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("__global__ void probe() {}\n")
        shown = subprocess.run(
            [*command, "-c", str(source), "-o", f"{source}.o", "--dryrun"],
            capture_output=True,
            text=True,
            check=False,
        ).stderr
        made = subprocess.run(
            [*command, "-c", str(source), "-o", f"{source}.o"],
            capture_output=True,
            text=True,
            check=False,
        )
    # The runtime is linked statically, so that the module imports where no driver is; its symbols stay
    # inside, apart from those of the runtime that torch brings.
    folders = [
        word.removeprefix("-L")
        for line in shown.splitlines()
        if line.startswith("#$ LIBRARIES=")
        for word in shlex.split(line.partition("=")[2])
    ]
    runtime = [path for path in folders if (Path(path) / "libcudart_static.a").is_file()]
    if made.returncode != 0 or not runtime:
        why = (made.stderr.strip().splitlines() or ["it has no libcudart_static.a"])[0]
        print(
            f"normwear-fast: {nvcc} cannot be used ({why}); building without CUDA", file=sys.stderr
        )
        return None
    link = [f"-L{runtime[0]}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return command, [*link, "-Wl,--exclude-libs,ALL"]


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildNative(build_ext):
    """`build_ext` that hands each extension to ninja."""

    def run(self) -> None:
        cxx = compiler()
        if cxx is None or not compiles(cxx, CXXFLAGS):
            why = f"{cxx[0]} cannot build a C++17 extension" if cxx else "no C++ compiler was found"
            print(
                f"normwear-fast: {why}; installing without normwear_fast._C, "
                "plain PyTorch and NumPy will be used",
                file=sys.stderr,
            )
            self.extensions = []
            self.distribution.ext_modules = []
            return
        self.cxx = cxx
        super().run()

    def build_extension(self, ext: Extension) -> None:
        flags = CXXFLAGS + (OPENMP if compiles(self.cxx, CXXFLAGS + OPENMP) else [])
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        # pip gives an editable install a new temporary folder each time; a lasting one lets ninja
        # see what has not changed.
        temporary = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp)
        folder = temporary.resolve() / (sysconfig.get_config_var("SOABI") or "native")
        folder.mkdir(parents=True, exist_ok=True)
        cuda = cuda_toolkit(self.cxx)
        self.write_build_info(folder / "build_info.h", flags, cuda is not None)

        includes = [f"-I{folder}", f"-I{ROOT / 'csrc'}", *python_includes()]
        includes.append(f"-isystem{pybind11.get_include()}")
        link = LINK + [flag for flag in flags if flag in OPENMP]
        link += (cuda[1] if cuda else []) + shlex.split(os.environ.get("LDFLAGS", ""))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        text = NINJA_BUILD.format(
            cxx=shlex.join(self.cxx),
            cxxflags=shlex.join(flags + includes).replace("$", "$$"),
            ldflags=shlex.join(link).replace("$", "$$"),
        )
        x86 = compiles(self.cxx, [*CXXFLAGS, *INSTRUCTION_SETS["avx512bf16"]])
        amx = x86 and compiles(self.cxx, [*CXXFLAGS, *INSTRUCTION_SETS["amx"]])
        objects = []
        for source in ext.sources:
            extra = ["-DNORMWEAR_X86"] * x86 + ["-DNORMWEAR_AMX"] * amx
            name = Path(source).stem.removeprefix("kernels_")
            if name in INSTRUCTION_SETS and source.startswith("csrc/cpu/kernels_"):
                extra += KERNELS + (
                    INSTRUCTION_SETS[name] if (amx if name == "amx" else x86) else []
                )
            objects.append(ninja_path(folder / f"{source}.o"))
            text += f"build {objects[-1]}: compile {ninja_path(ROOT / source)}\n"
            text += f"  extra = {shlex.join(extra)}\n"
        if cuda:
            text += NINJA_CUDA.format(nvcc=shlex.join([*cuda[0], f"-I{ROOT / 'csrc'}"]))
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.c*")):
                if source.suffix not in (".cpp", ".cu"):
                    continue
                objects.append(ninja_path(folder / f"csrc/cuda/{source.name}.o"))
                rule = "cuda" if source.suffix == ".cu" else "compile"
                text += f"build {objects[-1]}: {rule} {ninja_path(source)}\n"
                # See ingest.cuh: the order of roundings is part of what it computes.
                text += "  extra = -fmad=false\n" if source.stem == "ingest" else ""
        library = folder / target.name
        text += f"build {ninja_path(library)}: link {' '.join(objects)}\n"
        write_if_changed(folder / "build.ninja", text)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True)
        shutil.copy2(library, target)

    def write_build_info(self, path: Path, flags: list[str], cuda: bool) -> None:
        """The identity that normwear_fast.build compares with what it finds at run time."""
        version = subprocess.run(
            [*self.cxx, "--version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
        facts = {
            "BUILD_ID": IDENTITY["native_id"](ROOT),
            "PYTHON_ID": IDENTITY["python_id"](ROOT / "normwear_fast", ROOT / "kernels"),
            "COMPILER": version,
            "FLAGS": shlex.join(flags),
        }
        if cuda:
            facts["CUDA"] = " ".join(f"sm_{name}" for name in CUDA_ARCHITECTURES)
        lines = [f"#define NORMWEAR_{name} {c_string(value)}" for name, value in facts.items()]
        write_if_changed(path, "\n".join(["#pragma once", *lines, ""]))

    def copy_extensions_to_source(self) -> None:
        # A process that has the old library mapped keeps its file; writing into it would crash it.
        for ext in self.extensions:
            in_place = self.get_finalized_command("build_py").get_package_dir("normwear_fast")
            Path(in_place, self.get_ext_filename(ext.name.rpartition(".")[2])).unlink(
                missing_ok=True
            )
        super().copy_extensions_to_source()


def c_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def sources() -> list[str]:
    """The CPU's; those of csrc/cuda join them where nvcc is found."""
    found = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*.cpp")
        if path.parent.name != "cuda"
    )
    if not found:
        raise SystemExit("csrc/ holds no C++ source: the source tree is incomplete")
    return found


setup(
    packages=[
        *find_packages(include=["normwear_fast", "normwear_fast.*"]),
        "normwear_fast.kernels",
    ],
    package_dir={"normwear_fast.kernels": "kernels"},
    ext_modules=[Extension("normwear_fast._C", sources())],
    cmdclass={"build_ext": BuildNative},
)
