"""All pictures: model comparisons, probes, embedding maps, relevance, scalograms, and the report.

Every function returns a matplotlib Figure and touches no global state; `save` writes it as PNG or SVG,
`html_report` puts several into one self-contained page. Colours are Okabe and Ito's, which people with
any colour vision tell apart; more series than colours change their markers.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from normwear_fast.config import SAMPLING_RATE
from normwear_fast.errors import InputError, UsageError, require
from normwear_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATCH_ROWS, SCALE_GROUPS = 9, 13
"""Scalogram rows of a patch, and groups of scales."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS = "os^Dv*P"
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "normwear-fast",
    "figure.facecolor": "white",
}


def check_installed() -> None:
    """A UsageError unless pictures can be drawn."""
    require("matplotlib.figure", "a picture", "plots")


def _figure(width: float, height: float) -> Figure:
    check_installed()
    from matplotlib.figure import Figure as MatplotlibFigure

    return MatplotlibFigure(figsize=(width, height), layout="constrained")


class _styled:
    """The module's look while a figure is built or drawn, and no longer."""

    def __enter__(self) -> None:
        check_installed()
        import matplotlib

        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    return _MARKERS[(index // len(COLOURS) + index) % len(_MARKERS)]


def _table(models: Sequence[str], tasks: Sequence[str], scores: NDArray[np.floating]) -> Any:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(models), len(tasks)) or not scores.size:
        raise InputError(
            f"scores of shape {scores.shape} for {len(models)} models and {len(tasks)} tasks"
        )
    return scores


# -- comparisons -----------------------------------------------------------------------------------


def radar(models: Sequence[str], tasks: Sequence[str], scores: NDArray[np.floating]) -> Figure:
    """One axis a task, one polygon a model.

    Args:
        scores: (models, tasks), 0 to 1; NaN breaks a polygon. Three tasks or more.
    """
    scores = _table(models, tasks, scores)
    if len(tasks) < 3:
        raise InputError(f"a radar of {len(tasks)} tasks; three or more are right")
    with _styled():
        figure = _figure(7.5, 6.2)
        axes: Any = figure.add_subplot(projection="polar")
        angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
        closed = np.append(angles, angles[0])
        low = np.floor(10 * min(0.5, float(np.nanmin(scores)))) / 10
        for index, (model, row) in enumerate(zip(models, scores, strict=True)):
            style: Any = {"color": _colour(index), "marker": _marker(index), "markersize": 4}
            axes.plot(closed, np.append(row, row[0]), label=model, linewidth=1.6, **style)
            if np.isfinite(row).all():
                axes.fill(angles, row, color=_colour(index), alpha=0.08)
        axes.set_ylim(low, 1)
        ticks = [tick for tick in np.arange(0, 1.01, 0.1) if low < tick < 1.01]
        axes.set_yticks(ticks, [f"{100 * tick:.0f}" for tick in ticks], fontsize=8, color="#555555")
        axes.set_rlabel_position(180 / len(tasks))
        axes.set_xticks(angles, tasks)
        for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
            side = np.cos(angle)
            label.set_horizontalalignment(
                "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            )
        axes.tick_params(axis="x", pad=4)
        axes.spines["polar"].set_color("#CCCCCC")
        axes.grid(color="#DDDDDD")
        figure.legend(loc="outside lower center", ncols=min(4, len(models)), frameon=False)
    return figure


def bars(
    models: Sequence[str],
    tasks: Sequence[str],
    scores: NDArray[np.floating],
    intervals: NDArray[np.floating] | None = None,
    *,
    label: str = "score (%)",
) -> Figure:
    """Groups of bars, one group a task, with intervals.

    Args:
        scores: (models, tasks), 0 to 1; NaN leaves a gap.
        intervals: (models, tasks, 2) low and high; NaN for none.
    """
    scores = _table(models, tasks, scores)
    with _styled():
        width = max(5.0, 0.34 * len(models) * len(tasks) + 0.5 * len(tasks) + 1.5)
        figure = _figure(min(width, 18.0), 4.2)
        axes = figure.add_subplot()
        size = 0.8 / len(models)
        places = np.arange(len(tasks))
        for index, (model, row) in enumerate(zip(models, scores, strict=True)):
            at = places + (index - (len(models) - 1) / 2) * size
            axes.bar(at, 100 * row, 0.9 * size, color=_colour(index), label=model)
            if intervals is not None:
                low, high = 100 * np.moveaxis(np.asarray(intervals[index], np.float64), -1, 0)
                error = np.maximum(0, np.stack([100 * row - low, high - 100 * row]))
                axes.errorbar(at, 100 * row, error, fmt="none", ecolor="#333333", capsize=2, lw=1)
            tops = 100 * row if intervals is None else np.fmax(high, 100 * row)
            if len(models) * len(tasks) <= 40:
                for x, y, top in zip(at, 100 * row, tops, strict=True):
                    if np.isfinite(y):
                        axes.annotate(
                            f"{y:.1f}",
                            (x, top),
                            (0, 2),
                            textcoords="offset points",
                            ha="center",
                            fontsize=7,
                        )
        turned = len(tasks) > 4
        axes.set_xticks(
            places, tasks, rotation=30 if turned else 0, ha="right" if turned else "center"
        )
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#EEEEEE")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=min(6, len(models)), frameon=False)
    return figure


def critical_difference(
    models: Sequence[str], ranks: Sequence[float], distance: float, *, tasks: int
) -> Figure:
    """Demsar's diagram: mean ranks on a line, a bar over models that are not told apart.

    Args:
        ranks: mean rank of each model, 1 the best.
        distance: the critical difference (`evaluate.metrics.critical_difference`).
        tasks: how many tasks the ranks are means over.
    """
    order = np.argsort(ranks, kind="stable")
    values = np.asarray(ranks, dtype=np.float64)[order]
    names = [models[index] for index in order]
    count = len(names)
    if count < 2 or len(models) != len(ranks):
        raise InputError(f"{len(models)} models and {len(ranks)} ranks; two or more of both")
    ends = [int(np.flatnonzero(values <= value + distance)[-1]) for value in values]
    groups = [
        (first, last)
        for first, last in enumerate(ends)
        if last > first and not any(ends[before] >= last for before in range(first))
    ]
    left = (count + 1) // 2
    with _styled():
        depth = 0.32 * max(left, count - left) + 0.22 * len(groups)
        figure = _figure(7.5, 1.5 + depth)
        axes = figure.add_subplot()
        axes.axis("off")
        low, high = 1.0, float(max(count, 2))
        margin = 0.3 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(-0.5 - depth, 1.0)
        axes.plot([low, high], [0, 0], color="black", lw=1.2)
        for tick in range(1, round(high) + 1):
            axes.plot([tick, tick], [0, 0.1], color="black", lw=1.2)
            axes.text(tick, 0.16, str(tick), ha="center", va="bottom")
        wide = min(distance, high - low)
        axes.plot([low, low + wide], [0.62, 0.62], color="black", lw=1.2)
        for x in (low, low + wide):
            axes.plot([x, x], [0.56, 0.68], color="black", lw=1.2)
        cut = "" if wide == distance else ", longer than the line"
        axes.text(
            low + wide / 2,
            0.72,
            f"critical difference {distance:.2f} over {tasks} tasks{cut}",
            ha="center",
            va="bottom",
            fontsize=9,
        )
        top = -0.12
        for number, (first, last) in enumerate(groups):
            y = top - 0.22 * number
            axes.plot(
                [values[first] - 0.02, values[last] + 0.02],
                [y, y],
                color=COLOURS[0],
                lw=4,
                solid_capstyle="butt",
            )
        below = top - 0.22 * len(groups) - 0.12
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            on_left = index < left
            row = index if on_left else count - 1 - index
            y = below - 0.32 * row
            edge = low - 0.05 * margin if on_left else high + 0.05 * margin
            axes.plot([value, value, edge], [0, y, y], color="#444444", lw=0.9)
            axes.text(
                edge + (-0.03 if on_left else 0.03) * margin,
                y,
                f"{name} {value:.2f}",
                ha="right" if on_left else "left",
                va="center",
            )
    return figure


# -- one probe -------------------------------------------------------------------------------------


def confusion(
    truth: NDArray[np.integer], guess: NDArray[np.integer], classes: Sequence[str]
) -> Figure:
    """Counts of true (rows) against predicted classes, shaded by the share of the row.

    Args:
        truth, guess: (n,) class indices into `classes`.
    """
    count = len(classes)
    table = np.bincount(np.asarray(truth) * count + np.asarray(guess), minlength=count**2)
    if len(table) != count**2:
        raise InputError(f"classes beyond the {count} named ones")
    table = table.reshape(count, count)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    with _styled():
        size = 2.6 + 0.62 * count
        figure = _figure(size + 0.6, size)
        axes = figure.add_subplot()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row in range(count):
            for column in range(count):
                axes.text(
                    column,
                    row,
                    str(table[row, column]),
                    ha="center",
                    va="center",
                    color="white" if share[row, column] > 0.55 else "black",
                )
        axes.set_xticks(range(count), classes, rotation=30, ha="right")
        axes.set_yticks(range(count), classes)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def roc(
    truth: NDArray[np.integer], probabilities: NDArray[np.floating], classes: Sequence[str]
) -> Figure:
    """Receiver operating curve of each class against the rest, with its area.

    Args:
        truth: (n,) indices into `classes`.
        probabilities: (n, len(classes)). For two classes the second one's curve is drawn.
    """
    truth = np.asarray(truth)
    if probabilities.shape != (len(truth), len(classes)):
        raise InputError(f"probabilities {probabilities.shape} of {len(classes)} classes")
    with _styled():
        figure = _figure(5.0, 4.6)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#BBBBBB", lw=1, linestyle="--")
        drawn = [1] if len(classes) == 2 else range(len(classes))
        for index in drawn:
            positive = truth == index
            if not 0 < positive.sum() < len(truth):
                continue  # a class the test half lacks has no curve
            score = np.asarray(probabilities[:, index], dtype=np.float64)
            order = np.argsort(-score, kind="stable")
            # One point a distinct score: samples of equal score enter together.
            last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
            hits = np.append(0, np.cumsum(positive[order])[last]) / positive.sum()
            alarms = np.append(0, np.cumsum(~positive[order])[last]) / (~positive).sum()
            area = float(np.trapezoid(hits, alarms))
            name = f"{classes[index]}, area {area:.3f}"
            axes.plot(alarms, hits, color=_colour(index), lw=1.8, label=name)
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_aspect("equal")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", frameon=False, fontsize=9)
    return figure


def embedding_map(
    embeddings: NDArray[np.floating],
    groups: Sequence[str],
    *,
    method: Literal["pca", "tsne"] = "pca",
    seed: int = 0,
) -> Figure:
    """Embeddings in two dimensions, coloured by group (a modality, a class, a subject).

    Args:
        embeddings: (n, F) finite.
        groups: n names.
        method: `pca`, or `tsne` through scikit-learn.
    """
    points = np.asarray(embeddings, dtype=np.float64)
    if points.ndim != 2 or len(points) != len(groups) or len(points) < 3:
        raise InputError(
            f"embeddings {points.shape} and {len(groups)} groups; (n, F) with n groups, n >= 3"
        )
    points = points - points.mean(axis=0)
    if method == "pca":
        left, values, right = np.linalg.svd(points, full_matrices=False)
        # A component's sign is arbitrary: the largest loading is made positive.
        signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
        flat = np.zeros((len(points), 2))
        kept = min(2, len(values))
        flat[:, :kept] = (left * values * signs)[:, :kept]
        total = float((values**2).sum()) or 1.0
        shares = [100 * float(value**2) / total for value in values[:2]] + [0.0]
        names = [f"component {i + 1} ({shares[i]:.0f} % of variance)" for i in range(2)]
    elif method == "tsne":
        require("sklearn.manifold", "t-SNE", "eval")
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(points) - 1) / 3)
        flat = TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(points)
        names = ["t-SNE 1", "t-SNE 2"]
    else:
        raise UsageError(f"map {method!r}; pca or tsne")
    group_of = np.asarray(groups)
    with _styled():
        figure = _figure(6.4, 4.6)
        axes = figure.add_subplot()
        for index, group in enumerate(dict.fromkeys(groups)):
            own = flat[group_of == group]
            style: Any = {"color": _colour(index), "marker": _marker(index)}
            axes.scatter(own[:, 0], own[:, 1], s=16, alpha=0.75, linewidths=0, label=group, **style)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_xticks([])
        axes.set_yticks([])
        figure.legend(loc="outside right upper", frameon=False, markerscale=1.5)
    return figure


