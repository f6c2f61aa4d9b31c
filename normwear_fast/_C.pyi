"""The native module; csrc/bindings.cpp is its source. Addresses are those of live arrays."""

BUILD_ID: str
PYTHON_ID: str
COMPILER: str
FLAGS: str
CUDA: bool
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
