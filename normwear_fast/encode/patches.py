"""Patch-level output: every token of every window, in a Zarr v3 store with one group a recording.

A work unit is one shard of each of its recordings, so it appears whole: shard, then its windows'
``status``, then the part that commits it. What an uncommitted unit has left is written again, to the
same bits. Arrays are encoded in memory by zarr and put in place by `OutputFolder`, by atomic renames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast import __version__
from normwear_fast.config import SAMPLING_RATE
from normwear_fast.encode.output import PATCHES, SCHEMA_VERSION, OutputFolder
from normwear_fast.encode.prepare import MISSING, NO_DATA, NOT_FINITE, OK, TOO_LARGE, PreparedUnit
from normwear_fast.encode.settings import EncodeSettings, window_samples
from normwear_fast.encode.survey import Surveyed, windows_of
from normwear_fast.encode.windows import WindowList, planned_duration
from normwear_fast.errors import UsageError

if TYPE_CHECKING:
    from normwear_fast.encode.pipeline import ModelInfo, Plan

PATCH_FORMAT = "normwear-fast patches"

STATUSES = ("not encoded", OK, MISSING, NO_DATA, TOO_LARGE, NOT_FINITE)
"""A window's ``status`` is its place here; 0 also where its recording could not be read."""

DIMENSIONS = ("window", "channel", "token", "dimension")

COORDINATES = ("window_id", "start_s", "duration_s", "tokens", "missing_fraction", "status")
"""Arrays of a group beside ``embedding`` and ``channel``, one value a window."""

_TAKEN = frozenset({"embedding", "channel", "zarr.json", *COORDINATES})


def require_zarr() -> None:
    """A UsageError that names the extra unless zarr is there."""
    try:
        import zarr
    except ImportError:
        raise UsageError(
            "pool 'patch' writes a Zarr store, which needs zarr: pip install 'normwear-fast[io]'"
        ) from None
    if int(zarr.__version__.split(".")[0]) < 3:
        raise UsageError(f"pool 'patch' needs zarr 3 or later; this is {zarr.__version__}")


def group_path(recording: str) -> str:
    """The Zarr group of a recording: its id, with what no node may be called percent-encoded."""
    return "/".join(_node(name) for name in recording.split("/"))


def _node(name: str) -> str:
    name = name.replace("%", "%25")
    if name in _TAKEN or name.startswith("__") or not name.strip("."):
        name = "".join(f"%{byte:02X}" for byte in name[:1].encode()) + name[1:]
    return name


class PatchStore:
    """Writes the units of a run into the Zarr store of its output folder.

    Args:
        folder: with its lock held.
        plan, settings, model, windows: the run's.
        run: its id.
        done: units committed before; their groups are there.
    """

    def __init__(
        self,
        folder: OutputFolder,
        plan: Plan,
        settings: EncodeSettings,
        model: ModelInfo,
        windows: WindowList | None,
        run: str,
        done: set[int],
    ) -> None:
        self._folder, self._plan, self._settings = folder, plan, settings
        self._model, self._windows = model, windows
        self._shard_windows: dict[int, int] = {}  # of each recording; its last shard may have fewer
        self._written: set[int] = set()
        for unit in plan.units:
            for span in unit.spans:
                self._shard_windows.setdefault(span.recording, span.stop - span.first)
                if unit.index in done:
                    self._written.add(span.recording)
        self._root = {
            "format": PATCH_FORMAT,
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "run": run,
            "weights": model.provenance["weights"],
            "scalogram": settings.scalogram,
            "precision": model.provenance["precision"],
        }

    def write(self, unit: PreparedUnit, values: Sequence[NDArray[np.float16] | None]) -> None:
        """Adds a unit; when this returns it survives a power cut.

        Args:
            unit: its rows, with their final status.
            values: (C, T, E) float16 of each row, None where it has none.
        """
        first = 0
        for span in self._plan.units[unit.index].spans:
            entry = self._plan.inputs[span.recording]
            count = span.stop - span.first
            rows = unit.rows[first : first + count]
            if not rows or rows[0].recording != entry.id:
                continue  # could not be read: it has no rows
            if span.recording not in self._written:
                self._create(span.recording, entry)
                self._written.add(span.recording)
            group = _Group(self._layout(span.recording, entry))
            tokens, width = group.shape[2:]
            block = np.full((count, len(entry.channels), tokens, width), np.nan, np.float16)
            for i, value in enumerate(values[first : first + count]):
                if value is not None:
                    block[i, :, : value.shape[1]] = value
            status = np.array([STATUSES.index(row.status) for row in rows], np.uint8)
            missing = np.array([row.missing_fraction for row in rows])
            there = slice(span.first, span.stop)
            self._folder.write_patches(
                group.chunks("embedding", there, block)
                | group.chunks("missing_fraction", there, missing)
                | group.chunks("status", there, status)
            )
            first += count

    def _layout(self, recording: int, entry: Surveyed) -> _Layout:
        settings, config = self._settings, self._model.config
        if settings.window is not None:
            longest = settings.window
        else:
            assert self._windows is not None
            durations = self._windows.recordings[entry.id].durations.tolist()
            longest = max(self._planned(duration, entry) for duration in durations)
        return _Layout(
            path=group_path(entry.id),
            shape=(
                entry.windows,
                len(entry.channels),
                self._tokens(longest),
                config.embed_dim,
            ),
            shard=self._shard_windows[recording],
        )

    def _planned(self, duration: float, entry: Surveyed) -> float:
        return planned_duration(duration, entry.duration, self._settings.max_missing)

    def _tokens(self, duration: float) -> int:
        """Of one channel of a window."""
        from normwear_fast.packing import window_tokens

        samples = window_samples(duration)
        return window_tokens(1, samples, self._settings.optimized_cwt, self._model.config)

    def _create(self, recording: int, entry: Surveyed) -> None:
        """Writes a recording's group: the metadata of its arrays, and what is known beforehand."""
        layout = self._layout(recording, entry)
        group = _Group(layout, self._attributes())
        windows = list(windows_of(entry.id, entry.duration, self._settings, self._windows))
        everything = slice(0, len(windows))
        tokens = [self._tokens(self._planned(window.duration, entry)) for window in windows]
        files = {
            **group.chunks("channel", slice(0, len(entry.channels)), _text(entry.channels)),
            **group.chunks("window_id", everything, _text([window.id for window in windows])),
            **group.chunks("start_s", everything, np.array([window.start for window in windows])),
            **group.chunks("duration_s", everything, np.array([w.duration for w in windows])),
            **group.chunks("tokens", everything, np.array(tokens, np.int32)),
            **group.metadata(),
        }
        # Groups above it may be recordings too, with attributes of their own.
        above = ["", *accumulate(layout.path.split("/")[:-1], "{}/{}".format)]
        for path in above:
            name = f"{path}/zarr.json".lstrip("/")
            if not (self._folder.path / PATCHES / name).exists():
                files[name] = _files(path, {} if path else self._root)[name]
        own = f"{layout.path}/zarr.json"
        files[own] = _files(layout.path, {"recording": entry.id})[own]
        self._folder.write_patches(files)

    def _attributes(self) -> dict[str, Any]:
        """Of the embedding array: what its last axes mean."""
        config = self._model.config
        return {
            "coordinates": " ".join(COORDINATES),
            "long_name": "NormWear patch embeddings",
            "token_order": "token 0 is [CLS]; the patch of time t and scale s is 1 + patch_columns t + s",
            "patch_columns": config.grid_columns,
            "patch_seconds": config.patch_size[0] / SAMPLING_RATE,
        }


