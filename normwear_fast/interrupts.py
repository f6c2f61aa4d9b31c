"""Ctrl-C as a request: what is being done is brought to an end that can be gone on from."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def graceful_stop(asked: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) only asks to stop; a second one ends the process at once.

    Args:
        asked: called when it is, in the signal handler.

    Yields:
        whether it was asked to stop. Never in another thread than the main one, which gets no signals.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        event.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        asked()

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in before:
        signal.signal(each, ask)
    try:
        yield event.is_set
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
