"""Builds normwear_fast._C from csrc/ with pybind11 and ninja; everything else is in pyproject.toml.

Ninja compiles the sources in parallel and, in an editable install, only those that changed. Without
a working C++17 compiler the package installs without `_C`, says so, and runs on plain PyTorch and
NumPy. CXX, CXXFLAGS and LDFLAGS are honoured.
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
LINK = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
PROBE = "#include <Python.h>\n#include <vector>\nint main_() { return std::vector<int>{1}[0]; }\n"
NINJA_BUILD = """\
ninja_required_version = 1.10
cxx = {cxx}
cxxflags = {cxxflags}
ldflags = {ldflags}

rule compile
  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in

rule link
  command = $cxx $in -o $out $ldflags
  description = link $out

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
        self.write_build_info(folder / "build_info.h", flags)

        includes = [f"-I{folder}", f"-I{ROOT / 'csrc'}", *python_includes()]
        includes.append(f"-isystem{pybind11.get_include()}")
        link = LINK + [flag for flag in flags if flag in OPENMP]
        link += shlex.split(os.environ.get("LDFLAGS", ""))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        text = NINJA_BUILD.format(
            cxx=shlex.join(self.cxx),
            cxxflags=shlex.join(flags + includes).replace("$", "$$"),
            ldflags=shlex.join(link).replace("$", "$$"),
        )
        objects = []
        for source in ext.sources:
            objects.append(ninja_path(folder / f"{source}.o"))
            text += f"build {objects[-1]}: compile {ninja_path(ROOT / source)}\n"
        library = folder / target.name
        text += f"build {ninja_path(library)}: link {' '.join(objects)}\n"
        write_if_changed(folder / "build.ninja", text)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True)
        shutil.copy2(library, target)

    def write_build_info(self, path: Path, flags: list[str]) -> None:
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
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp"))
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
