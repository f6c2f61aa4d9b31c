"""`ingest`: one definition, three implementations.

``scipy`` is the definition. ``cuda`` runs here through the host build of its kernel, ``cupy`` with
NumPy and SciPy in CuPy's place; on a GPU all run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch
from cuda_emulation import launcher

from normwear_fast import cuda_backend, ingest
from normwear_fast.errors import InputError, UsageError
from normwear_fast.ingest import IngestedWindows

HAS_GPU = torch.cuda.is_available()


def run_scipy(*args: Any, **options: Any) -> IngestedWindows:
    return ingest.ingest(*args, **options)


def run_emulated(*args: Any, **options: Any) -> IngestedWindows:
    call = ingest._checked(*arguments(args, options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backend, "launch", launcher(0))
        up = ingest._ingest_cuda(call)
        patch.setattr(cuda_backend, "launch", launcher(1))
        down = ingest._ingest_cuda(call)
    # Threads in the other order: the same bits, or a barrier is missing.
    assert torch.equal(up.data.view(torch.int32), down.data.view(torch.int32))
    return up


def run_arrays(*args: Any, **options: Any) -> IngestedWindows:
    call = ingest._checked(*arguments(args, options))
    raw = call.raw.numpy()
    results = ingest._ingest_arrays(call, raw, np, scipy.signal, scipy.ndimage)
    return IngestedWindows(*map(torch.from_numpy, results))


def run_on_gpu(implementation: str) -> Callable[..., IngestedWindows]:
    def run(raw: np.ndarray, *args: Any, **options: Any) -> IngestedWindows:
        if implementation == "cupy":
            pytest.importorskip("cupy")
        on_gpu = torch.from_numpy(raw).cuda()
        windows = ingest.ingest(on_gpu, *args, **options, implementation=implementation)
        return IngestedWindows(
            windows.data.cpu(), windows.missing_fraction.cpu(), windows.flat.cpu()
        )

    return run


def arguments(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    defaults: dict[str, Any] = {
        "offsets": 0.0,
        "gain": 1.0,
        "baseline": 0.0,
        "invalid": None,
        "preprocess": "none",
        "normalize": "none",
        "statistics": None,
    }
    return (*args, *(defaults | options).values())


gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here; the kernel is not run on one")
IMPLEMENTATIONS = [
    pytest.param(run_emulated, id="cuda-on-host"),
    pytest.param(run_arrays, id="arrays"),
    pytest.param(run_on_gpu("cuda"), id="cuda", marks=gpu),
    pytest.param(run_on_gpu("cupy"), id="cupy", marks=gpu),
]
every = pytest.mark.parametrize("run", IMPLEMENTATIONS)

CHOICES: list[dict[str, Any]] = [
    {},
    {"normalize": "window"},
    {"normalize": "recording", "statistics": [(1.0, 2.0), (0.3, 4.0)]},
    {"preprocess": "reference"},
    {"preprocess": "reference", "normalize": "window"},
]


def recorded(rng: np.random.Generator, dtype: Any, n: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Two channels with gaps, long and short, and how to read them."""
    walk = rng.standard_normal((2, n)).cumsum(-1) * 40
    lost = rng.random((2, n)) < [[0.1], [0.01]]
    lost[1, : n // 4] = True
    if dtype == np.float32:
        gap = rng.choice([np.nan, np.inf, -np.inf], (2, n))
        return np.where(lost, gap, walk).astype(np.float32), {"gain": [0.1, 2.0]}
    codes = [-30_000, 31_000]
    raw = np.where(lost, np.array(codes)[:, None], walk.clip(-29_000, 29_000)).astype(dtype)
    return raw, {"gain": [0.1, 0.013], "baseline": [1.5, -20.0], "invalid": codes}


def same(got: IngestedWindows, expected: IngestedWindows) -> None:
    assert got.data.dtype == torch.float32
    torch.testing.assert_close(got.missing_fraction, expected.missing_fraction, rtol=0, atol=1e-6)
    assert torch.equal(got.flat, expected.flat)
    # float64 throughout: what is left is float32's last bit.
    size = expected.data.nan_to_num().abs().amax()
    torch.testing.assert_close(
        got.data, expected.data, rtol=2e-7, atol=float(size) * 1e-7, equal_nan=True
    )


@every
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
@pytest.mark.parametrize("rate", [4.0, 64.0, 65.0, 100.0, 117.096, 256.0, 360.0, 700.1234, 1000.0])
def test_as_defined(run: Callable[..., IngestedWindows], dtype: Any, rate: float) -> None:
    rng = np.random.default_rng()
    n, length = int(rate * 12), int(rate * 5)
    raw, reading = recorded(rng, dtype, n)
    # Before the recording, inside, past its end, wholly outside; with and without an offset.
    starts = np.array([-3, 0, n // 2, n - length + 5, n + 10])
    offsets = np.array([0.0, 0.4, 0.0, 0.7, 0.4]) / rate
    lengths = length - np.array([0, 1, 0, 2, 0])
    for choice in CHOICES:
        options = {**reading, "offsets": offsets, **choice}
        expected = run_scipy(raw, rate, starts, lengths, 325, **options)
        same(run(raw, rate, starts, lengths, 325, **options), expected)
        assert expected.data[4].isnan().all()
        assert expected.data[:4].isfinite().all()


@every
def test_long_windows(run: Callable[..., IngestedWindows]) -> None:
    """More values than shared memory holds: the kernel works in device memory."""
    rng = np.random.default_rng()
    raw, reading = recorded(rng, np.int16, 20_000)
    assert ingest.SHARED_VALUES < 16_000 + 2 * 1040
    for choice in ({}, {"preprocess": "reference"}):
        options = {**reading, **choice}
        expected = run_scipy(raw, 1000.0, [0, 3000], 16_000, 1040, **options)
        same(run(raw, 1000.0, [0, 3000], 16_000, 1040, **options), expected)


@every
def test_ties_between_jumps(run: Callable[..., IngestedWindows]) -> None:
    """Equal jumps between integers, parted by a last bit by gain and gaps: the same one everywhere."""
    rng = np.random.default_rng()
    for _ in range(20):
        raw = rng.integers(-4, 5, (2, 700)).cumsum(-1).astype(np.int16)
        raw[:, rng.integers(0, 700, 30)] = 999
        options = {"gain": [1 / 3, 0.1], "baseline": 0.7, "invalid": 999, "preprocess": "reference"}
        expected = run_scipy(raw, 100.0, [0, 50], 600, 390, **options)
        same(run(raw, 100.0, [0, 50], 600, 390, **options), expected)


@every
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_tiny_windows(run: Callable[..., IngestedWindows], length: int) -> None:
    rng = np.random.default_rng()
    raw = rng.standard_normal((2, 9)).astype(np.float32)
    for rate in (30.0, 65.0, 130.0):
        for choice in CHOICES:
            expected = run_scipy(raw, rate, [0, 1], length, 11, **choice)
            same(run(raw, rate, [0, 1], length, 11, **choice), expected)


@every
@pytest.mark.parametrize("choice", CHOICES)
def test_flat(run: Callable[..., IngestedWindows], choice: dict[str, Any]) -> None:
    raw = np.full((2, 500), 7, dtype=np.int16)
    raw[1] = np.arange(500)  # a line: nothing is left of it without its trend
    expected = run_scipy(raw, 130.0, [0], 400, 200, **choice)
    got = run(raw, 130.0, [0], 400, 200, **choice)
    same(got, expected)
    assert got.flat[0, 0] or choice.get("normalize") == "recording"


@every
def test_any_strides(run: Callable[..., IngestedWindows]) -> None:
    """Interleaved channels, as WFDB stores them, and every other sample."""
    rng = np.random.default_rng()
    frames = rng.integers(-100, 100, (3000, 3)).astype(np.int16)
    raw = frames.T[:2, ::2]
    expected = run_scipy(raw.copy(), 128.0, [5, 700], 640, 325)
    same(run(raw, 128.0, [5, 700], 640, 325), expected)


@every
def test_too_large(run: Callable[..., IngestedWindows]) -> None:
    raw = np.random.default_rng().standard_normal((2, 500)).astype(np.float32)
    raw[1, :200] = 0
    with pytest.raises(InputError, match=r"window 1, channel 1.*too large for float32"):
        run(raw, 65.0, [0, 200], 200, 200, gain=[1.0, 1e39])


@every
def test_no_windows(run: Callable[..., IngestedWindows]) -> None:
    got = run(np.zeros((2, 5), np.int16), 65.0, [], 5, 11)
    assert got.data.shape == (0, 2, 11)
    assert got.flat.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"raw": np.zeros((2, 5))}, InputError, "raw samples are torch.float64"),
        ({"raw": np.zeros(5, np.int16)}, InputError, r"int16 \(5,\); they must be"),
        ({"starts": [0.5]}, InputError, "starts are float64"),
        ({"lengths": 0}, InputError, "a window of 0 raw samples"),
        ({"samples": 0}, InputError, "windows of 0 samples"),
        ({"sampling_rate": -1.0}, InputError, "sampling rate is -1.0"),
        ({"offsets": 1.0}, InputError, "must be within one sample"),
        ({"preprocess": "all"}, UsageError, "preprocess is 'all'"),
        ({"normalize": "recording"}, UsageError, "needs the statistics of 2 channels"),
        ({"implementation": "cuda"}, UsageError, "'cuda' does not run on cpu"),
        ({"implementation": "cupy"}, UsageError, "'cupy' does not run on cpu"),
        ({"implementation": "fast"}, UsageError, "implementation is 'fast'"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {
        "raw": np.zeros((2, 5), np.int16),
        "sampling_rate": 65.0,
        "starts": [0],
        "lengths": 5,
        "samples": 11,
    }
    with pytest.raises(error, match=message) as caught:
        ingest.ingest(**(options | change))
    assert "\n" not in str(caught.value)
