"""The native operators against their NumPy definitions."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from helpers import ends
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from normwear_fast import _native
from normwear_fast.errors import InputError

INT64 = np.iinfo(np.int64)
# Rounding only: values are below 1e6, a slope's error below 1e-16 of them a sample.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _native_is_built() -> None:
    assert _native.load()[0] is not None, "normwear_fast._C was not built"


def samples(shape: object) -> st.SearchStrategy[np.ndarray]:
    finite = st.floats(-1e6, 1e6)
    return hnp.arrays(
        np.float64,
        shape,
        elements=finite | st.sampled_from([np.nan, np.inf, -np.inf]),
        fill=st.just(np.nan) | finite,
    )


def assert_gather_matches(block: np.ndarray, starts: np.ndarray, length: int, fill: bool) -> None:
    windows, missing = _native.gather_windows(block, starts, length, fill=fill)
    expected, count = _native.gather_windows_definition(block, starts, length, fill=fill)
    assert windows.dtype == np.float64
    assert missing.dtype == np.int64
    assert windows.shape == (len(starts), length)
    np.testing.assert_array_equal(missing, count)
    if fill:
        np.testing.assert_allclose(windows, expected, **TOLERANCE)
    else:
        np.testing.assert_array_equal(windows, expected)


def with_gaps(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape).cumsum(-1)
    return np.where(rng.random(shape) < 0.2, rng.choice([np.nan, np.inf, -np.inf], shape), x)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("block_stride", [1, 3, -1])
def test_gather_random(fill: bool, block_stride: int) -> None:
    rng = np.random.default_rng()
    block = with_gaps(rng, (30_000,))[::block_stride]
    # 300 windows of 400 samples are above one thread's grain, so several threads share them.
    starts = rng.integers(-500, len(block) + 100, 300)
    assert_gather_matches(block, starts, 400, fill)


@given(
    block=samples(st.integers(0, 40)),
    starts=st.lists(st.integers(-60, 60) | st.integers(INT64.min, INT64.max), max_size=8),
    length=st.integers(0, 50),
    fill=st.booleans(),
)
def test_gather_any(block: np.ndarray, starts: list[int], length: int, fill: bool) -> None:
    assert_gather_matches(block, np.array(starts, np.int64), length, fill)


def test_gather_by_hand() -> None:
    nan = np.nan
    block = np.array([1.0, nan, 3.0, np.inf])
    windows, missing = _native.gather_windows(block, [-2, 0, 2, 4, INT64.max, INT64.min], 3)
    expected = [[nan, nan, 1], [1, nan, 3], [3, np.inf, nan], *[[nan] * 3] * 3]
    np.testing.assert_array_equal(windows, expected)
    assert missing.tolist() == [2, 1, 2, 3, 3, 3]
    filled, missing = _native.gather_windows(block, [-2, 0, 2, 4], 3, fill=True)
    np.testing.assert_array_equal(filled, [[1, 1, 1], [1, 2, 3], [3, 3, 3], [nan] * 3])
    assert missing.tolist() == [2, 1, 2, 3]


def test_gather_reads_a_column_in_place() -> None:
    table = np.random.default_rng().standard_normal((100, 4))
    windows, _ = _native.gather_windows(table[:, 2], np.arange(0, 90, 10), 10)
    np.testing.assert_array_equal(windows, table[:90, 2].reshape(9, 10))


def test_gather_takes_unaligned_and_narrow_indices() -> None:
    raw = np.zeros(8 * 10 + 1, np.uint8)
    block = raw[1:].view(np.float64)
    assert not block.flags.aligned
    block[:] = np.arange(10)
    windows, _ = _native.gather_windows(block, np.array([2, 5], np.int32)[::-1], 3)
    np.testing.assert_array_equal(windows, [[5, 6, 7], [2, 3, 4]])


@given(windows=samples(hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=30)))
def test_fill_any(windows: np.ndarray) -> None:
    expected = windows.copy()
    count = _native.fill_missing_definition(expected)
    valid = np.isfinite(windows)
    before = windows.copy()
    missing = _native.fill_missing(windows)
    np.testing.assert_array_equal(missing, count)
    np.testing.assert_allclose(windows, expected, **TOLERANCE)
    np.testing.assert_array_equal(windows[valid], before[valid])
    assert np.isfinite(windows[valid.any(axis=1)]).all()
    assert np.isnan(windows[~valid.any(axis=1)]).all()


def test_fill_random_rows_of_a_wider_array() -> None:
    wide = with_gaps(np.random.default_rng(), (300, 500))
    expected = wide.copy()
    count = _native.fill_missing_definition(expected[:, 50:450])
    np.testing.assert_array_equal(_native.fill_missing(wide[:, 50:450]), count)
    np.testing.assert_allclose(wide, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("block", "starts", "length", "message"),
    [
        (np.zeros(3, np.float32), [0], 2, r"float32 \(3,\)"),
        (np.zeros((3, 1)), [0], 2, r"float64 \(3, 1\)"),
        ([0.0, 1.0], [0], 2, "list"),
        (np.zeros(3), [0.5], 2, "starts are float64"),
        (np.zeros(3), [[0]], 2, r"\(1, 1\)"),
        (np.zeros(3), np.array([0], np.uint64), 2, "uint64"),
        (np.zeros(3), [0], -1, "length -1"),
    ],
)
def test_gather_refuses(block: object, starts: object, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        _native.gather_windows(block, starts, length)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "windows",
    [np.zeros((2, 3), np.float32), np.zeros(3), np.zeros((3, 4)).T, np.zeros((2, 6))[:, ::2]],
)
def test_fill_refuses(windows: np.ndarray) -> None:
    with pytest.raises(InputError, match="fill_missing"):
        _native.fill_missing(windows)


def test_fill_refuses_a_read_only_array() -> None:
    windows = np.zeros((2, 3))
    windows.flags.writeable = False
    with pytest.raises(InputError, match="writeable"):
        _native.fill_missing(windows)


def test_missing_library_warns_once_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    block = with_gaps(np.random.default_rng(), (1000,))
    starts = np.arange(-50, 1000, 70)
    native = _native.gather_windows(block, starts, 100, fill=True)
    monkeypatch.setattr(_native, "load", lambda: (None, "it was not built"))
    _native._module.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="it was not built") as record:
            plain = _native.gather_windows(block, starts, 100, fill=True)
        assert len(record) == 1
        assert record[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = native[0].copy()
            _native.fill_missing(again)
    finally:
        _native._module.cache_clear()
    np.testing.assert_allclose(plain[0], native[0], **TOLERANCE)
    np.testing.assert_array_equal(plain[1], native[1])


def test_other_threads_run_meanwhile() -> None:
    """A Python thread runs while a gather does: only the operator lets go of the GIL here."""
    module = importlib.import_module("normwear_fast._C")
    block = np.zeros(100_000)
    starts = np.zeros(1_000, np.int64)
    windows = np.empty((1_000, 2_000))
    missing = np.empty(1_000, np.int64)
    sizes = (block.ctypes.data, len(block), 1, starts.ctypes.data, 1_000, 2_000)
    arguments = (*sizes, windows.ctypes.data, missing.ctypes.data, True)
    stop = threading.Event()
    steps = 0

    def work() -> None:
        nonlocal steps
        while not stop.is_set():
            steps += 1
            time.sleep(0)

    thread = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    try:
        thread.start()
        before = steps
        for _ in range(50):
            module.gather_windows(*arguments)
            if steps > before:
                break
        during = steps - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert during > 0


def _gather_in_child(result: object) -> None:
    windows, _ = _native.gather_windows(np.arange(1e6), np.arange(1000), 1000)
    result.put(float(windows.sum()))  # type: ignore[attr-defined]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    """GNU OpenMP's thread pool does not survive fork; a child that used it would hang."""
    windows, _ = _native.gather_windows(np.arange(1e6), np.arange(1000), 1000)
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    child = context.Process(target=_gather_in_child, args=(result,))
    child.start()
    assert ends(child)
    assert result.get() == windows.sum()
