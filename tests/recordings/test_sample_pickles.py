"""Published sample pickles read as data: what they hold, and hostile ones refused."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from payload import Payload
from recording_checks import opened_in_any_blocks, refused_when_read, signal

from normwear_fast.errors import RecordingError
from normwear_fast.recordings import open_recording
from normwear_fast.recordings.unpickle import load_pickle


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_sample_pickles_are_read(tmp_path: Path, protocol: int, order: Any) -> None:
    data = np.array(signal(3, 390, np.float16), order=order)
    sample = {
        "uid": "wesad_1",
        "data": data,
        "sampling_rate": np.int64(65) if protocol % 2 else 65,
        "label": [{"class": 2}, {"reg": np.float32(0.5)}],
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(sample, protocol))
    recording, whole = opened_in_any_blocks(path)
    assert [c.sampling_rate for c in recording.channels] == [65.0] * 3
    np.testing.assert_array_equal(whole, data.astype(np.float64))
    refused_when_read(path, "contradicts", rate=100)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values_are_read(tmp_path: Path, protocol: int) -> None:
    value = {
        "uid": "s1",
        "data": np.arange(6, dtype=np.float16).reshape(2, 3),
        "turned": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        "big": np.arange(3, dtype=">i4"),
        "label": [{"class": np.int64(2)}, {"reg": (1.5, None)}, {"reg": np.float32(0.5)}],
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    found = load_pickle(path)
    for name in ("data", "turned", "big"):
        np.testing.assert_array_equal(found[name], value[name])
        # NumPy turns foreign byte order into the machine's, except in protocol 5.
        assert found[name].dtype.newbyteorder("=") == value[name].dtype.newbyteorder("=")
    assert found["label"] == value["label"]
    assert np.dtype("i4").isnative  # nothing of a pickle reached NumPy's own dtypes


@pytest.mark.parametrize(
    ("sample", "word"),
    [
        ([1, 2], "no sample"),
        ({"data": [[1.0, 2.0]], "sampling_rate": 65}, "no sample"),
        ({"data": np.zeros((3, 10))}, "--rate"),
        ({"data": np.zeros((3, 10)), "sampling_rate": "x"}, "Hz above 0"),
        ({"data": np.zeros((10, 3)), "sampling_rate": 65}, "(channels, samples)"),
        ({"data": np.array(["a", "b"]), "sampling_rate": 65}, "real numbers"),
        ({"data": np.zeros((1, 2, 3)), "sampling_rate": 65}, "(1, 2, 3)"),
    ],
)
def test_pickles_that_are_no_samples_are_refused(tmp_path: Path, sample: Any, word: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(sample))
    refused_when_read(tmp_path / "a.pkl", word)


def _state(shape: bytes, raw: bytes = b"C\x08" + b"\0" * 8) -> bytes:
    """An array built NumPy's way with this shape and these bytes, as instructions."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR"
        b"(K\x01" + shape + b"cnumpy\ndtype\n(X\x02\0\0\0f8I00\nI01\ntR"
        b"(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb" + b"\x89" + raw + b"tb."
    )


