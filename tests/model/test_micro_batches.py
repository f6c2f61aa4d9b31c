"""`encode_unit`: one unit or many, left early or failing late, from one thread or several."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_model import tiny

from normwear_fast import engine, transfer
from normwear_fast import model as model_module
from normwear_fast.errors import InputError
from normwear_fast.packing import plan_micro_batches, plan_units

BUDGET = 300
"""Tokens of a micro-batch in what follows: a unit is 2,400."""


def ragged(count=84):
    """float64, so that preparing makes an array; mixed, so that a unit is not packed in its order."""
    rng = np.random.default_rng(11)
    return [rng.standard_normal((1 + i % 3, 20 + 13 * (i % 4))) for i in range(count)]


def planned(model, windows):
    """The windows of every micro-batch, unit by unit."""
    tokens = [model._window_tokens(w.shape) for w in windows]
    for unit in plan_units(tokens, engine.UNIT_BATCHES * BUDGET):
        shapes, counts = (
            [values[i] for i in unit] for values in ([w.shape for w in windows], tokens)
        )
        yield (
            unit,
            [
                [unit[i] for i in batch.windows]
                for batch in plan_micro_batches(shapes, counts, BUDGET)
            ],
        )


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_units_in_a_row_are_units_one_by_one(pool, precision, ahead, monkeypatch):
    """To the bit, whatever the host is ahead: no micro-batch has windows of two units."""
    model, windows = tiny(precision=precision), ragged()
    alone = []
    for unit, _ in planned(model, windows):
        prepared = [windows[i].astype(np.float32) for i in unit]
        alone += model.encode_unit(prepared, pool=pool, batch_tokens=BUDGET)
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", ahead)
    model = tiny(precision=precision)
    together = model.encode(windows, pool=pool, batch_tokens=BUDGET)
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("ahead", [0, 2])
def test_windows_are_prepared_a_micro_batch_at_a_time(ahead, monkeypatch):
    """Each just before its micro-batch is sent, the next unit's under the last one's compute."""
    model, windows, steps, alive = tiny(), ragged(), [], []
    prepare, run, fetch = model_module.prepare, engine.Engine.run, transfer.Transfers.fetch

    def prepared(window, rate, samples, resample, missing, index):
        steps.append(index)
        result = prepare(window, rate, samples, resample, missing, index)
        alive.append(weakref.ref(result))
        return result

    def ran(*arguments):
        assert not [1 for reference in alive if reference() is not None]  # packed, and let go
        steps.append("run")
        return run(*arguments)

    def fetched(self, result):
        wait = fetch(self, result)

        def waited():
            steps.append("wait")
            return wait()

        return waited

    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", ahead)
    monkeypatch.setattr(model_module, "prepare", prepared)
    monkeypatch.setattr(engine.Engine, "run", ran)
    monkeypatch.setattr(transfer.Transfers, "fetch", fetched)
    model.encode(windows, batch_tokens=BUDGET)
    batches = [batch for _, batches in planned(model, windows) for batch in batches]
    assert len(batches) > 2 * engine.UNIT_BATCHES
    expected = []
    for number, batch in enumerate(batches):
        expected += [*batch, "run", *["wait"] * (number >= ahead)]
    assert steps == expected + ["wait"] * ahead


def test_a_late_error_names_its_window_and_leaves_the_model_usable(monkeypatch):
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", 2)
    model, windows = tiny(), ragged()
    whole = model.encode(windows, batch_tokens=BUDGET)
    units = list(planned(model, windows))
    (last, batches), late = units[-1], units[-1][1][-1][-1]
    assert len(units) > 2
    assert late > last.start

    def refused(changes, **options):
        broken = [changes.get(i, window) for i, window in enumerate(windows)]
        with pytest.raises(InputError) as caught:
            model.encode(broken, batch_tokens=BUDGET, **options)
        assert caught.value.__suppress_context__  # one error, however often it was met
        for a, b in zip(whole, model.encode(windows, batch_tokens=BUDGET), strict=True):
            assert np.array_equal(a, b)
        return str(caught.value)

    gap = windows[late].copy()
    gap[-1, 3] = np.nan
    message = refused({late: gap})
    assert message.startswith(f"window {late}, channel {len(gap) - 1} holds NaN or inf")
    # Of two in a unit the first in the order given, whichever is packed first.
    order = [i for batch in batches for i in batch]
    first, second = next((i, j) for j, i in pairwise(order) if i < j)
    empty = {i: np.full_like(windows[i], np.nan) for i in (first, second)}
    assert refused(empty, missing="interpolate").startswith(f"window {first}, channel 0 holds no")
    huge = {first: windows[first] * 1e300}
    assert refused(huge | {second: empty[second]}).startswith(f"window {first} holds values beyond")
    assert refused({late: np.zeros((2, 10))}) == (
        f"window {late} has 10 samples at 65 Hz; 11 are needed"
    )
    assert f"window {late} of 3 channels and 300 samples" in refused({late: np.zeros((3, 300))})


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_that_is_left_early_keeps_nothing(ahead, monkeypatch):
    """Whether closed or only dropped: the model goes on, and nothing of the run is kept."""
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", ahead)
    model, windows = tiny(), [w.astype(np.float32) for w in ragged()]
    whole = model.encode_unit(windows, batch_tokens=BUDGET)
    results, run = [], engine.Engine.run

    def ran(*arguments):
        result = run(*arguments)
        results.append(weakref.ref(result))
        return result

    monkeypatch.setattr(engine.Engine, "run", ran)
    left = model._run_unit(windows, "mean", BUDGET, None)
    next(left)
    left.close()
    del left
    assert len(results) == ahead + 1
    assert not [1 for reference in results if reference() is not None]
    for a, b in zip(whole, model.encode_unit(windows, batch_tokens=BUDGET), strict=True):
        assert np.array_equal(a, b)


def test_a_micro_batch_that_fails_leaves_the_model_usable(monkeypatch):
    """Between the copy in and the copy out, with others on their way; and in the copy out itself."""
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", 2)
    model, windows = tiny(), ragged()
    whole = model.encode(windows, batch_tokens=BUDGET)
    for owner, name in ((engine.Engine, "run"), (transfer.Transfers, "fetch")):
        inner, calls = getattr(owner, name), []

        def fails(*arguments, inner=inner, calls=calls):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory")
            return inner(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                model.encode(windows, batch_tokens=BUDGET)
        for a, b in zip(whole, model.encode(windows, batch_tokens=BUDGET), strict=True):
            assert np.array_equal(a, b)


def test_threads_share_a_model(monkeypatch):
    """Their micro-batches take turns; everyone gets what is theirs."""
    monkeypatch.setitem(transfer.IN_FLIGHT, "cpu", 2)
    model = tiny()
    rng = np.random.default_rng(3)
    sets = [
        [rng.standard_normal((1 + i % 2, 20 + 13 * ((i + n) % 4))) for i in range(24)]
        for n in range(4)
    ]
    alone = [model.encode(windows, batch_tokens=BUDGET) for windows in sets]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda w: model.encode(w, batch_tokens=BUDGET), sets))
    for expected, got in zip(alone, together, strict=True):
        for a, b in zip(expected, got, strict=True):
            assert np.array_equal(a, b)


def test_copies_have_their_streams_once_a_model():
    model = tiny()
    x = np.random.default_rng().standard_normal((1, 1, 40)).astype(np.float32)
    model.encode(x)
    kept = model._transfers
    model.encode(x)
    assert kept is not None
    assert model._transfers is kept
    assert copy.deepcopy(model)._transfers is None
    assert pickle.loads(pickle.dumps(model))._transfers is None
    model.double().encode(x)
    assert model._transfers is not kept
    assert model._transfers.dtype == torch.float64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_encodes_leaves_the_child_free() -> None:
    model = tiny(backend="torch").requires_grad_(False)
    model._lock.acquire()  # as that thread would have it
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if threading.Thread(target=model._engine).start() is None else 1)
    finally:
        model._lock.release()
    # The lock of the child is free for any of its threads.
    assert os.waitpid(child, 0)[1] == 0
