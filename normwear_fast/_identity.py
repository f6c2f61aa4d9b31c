"""Hashes of what a build is made from. Standard library only: setup.py runs this file alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

NATIVE_SUFFIXES = frozenset({".h", ".cpp", ".cu", ".cuh"})


def native_id(root: Path) -> str:
    """Hash of all that `_C` is compiled from: csrc/ and setup.py of the source tree `root`."""
    sources = [path for path in (root / "csrc").rglob("*") if path.suffix in NATIVE_SUFFIXES]
    return _hash(
        (path.relative_to(root).as_posix(), path) for path in [*sources, root / "setup.py"]
    )


def python_id(package: Path, kernels: Path) -> str:
    """Hash of the Python modules: those of normwear_fast and, wherever they lie, its kernels."""
    return _hash(
        [
            (f"{prefix}/{path.relative_to(folder).as_posix()}", path)
            for prefix, folder in (("normwear_fast", package), ("normwear_fast/kernels", kernels))
            for path in folder.rglob("*.py")
            if folder == kernels or kernels not in path.parents
        ]
    )


def _hash(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