def hostile_pickles(victim: Path) -> dict[str, bytes]:
    """Pickles that would run a command, change the reader, or take all memory."""
    command = f"touch {victim}"
    text = command.encode()
    array = np.zeros(4)
    inner = pickle.dumps(Payload(victim), 2)
    pollution = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "system": pickle.dumps(Payload(victim)),
        "system_0": pickle.dumps(Payload(victim), 0),
        "in_a_sample": pickle.dumps({"data": array, "sampling_rate": 65, "label": Payload(victim)}),
        "object_array": pickle.dumps(np.array([Payload(victim)], dtype=object)),
        "array_of_dicts": pickle.dumps(np.array([{}, None], dtype=object)),
        "structured_array": pickle.dumps(np.zeros(2, dtype=[("a", "f8")])),
        "array_of_another_length": pickle.dumps(np.zeros(3), 2).replace(b"K\x03\x85", b"K\x7f\x85"),
        "eval": b"c__builtin__\neval\n(X\x03\0\0\x001+1tR.",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "getattr_stack_global": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__class__\x93.",
        "numpy_f2py": b"cnumpy.f2py\ncompile\n(X\x01\0\0\0xtR.",
        "numpy_runstring": b"cnumpy.testing._private.utils\nrunstring\n(X\x01\0\0\0x}tR.",
        "numpy_load": b"cnumpy\nload\n(X\x05\0\0\0a.npytR.",
        "inst": b"(S'" + text + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nX" + struct.pack("<I", len(text)) + text + b"o.",
        "newobj": b"\x80\x02cnumpy\ndtype\n)\x81.",
        "newobj_ex": b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93)}\x92.",
        "ext": b"\x80\x02\x82\x01.",
        "persistent": b"Pfile\n.",
        "nested": b"cnumpy.core.multiarray\n_reconstruct\n(C"
        + bytes([len(inner)])
        + inner
        + b"K\0\x85C\x01btR.",
        "ndarray_memory": b"cnumpy\nndarray\n((I100000000000\ntS'd'\ntR.",
        "class_of_ours": b"cnormwear_fast.errors\nNormWearError\n.",
        "reconstruct_memory": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        b"\x8a\x08\0\0\0\0\0\x01\0\0\x85C\x01btR.",
        "reconstruct_type": b"cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\ndict\n"
        b"K\0\x85C\x01btR.",
        "state_shape": _state(b"\x8a\x08\0\0\0\0\0\x01\0\0\x85"),
        "state_negative": _state(b"J\xff\xff\xff\xff\x85"),
        "state_short": _state(b"K\x02\x85"),
        "dtype_object": b"cnumpy\ndtype\n(X\x01\0\0\0OI00\nI01\ntR.",
        "dtype_void": b"cnumpy\ndtype\n(X\x0b\0\0\0V1000000000I00\nI01\ntR.",
        "dtype_fields": b"cnumpy\ndtype\n(X\x02\0\0\0f8I00\nI01\ntR(K\x03X\x01\0\0\0<N"
        b"(X\x01\0\0\0at}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb.",
        "pollute_function": pollution + b"N}X\x0c\0\0\0__defaults__K\x01s\x86b.",
        "pollute_slots": pollution + b"N}X\x04\0\0\0callNs\x86b.",
        "pollute_type": b"cnumpy\nndarray\nN}X\x04\0\0\0callNs\x86b.",
        "memo_2_31": b"Nr\xff\xff\xff\x7f." + b"\0" * 8,
        "memo_2_31_list": b"]r\xff\xff\xff\x7fN\x61j\xff\xff\xff\x7f0.",
        "long_2_31": b"\x8b\xff\xff\xff\x7f.",
        "text_2_60": b"\x8d\0\0\0\0\0\0\0\x10.",
        "bytes_2_60": b"\x8e\0\0\0\0\0\0\0\x10.",
        "bytearray_2_60": b"\x80\x05\x96\0\0\0\0\0\0\0\x10.",
        "frame_2_60": b"\x80\x04\x95\0\0\0\0\0\0\0\x10N.",
        "copies": b"]X\0\0\x10\0"
        + b"a" * (1 << 20)
        + b"q\x01a"
        + b"c_codecs\nencode\nh\x01X\x05\0\0\0ascii\x86Ra" * 4000
        + b".",
        "deep_key": b"}(" + b")" + b"\x85" * 200_000 + b"K\0u.",
        "deep_tuple": b"(" * 100_000 + b"t" * 100_000 + b".",
        "deep_list": b"]" * 100_000 + b"a" * 99_999 + b".",
        "laughs": b"]q\0"
        + b"".join(
            b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
        )
        + b".",
        "set_of_itself": b"\x80\x04\x8f\x94(K\x01\x90.",
        "append_to_array": _state(b"K\x01\x85")[:-1] + b"K\0a.",
        "no_stack": b"R.",
        "cut": pickle.dumps({"data": array, "sampling_rate": 65})[:-20],
        "text": b"uid,data\n1,2\n",
        "png": b"\x89PNG\r\n",
    }


@pytest.mark.parametrize(
    ("written", "damaged", "word"),
    [
        (b"K\x03", b"K\x43", "a NumPy dtype of an unknown version"),
        (b"K\x00t", b"K\x02t", "a NumPy dtype of another size or with flags"),
        (b"C\x01b", b"C\x01`", "an array that is not built NumPy's way"),
    ],
)
def test_what_numpy_refuses_is_not_read_by_guess(
    tmp_path: Path, written: bytes, damaged: bytes, word: str
) -> None:
    """Found by random damage."""
    data = signal(2, 390, np.float16)
    sample = {"uid": "u1", "data": data, "sampling_rate": 65, "label": [{"class": 1}]}
    good = pickle.dumps(sample, 4)
    assert good.count(written) == 1
    (tmp_path / "a.pkl").write_bytes(good.replace(written, damaged))
    with pytest.raises(RecordingError, match=word):
        open_recording(tmp_path / "a.pkl")


@pytest.mark.parametrize("kind", list(hostile_pickles(Path("x"))))
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "ran"
    path = tmp_path / "a.pkl"
    path.write_bytes(hostile_pickles(victim)[kind])
    refused_when_read(path)
    assert not victim.exists()
    # and the reader is what it was
    good = {"data": np.arange(6.0).reshape(1, 6), "sampling_rate": 65}
    path.write_bytes(pickle.dumps(good, 2))
    np.testing.assert_array_equal(load_pickle(path)["data"], good["data"])


def test_the_hostile_pickles_do_harm_elsewhere(tmp_path: Path) -> None:
    """The gadget is a real one: Python's own unpickler runs it."""
    victim = tmp_path / "ran"
    pickle.loads(hostile_pickles(victim)["system"])
    assert victim.exists()
