"""Benchmarks: the only place speed is claimed from."""

from importlib.util import find_spec
from pathlib import Path

import normwear_fast

# The kernels lie beside the package in the source tree and are its part once installed. Where the
# extension could not be built, Triton's kernels are there to be measured all the same.
if find_spec("normwear_fast.kernels") is None:
    normwear_fast.__path__.append(str(Path(__file__).resolve().parent.parent))
