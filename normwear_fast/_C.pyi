"""The native module; csrc/bindings.cpp is its source. Addresses are those of live arrays."""

BUILD_ID: str
PYTHON_ID: str
COMPILER: str
FLAGS: str
CUDA: bool
CUDA_ARCHITECTURES: str
OPENMP: bool

def gather_windows(
    block: int,
    n: int,
    stride: int,
    starts: int,
    count: int,
    length: int,
    windows: int,
    missing: int,
    fill: bool,
) -> None: ...
def fill_missing(windows: int, count: int, length: int, stride: int, missing: int) -> None: ...

# Where CUDA is True: the fields of csrc/cuda/launch.h by name, pointers and the stream as integers.
def cuda_residual_norm(fields: dict[str, float], stream: int) -> None: ...
def cuda_tokenize(fields: dict[str, float], stream: int) -> None: ...
def cuda_linear_float8(fields: dict[str, float], stream: int) -> None: ...
def cuda_linear(fields: dict[str, float], stream: int) -> None: ...
def cuda_hopper_runs() -> bool: ...
def cuda_ingest_runs() -> bool: ...
def cuda_ingest(fields: dict[str, float], stream: int) -> None: ...

class Matrix:
    """A weight packed for one instruction set."""

    bytes: int
    shape: tuple[int, int]

class Kernels:
    """The operators of one instruction set: csrc/cpu/kernels.h. normwear_fast.native calls them."""

    name: str
    lanes: int
    largest_weight: int
    native_bfloat16: bool

def kernels(name: str) -> Kernels | None: ...
