"""Every error a user can cause. One line each: what is wrong, where, what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path


class NormWearError(Exception):
    """Base of all errors that are the input's fault; commands print it without a traceback.

    Its text is one line of printable characters, at most `longest`. A longer one loses its middle:
    what is wrong and where stand at its beginning, what would be right at its end.
    """

    longest = 1000  # characters; a damaged file can name a channel with all its bytes

    def __str__(self) -> str:
        return one_line(super().__str__(), self.longest)


class InputError(NormWearError, ValueError):
    """An array, window or argument value the model cannot take."""


class RecordingError(NormWearError):
    """A recording that cannot be read, or contradicts itself."""


class WeightsError(NormWearError, ValueError):
    """A checkpoint of another form, size or origin than the model needs."""


class WeightNamesError(WeightsError):
    """A checkpoint whose names are not those of the sizes that it should be of."""

    longest = 50_000  # every name that differs is listed: 20,000 characters for the published size


class OutputError(NormWearError):
    """An output folder that cannot be written, or holds another run's results."""


class UsageError(NormWearError, ValueError):
    """A command or call whose arguments contradict each other or name nothing."""


def require(module: str, what: str, extra: str) -> None:
    """A UsageError that says how to install what is missing; before work that needs it at its end.

    Args:
        module: to be imported.
        what: needs it.
        extra: of this package that brings it.
    """
    try:
        import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        package = {"sklearn": "scikit-learn", "lightning_fabric": "lightning-fabric"}.get(
            package, package
        )
        raise UsageError(f"{what} needs {package}; pip install 'normwear-fast[{extra}]'") from None


def one_line(error: BaseException | str, length: int = 300) -> str:
    """What a library, the system or a file says, fit for a line that a user reads.

    Libraries quote what they were given: zipfile the whole rest of a file as a member's name, NumPy
    a header. Of a system's error only what happened is taken, its path is in our line already.

    Args:
        error: an exception, or its text.
        length: characters at most; a longer text loses its middle.

    Returns:
        Printable characters without line breaks, or the class of an exception that says nothing.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if not text.isprintable():
        pieces = "".join(letter if letter.isprintable() else "\n" for letter in text).split("\n")
        text = " ".join(piece.strip() for piece in pieces if piece.strip())  # a path's spaces stay
    if len(text) > length:
        end = length // 3
        text = f"{text[: length - end - 5]} ... {text[-end:]}"
    return text.strip() or ("" if isinstance(error, str) else type(error).__name__)


def first_line(error: BaseException) -> str:
    """The first line of another library's error: what follows is advice for its own callers."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return one_line(lines[0] if lines else type(error).__name__).rstrip(".")


@contextmanager
def reading(path: str | Path, kind: type[NormWearError], what: str) -> Iterator[None]:
    """Whatever goes wrong in the reading of a file becomes the one line that a user gets.

    A damaged file makes a library raise almost anything: its own errors and those of zlib, struct,
    zipfile or Python's parser, for want of memory too. All of it is caught, so that only other
    people's code and plain conversions belong under this. Our own errors pass as they are.

    Args:
        path: the file, or the place in it.
        kind: of the error.
        what: is wrong, in words that say what would be right, as "not a Parquet file".
    """
    try:
        yield
    except (NormWearError, ImportError):
        raise
    except Exception as error:
        raise kind(f"{path}: {what} ({one_line(error)})") from error


@contextmanager
def within(where: str | Path) -> Iterator[None]:
    """Names the file, or the place in it, before our errors of code that was given its values alone."""
    try:
        yield
    except NormWearError as error:
        if str(error).startswith(str(where)):
            raise
        raise type(error)(f"{where}: {error}") from None
