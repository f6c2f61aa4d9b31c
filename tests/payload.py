"""What a hostile pickle holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Payload:
    """Makes a file when a plain unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)