def _text(values: Sequence[str]) -> NDArray[np.object_]:
    return np.array(list(values), dtype=object)


@dataclass(frozen=True)
class _Layout:
    """Where a recording's group lies and how its arrays are cut.

    Args:
        path: of the group.
        shape: (windows, channels, tokens, E) of ``embedding``.
        shard: windows of one.
    """

    path: str
    shape: tuple[int, int, int, int]
    shard: int


class _Group:
    """A group's arrays as zarr encodes them, in memory."""

    def __init__(self, layout: _Layout, attributes: Mapping[str, Any] | None = None) -> None:
        from zarr.storage import MemoryStore

        self._layout, self._attributes = layout, dict(attributes or {})
        self._encoded: dict[str, Any] = {}
        self._store = MemoryStore(self._encoded)
        self.shape = layout.shape

    def _array(self, name: str) -> Any:
        """Each with its own chunks: one window's channel of the embedding, a shard's windows of what
        is known with it, the whole of what is known beforehand."""
        import zarr
        from zarr.codecs import BloscCodec

        windows, channels, tokens, width = self.shape
        shard = self._layout.shard
        common: dict[str, Any] = {
            "store": self._store,
            "name": f"{self._layout.path}/{name}",
            "zarr_format": 3,
            "overwrite": True,
        }
        if name == "embedding":
            return zarr.create_array(
                shape=self.shape,
                dtype="float16",
                chunks=(1, 1, tokens, width),
                shards=(shard, channels, tokens, width),
                compressors=BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
                fill_value=float("nan"),
                dimension_names=DIMENSIONS,
                attributes=self._attributes,
                **common,
            )
        if name == "status":
            meanings = " ".join(status.replace(" ", "_") for status in STATUSES)
            common["attributes"] = {
                "flag_values": list(range(len(STATUSES))),
                "flag_meanings": meanings,
            }
        dtype = {"window_id": "str", "channel": "str", "tokens": "int32", "status": "uint8"}
        size = channels if name == "channel" else windows
        return zarr.create_array(
            shape=(size,),
            dtype=dtype.get(name, "float64"),
            chunks=(shard if name in ("status", "missing_fraction") else size,),
            fill_value=float("nan") if name == "missing_fraction" else None,
            dimension_names=("channel" if name == "channel" else "window",),
            **common,
        )

    def chunks(self, name: str, where: slice, values: NDArray[Any]) -> dict[str, bytes]:
        """The files that hold these values of an array, by path."""
        array = self._array(name)
        array[where] = values
        below = f"{self._layout.path}/{name}/c/"
        return {path: data for path, data in self._files().items() if path.startswith(below)}

    def metadata(self) -> dict[str, bytes]:
        """zarr.json of every array, the embedding's last."""
        paths = []
        for name in ("channel", *COORDINATES, "embedding"):
            self._array(name)
            paths.append(f"{self._layout.path}/{name}/zarr.json")
        files = self._files()
        return {path: files[path] for path in paths}

    def _files(self) -> dict[str, bytes]:
        return {path: data.to_bytes() for path, data in self._encoded.items()}


def _files(path: str, attributes: dict[str, Any]) -> dict[str, bytes]:
    """The metadata of a group (and of those above it), by path."""
    import zarr
    from zarr.storage import MemoryStore

    encoded: dict[str, Any] = {}
    store = MemoryStore(encoded)
    zarr.create_group(store, path=path, zarr_format=3, attributes=attributes)
    return {name: data.to_bytes() for name, data in encoded.items()}
