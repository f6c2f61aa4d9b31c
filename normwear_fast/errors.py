"""Every error a user can cause. One line each: what is wrong, where, what would be right."""

from __future__ import annotations


class NormWearError(Exception):
    """Base of all errors that are the input's fault; commands print it without a traceback."""


class InputError(NormWearError, ValueError):
    """An array, window or argument value the model cannot take."""


class RecordingError(NormWearError):
    """A recording that cannot be read, or contradicts itself."""


class WeightsError(NormWearError, ValueError):
    """A checkpoint of another form, size or origin than the model needs."""


class OutputError(NormWearError):
    """An output folder that cannot be written, or holds another run's results."""


class UsageError(NormWearError, ValueError):
    """A command or call whose arguments contradict each other or name nothing."""
