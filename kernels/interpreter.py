"""Triton's interpreter (TRITON_INTERPRET=1), which runs the kernels on CPU tensors: one thing mended."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Lets a loop's bound be a value the kernel loaded.

    Triton 3.6 keeps a scalar as a (1,) array and calls ``int`` on it, which NumPy 2.4 refuses.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # The scope, which has noted what stood here before, takes this one away after the launch.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched
