"""Wheel and sdist, each installed into a fresh environment and used from another folder."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

import normwear_fast
from normwear_fast import _identity, build
from normwear_fast.errors import NormWearError

ROOT = Path(__file__).resolve().parent.parent
TREE = ["normwear_fast", "kernels", "csrc"]
FILES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"]
SITE_PACKAGES = sysconfig.get_path("purelib")
# What is packed and found is the question here, not speed: compiling as installed takes three times
# as long.
QUICK = {"CXXFLAGS": "-O0", "NORMWEAR_FAST_CUDA": "0"}

# What a user of the installed package does: a tiny model, saved, loaded and encoding, by Python and
# by command. Prints where everything came from.
ENCODE = """
import json, sys, warnings
from pathlib import Path
import numpy as np
import normwear_fast, normwear_fast.kernels
from normwear_fast import FastNormWear, NormWearConfig, build
info = build.check_build() if {native} else build.build_info()
config = NormWearConfig(
    embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=64, decoder_num_heads=1, decoder_depth=1
)
FastNormWear(config=config, optimized_cwt=True).save_pretrained("weights")
signal = np.random.default_rng(0).standard_normal((2, 65 * 13))
np.savez("recording.npz", data=signal, sampling_rate=65.0, channels=np.array(["ECG", "PPG"]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = FastNormWear.from_pretrained("weights")
    embedding = model.encode(signal[None, :, :390].astype(np.float32), sampling_rate=65)
    from normwear_fast import _native
    _native.gather_windows(signal[0], [0, 10], 20)
    _native.gather_windows(signal[0], [0, 10], 20)
print(json.dumps(dict(
    package=normwear_fast.__file__,
    kernels=normwear_fast.kernels.__file__,
    info=info,
    shape=np.shape(embedding),
    finite=bool(np.isfinite(embedding).all()),
    warnings=[str(w.message) for w in caught if "normwear_fast._C" in str(w.message)],
)))
"""
REFUSED = """
from normwear_fast import build
try:
    build.check_build()
except build.NormWearError as error:
    print(error)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Runs a command outside this source tree; its output, or a failure that shows it."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        # The CUDA operators would only take time: the editable install of this tree has built them.
        env=inherited | {"NORMWEAR_FAST_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_tree(folder: Path) -> Path:
    """A copy of what a build needs, without anything compiled."""
    for name in TREE:
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)
    return folder


def environment(folder: Path) -> Path:
    """A fresh environment that sees this one's torch and the rest, but not its normwear_fast.

    A folder named in a .pth file is searched, while the .pth files in it (the editable install's)
    are not followed.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    Path(purelib.strip(), "parent.pth").write_text(f"{SITE_PACKAGES}\n")
    return python


def pip_install(python: Path, package: Path) -> None:
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options, package]
    run(*command, cwd=package.parent, **QUICK)


def encode_elsewhere(python: Path, folder: Path, native: bool = True) -> dict[str, Any]:
    """Encodes with the installed package from `folder`, by Python and by command."""
    folder.mkdir()
    found = json.loads(run(python, "-c", ENCODE.format(native=native), cwd=folder).splitlines()[-1])
    home = python.parent.parent
    assert Path(found["package"]).is_relative_to(home)
    assert Path(found["kernels"]) == Path(found["package"]).parent / "kernels" / "__init__.py"
    assert found["shape"] == [1, 2, 64]
    assert found["finite"]
    command = [python.parent / "normwear-fast", "encode", "recording.npz", "--weights", "weights"]
    run(*command, "--output", "out", cwd=folder)
    assert list((folder / "out").glob("part-*.parquet"))
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ with the wheel and the sdist, each built from the source tree."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = source_tree(folder / "tree")
    options = ["--no-isolation", "--wheel", "--sdist", "--outdir", folder / "dist"]
    run(sys.executable, "-m", "build", *options, tree, cwd=folder, **QUICK)
    return folder / "dist"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_package_encodes(kind: str, distributions: Path, tmp_path: Path) -> None:
    (package,) = distributions.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    python = environment(tmp_path / "environment")
    pip_install(python, package)
    found = encode_elsewhere(python, tmp_path / "elsewhere")
    assert found["info"]["build_id"] == _identity.native_id(ROOT)
    assert found["warnings"] == []
    with Path(found["kernels"]).open("a") as file:
        file.write("# changed\n")
    check = (
        "from normwear_fast import build\ntry: build.check_build()\nexcept Exception as e: print(e)"
    )
    assert "not those normwear_fast._C was packed with" in run(python, "-c", check, cwd=tmp_path)


def test_wheel_and_sdist_hold_every_file(distributions: Path) -> None:
    """A folder without __init__.py, or data nobody declared, would be missing from an install."""
    tree = distributions.parent / "tree"
    files = {
        path.relative_to(tree).as_posix()
        for folder in TREE
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert files - {name.partition("/")[2] for name in archive.getnames()} == set()

    (wheel,) = distributions.glob("*.whl")
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("normwear_fast/")}
    (library,) = (name for name in packed if name.endswith(".so"))
    moved = {name.replace("kernels/", "normwear_fast/kernels/", 1) for name in files}
    assert packed - {library} == {name for name in moved if not name.startswith("csrc/")}


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    tree = source_tree(tmp_path / "tree")
    python = environment(tmp_path / "environment")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--log",
        tmp_path / "log",
        "install",
    ]
    run(*command, *options, tree, cwd=tmp_path, CXX="no-such-compiler")
    log = (tmp_path / "log").read_text()
    assert log.count("installing without normwear_fast._C") == 1
    found = encode_elsewhere(python, tmp_path / "elsewhere", native=False)
    assert not found["info"]["native"]
    assert len(found["warnings"]) == 1


def test_a_source_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    """Only a missing compiler is forgiven: a broken csrc/ must not install quietly without _C."""
    tree = source_tree(tmp_path / "tree")
    for source in (tree / "csrc").rglob("*.cpp"):
        source.unlink()
    (tree / "csrc" / "broken.cpp").write_text("no C++\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=tree,
        env=os.environ | QUICK,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "broken.cpp" in done.stdout + done.stderr


def test_import_loads_nothing_heavy() -> None:
    heavy = ["triton", "cupy", "ray", "transformers", "sklearn", "matplotlib", "scipy.signal"]
    heavy += ["pandas", "wfdb", "edfio", "pyarrow", "h5py", "zarr", "mne"]
    loaded = f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    code = f"""
import sys
import torch
before = set(sys.modules)
import normwear_fast
{loaded}
from normwear_fast import FastNormWear
{loaded}
"""
    package, model = run(sys.executable, "-c", code, cwd=ROOT).splitlines()
    assert package == "[]"
    # torch.compiler.disable, which the model uses, loads torch._dynamo, and that Triton.
    assert model in ("[]", "['triton']")


def test_this_build_is_one() -> None:
    info = build.check_build()
    assert info["native"]
    assert info["version"] == normwear_fast.__version__


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the source tree that check_build() takes for the place of this installation."""
    tree = source_tree(tmp_path / "tree")
    kernels = importlib.import_module("normwear_fast.kernels")
    places = {normwear_fast: tree / "normwear_fast", kernels: tree / "kernels"}
    native = importlib.import_module("normwear_fast._C")
    monkeypatch.setattr(build, "_folder", {**places, native: tree / "normwear_fast"}.__getitem__)
    build.check_build()
    return tree


def refusal() -> str:
    with pytest.raises(NormWearError) as error:
        build.check_build()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_check_build_sees_a_change_in_csrc(tree: Path) -> None:
    with (tree / "csrc" / "cpu" / "windows.cpp").open("a") as file:
        file.write("// changed\n")
    assert "csrc/ has changed" in refusal()


def test_check_build_sees_an_added_source(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "more.cpp").write_text("")
    assert "csrc/ has changed" in refusal()


def test_check_build_sees_kernels_from_elsewhere(tree: Path) -> None:
    """Without csrc/ beside it the package is an installed one, and its kernels lie inside it."""
    shutil.rmtree(tree / "csrc")
    assert "normwear_fast.kernels lies in" in refusal()


def test_check_build_sees_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build._native, "load", lambda: (None, "it was not built"))
    assert "it was not built" in refusal()


def test_python_id_does_not_depend_on_where_kernels_lie(tmp_path: Path) -> None:
    tree = source_tree(tmp_path / "tree")
    before = _identity.python_id(tree / "normwear_fast", tree / "kernels")
    installed = tree / "normwear_fast" / "kernels"
    (tree / "kernels").rename(installed)
    assert _identity.python_id(tree / "normwear_fast", installed) == before
    (installed / "extra.py").write_text("")
    assert _identity.python_id(tree / "normwear_fast", installed) != before