# -- signals ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RelevanceWindow:
    """One window of a relevance picture.

    Args:
        start: seconds after the recording's start.
        signal: (C, L) at 65 Hz, as the encoder got it.
        relevance: (C, T) of its tokens, [CLS] first.
        answer: shown above the window.
    """

    start: float
    signal: NDArray[np.floating]
    relevance: NDArray[np.floating]
    answer: str = ""


def relevance(
    windows: Sequence[RelevanceWindow],
    channels: Sequence[str] | None = None,
    *,
    title: str = "",
) -> Figure:
    """The relevance of every patch behind the signal it belongs to: a row a channel.

    Colour is relevance over the window's mean: 1 is average, whatever the number of tokens. A patch is
    9 scalogram rows by one of 13 groups of scales; row r stands at sample r + 1 of the window, the
    middle of the second difference it is made of. [CLS] has no place in time and is left out.

    Args:
        windows: of one recording, in order; gaps between them stay empty.
        channels: their names.
        title: above the picture.

    Raises:
        InputError: no window, or relevance that is not of the signal's tokens.
    """
    if not windows:
        raise InputError("a picture of relevance needs at least one window")
    for window in windows:
        count, length = window.signal.shape
        tokens = [1 + SCALE_GROUPS * (rows // PATCH_ROWS) for rows in (length - 2, length - 1)]
        if window.relevance.shape not in [(count, token) for token in tokens]:
            raise InputError(
                f"relevance {window.relevance.shape} over a signal {window.signal.shape}; "
                f"({count}, {tokens[-1]}) tokens are right"
            )
    count = len(windows[0].signal)
    names = channels if channels is not None else [f"channel {i + 1}" for i in range(count)]
    ratios = [
        window.relevance * (window.relevance.size / (float(window.relevance.sum()) or 1.0))
        for window in windows
    ]
    spread = max(float(np.abs(ratio[:, 1:] - 1).max()) for ratio in ratios) or 1e-6
    with _styled():
        figure = _figure(11, 1.2 + 1.5 * count)
        rows: Any = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for channel, (axes, name) in enumerate(zip(rows, names, strict=True)):
            front = axes.twinx()
            front.set_zorder(axes.get_zorder() + 1)
            front.patch.set_visible(False)
            for window, ratio in zip(windows, ratios, strict=True):
                grid = ratio[channel, 1:].reshape(-1, SCALE_GROUPS).T
                edges = (np.arange(grid.shape[1] + 1) * PATCH_ROWS + 0.5) / SAMPLING_RATE
                mesh = axes.pcolormesh(
                    window.start + edges,
                    np.arange(SCALE_GROUPS + 1),
                    grid,
                    cmap="RdBu_r",
                    vmin=1 - spread,
                    vmax=1 + spread,
                    alpha=0.75,
                    rasterized=True,
                    linewidth=0,
                )
                series = window.signal[channel]
                times = window.start + np.arange(len(series)) / SAMPLING_RATE
                front.plot(times, series, color="black", linewidth=0.9)
                if channel == 0 and window.answer:
                    axes.annotate(
                        _shortened(window.answer, 60 // len(windows) + 8),
                        (window.start + len(series) / SAMPLING_RATE / 2, 1.02),
                        xycoords=axes.get_xaxis_transform(),
                        ha="center",
                        va="bottom",
                        fontsize=8,
                    )
                axes.axvline(window.start, color="0.5", linewidth=0.6, linestyle=":")
            axes.margins(x=0)
            axes.set_ylabel(name)
            axes.set_yticks([0, SCALE_GROUPS], ["fine", "coarse"], fontsize=7)
            front.tick_params(labelsize=7)
        rows[-1].set_xlabel("time (s)")
        if title:
            figure.suptitle(title, fontsize=11)
        figure.colorbar(mesh, ax=list(rows), label="relevance (1 = average)", pad=0.03)
    return figure


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(1, length - 1)].rstrip() + "…"


def scalogram_mask(
    scalogram: NDArray[np.floating],
    mask: NDArray[Any] | None = None,
    *,
    sampling_rate: float = 65.0,
) -> Figure:
    """The three scalograms of a channel, with the removed patches covered.

    Args:
        scalogram: (3, rows, 65) of the series and its two differences.
        mask: (13 * (rows // 9),), 1 = removed, token order 13 t + s; None for none.
    """
    values = np.asarray(scalogram, dtype=np.float64)
    if values.ndim != 3 or values.shape[0] != 3 or values.shape[2] % 5:
        raise InputError(f"scalogram {values.shape}; (3, rows, 65) is right")
    rows, scales = values.shape[1:]
    steps, bands = rows // 9, scales // 5
    if mask is not None and np.shape(mask) != (steps * bands,):
        raise InputError(f"mask {np.shape(mask)}; ({steps * bands},) is right for {rows} rows")
    with _styled():
        figure = _figure(9.0, 5.6)
        panels: Any = figure.subplots(3, 1, sharex=True)
        extent = (0, rows / sampling_rate, -0.4, scales - 0.4)
        names = ("signal", "first difference", "second difference")
        for axes, image, name in zip(panels, values, names, strict=True):
            limit = float(np.quantile(np.abs(image), 0.995)) or 1.0
            shown = axes.imshow(
                image.T,
                origin="lower",
                aspect="auto",
                extent=extent,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                interpolation="nearest",
            )
            if mask is not None:
                hidden = np.asarray(mask, dtype=np.float64).reshape(steps, bands).T
                cover = np.zeros((bands, steps, 4))
                cover[..., :3] = 0.82
                cover[..., 3] = 0.94 * (hidden > 0)
                own = (0, 9 * steps / sampling_rate, -0.4, scales - 0.4)
                axes.imshow(
                    cover,
                    origin="lower",
                    aspect="auto",
                    extent=own,
                    interpolation="nearest",
                )
            axes.set_xlim(extent[:2])
            axes.set_ylim(extent[2:])
            axes.set_ylabel("scale a")
            axes.set_title(name, loc="left", fontsize=10)
            figure.colorbar(shown, ax=axes, pad=0.01)
        panels[-1].set_xlabel("time (s)")
    return figure


# -- files -----------------------------------------------------------------------------------------


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (150 dots an inch) or SVG (text stays text), by the path's ending."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"{path}: pictures are .png or .svg")
    content = _encode(figure, path.suffix[1:])
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def _encode(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date, the same figure gives the same bytes.
    metadata: Any = {"Date": None} if kind == "svg" else None
    with _styled():
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
figure {{ margin: 1rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def html_report(
    path: str | Path,
    title: str,
    sections: Sequence[tuple[str, Figure | Path | list[dict[str, str]] | str]],
) -> Path:
    """One self-contained page: no script, no font and no picture from elsewhere.

    Args:
        sections: (heading, content): a figure, the path of a saved .png, a table as rows of column
            to value, or text.
    """
    parts = []
    for heading, content in sections:
        if heading:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
        if isinstance(content, str):
            parts.append(f"<p>{html.escape(content)}</p>")
        elif isinstance(content, list):
            parts.append(_html_table(content))
        else:
            data = content.read_bytes() if isinstance(content, Path) else _encode(content, "png")
            picture = base64.b64encode(data).decode()
            alt = html.escape(heading or title, quote=True)
            parts.append(
                f'<figure><img alt="{alt}" src="data:image/png;base64,{picture}"></figure>'
            )
    page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _html_table(rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td>{html.escape(str(row.get(name, '')))}</td>" for name in columns)
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
