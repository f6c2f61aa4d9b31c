"""Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on CPU tensors: three things mended."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TORCH_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}
"""Triton's name of a type to torch's."""


def mend() -> None:
    """Mends what Triton 3.6 gets wrong.

    A loop's bound may be a value that the kernel loaded: Triton keeps a scalar as a (1,) array and
    calls ``int`` on it, which NumPy 2.4 refuses. Conversions round as a GPU's do: Triton's own truncate
    to bfloat16, and lose the carry where rounding to float8 reaches the next power of two. Products of
    bfloat16 are of the values; Triton multiplies their bits as integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # The scope, which has noted what stood here before, takes this one away after the launch.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched

    convert = interpreter._convert_float

    def converted(data: NDArray[Any], source: Any, target: Any, rounding_mode: Any) -> NDArray[Any]:
        if source.name not in TORCH_TYPES or target.name not in TORCH_TYPES:
            result: NDArray[Any] = convert(data, source, target, rounding_mode)
            return result
        values = torch.from_numpy(np.ascontiguousarray(data)).view(TORCH_TYPES[source.name])
        if target.name == "fp8e4nv":
            values = values.float().clamp(-448, 448)  # where torch's conversion makes NaN
        bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
        rounded = values.to(TORCH_TYPES[target.name])
        return rounded.view(bits[rounded.element_size()]).numpy()

    interpreter._convert_float = converted

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    builder.create_dot = create_dot
