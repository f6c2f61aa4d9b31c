"""What this installation was built from, and whether its parts belong together.

`python -m normwear_fast.build` prints it in one line.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import normwear_fast
from normwear_fast import _identity, _native
from normwear_fast.errors import NormWearError

REBUILD = "rebuild with `pip install -e .` (a C++17 compiler is needed)"


def build_info() -> dict[str, Any]:
    """Facts about this installation, for manifests and benchmark reports.

    Returns:
        version; native: whether `_C` is there; why_not: why not, or None; and of `_C`: build_id,
        compiler, flags, openmp, cuda (None or False without it) and the GPU architectures that its
        CUDA code is compiled for.
    """
    module, why_not = _native.load()
    return {
        "version": normwear_fast.__version__,
        "native": module is not None,
        "why_not": why_not,
        "build_id": getattr(module, "BUILD_ID", None),
        "compiler": getattr(module, "COMPILER", None),
        "flags": getattr(module, "FLAGS", None),
        "openmp": getattr(module, "OPENMP", False),
        "cuda": getattr(module, "CUDA", False),
        "cuda_architectures": getattr(module, "CUDA_ARCHITECTURES", "").split(),
    }


def check_build() -> dict[str, Any]:
    """Makes sure that `normwear_fast`, its `kernels` and `_C` come from one build.

    In a source tree (an editable install) the kernels must be the tree's own and `_C` must have
    been compiled from csrc/ as it is now. In an installed wheel all three must lie in one folder
    and the Python modules must be those that were packed with `_C`.

    Returns:
        `build_info()`.

    Raises:
        NormWearError: one line naming the part that is missing, stale or from elsewhere.
    """
    module, why_not = _native.load()
    if module is None:
        raise NormWearError(f"normwear_fast._C is missing ({why_not}); {REBUILD}")
    package = _folder(normwear_fast)
    kernels = _folder(importlib.import_module("normwear_fast.kernels"))
    if _folder(module) != package:
        raise NormWearError(
            f"normwear_fast._C lies in {_folder(module)}, normwear_fast in {package}; "
            "uninstall one of the two installations"
        )
    root = package.parent
    in_source_tree = (root / "csrc").is_dir() and (root / "setup.py").is_file()
    expected = root / "kernels" if in_source_tree else package / "kernels"
    if kernels != expected:
        raise NormWearError(
            f"normwear_fast.kernels lies in {kernels}, not in {expected}; "
            "uninstall one of the two installations"
        )
    if in_source_tree:
        if _identity.native_id(root) != module.BUILD_ID:
            raise NormWearError(f"csrc/ has changed since normwear_fast._C was built; {REBUILD}")
    elif _identity.python_id(package, kernels) != module.PYTHON_ID:
        raise NormWearError(
            f"the Python files in {package} are not those normwear_fast._C was packed with; "
            "reinstall normwear-fast"
        )
    return build_info()


def _folder(module: Any) -> Path:
    return Path(module.__file__).resolve().parent


def main() -> None:
    info = build_info()
    if info["native"]:
        openmp = "OpenMP" if info["openmp"] else "no OpenMP"
        native = f"native code by {info['compiler']}, {openmp}"
    else:
        native = f"no native code ({info['why_not']}), plain PyTorch and NumPy are used"
    print(f"normwear_fast {info['version']}: {native}")


if __name__ == "__main__":
    main()
