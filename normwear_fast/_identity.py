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
    own = [path for path in _modules(package) if kernels not in path.parents]
    return _hash(
        [(f"normwear_fast/{path.relative_to(package).as_posix()}", path) for path in own]
        + [
            (f"normwear_fast/kernels/{path.relative_to(kernels).as_posix()}", path)
            for path in _modules(kernels)
        ]
    )


def _modules(package: Path) -> list[Path]:
    """The modules that setuptools packs: a folder without __init__.py is none of them."""
    return [
        path
        for path in package.rglob("*.py")
        if all(
            (package / folder / "__init__.py").is_file()
            for folder in path.relative_to(package).parents
        )
    ]


def _hash(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
