"""Every error a user can cause. One line each: what is wrong, where, what would be right."""

from __future__ import annotations


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

    longest = 50_000  # every name that differs is listed: 20,000 characters for the published size


class OutputError(NormWearError):
    """An output folder that cannot be written, or holds another run's results."""


class UsageError(NormWearError, ValueError):
    """A command or call whose arguments contradict each other or name nothing."""


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
