"""Files of tensors: read without running anything in them, written whole.

Safetensors are what we write. What ``torch.save`` wrote is read with ``weights_only``, and looked through
before that.
"""

from __future__ import annotations

import argparse
import contextlib
import pickletools
import re
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normwear_fast.errors import OutputError, WeightsError, first_line
from normwear_fast.files import sync

ZIP = b"PK\x03\x04"
"""How a file of today's ``torch.save`` begins; torch.load tells it by the same."""

LONGEST_NAME = 1000
"""Of a class or function in a pickle, in characters."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        WeightsError: it is none, or cut short.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # damaged files fail in every way
        raise WeightsError(
            f"{path}: not a safetensors file, or cut short ({first_line(error)})"
        ) from None


def check_pickled_names(path: Path) -> None:
    """A ValueError for a file of ``torch.save`` that asks for something by an endless name.

    torch.load looks for patterns in the message of what it refuses, which quotes the name, in a time
    that grows with the square of it: a damaged name of 80 kB takes minutes.
    """
    longest = 0
    with contextlib.suppress(Exception):  # what else is wrong with it torch says
        for name in _pickled_names(path):
            longest = max(longest, len(name))
    if longest > LONGEST_NAME:
        raise ValueError(f"a name of {longest} characters")


def _pickled_names(path: Path) -> Iterator[str]:
    """What the pickles of a file of ``torch.save`` ask for."""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        pickles = 5  # of a file that is no zip: magic, protocol, machine, the object, its storages
        if file.read(4) == ZIP:
            archive = stack.enter_context(zipfile.ZipFile(file))
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            file, pickles = stack.enter_context(archive.open(name)), 1
        else:
            file.seek(0)
        for _ in range(pickles):
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    yield str(argument)


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors and plain containers only.

    Raises:
        WeightsError: a file that is none of it, is cut short, or asks to run anything.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == ZIP
        check_pickled_names(path)
        # Training scripts keep their arguments beside the weights; a Namespace only holds them.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Of an odd pickle protocol: it loads, or the error says.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    # A damaged file makes the reader raise almost anything (KeyError, struct.error, EOFError, ...).
    except Exception as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise WeightsError(
                f"{path}: a pickle that asks to run {code[1]}; nothing of it was run. "
                "Only tensors are read: torch.save(model.state_dict(), path) where the file is from"
            ) from None
        raise WeightsError(
            f"{path}: not a checkpoint of torch.save, or cut short; nothing in it was run, "
            "and only tensors are read"
        ) from None


def own_storage(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors as `write_safetensors` wants them: dense, no two sharing memory."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file; the same tensors give the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # transformers asks for this key. More would come in random order, and the hash with them.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(first_line(error)) from None


def write_described(
    folder: Path, name: str, tensors: Mapping[str, Tensor], about: str, text: str, what: str
) -> None:
    """Writes a safetensors file and the JSON beside it; what was there is replaced or left whole.

    Args:
        folder: made if needed.
        name, tensors: the safetensors file and what it holds.
        about, text: the other file and what it holds.
        what: they are, for the error.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder, about) as new_about, _temporary(folder, name) as new:
            new_about.write_text(text, encoding="utf-8")
            write_safetensors(new, own_storage(tensors))
            shutil.copymode(new_about, new)  # safetensors makes files for the owner only
            sync(new_about)
            sync(new)
            new.replace(folder / name)
            new_about.replace(folder / about)
        sync(folder)
    except OSError as error:
        raise OutputError(f"{folder}: {what} cannot be written ({first_line(error)})") from None


@contextlib.contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """A hidden name in the folder for a file that will be renamed; removed if it was not."""
    path = folder / f".{name}.{secrets.token_hex(4)}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
