"""The chart of a result file: `python -m bench.chart bench/results/NAME.json` writes NAME.png."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(path: Path) -> Path:
    """Channel-windows a second of every row of one result, with its ratio to the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text())
    rows = {name: row for name, row in result["rows"].items() if row.get("channel_windows_per_s")}
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.38 * len(rows)), layout="constrained")
    names = list(rows)[::-1]
    rates = [rows[name]["channel_windows_per_s"] for name in names]
    bars = axes.barh(names, rates, color="#3b6ea5")
    labels = [
        f"{rate:.3g}" + (f"  ({rows[name]['ratio']:.2f}x)" if rows[name].get("ratio") else "")
        for name, rate in zip(names, rates, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4)
    axes.margins(x=0.18)
    axes.set_xlabel("channel-windows a second (ratio to its interleaved baseline)")
    facts = result["machine"]
    axes.set_title(f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, {facts['date']}")
    axes.spines[["top", "right"]].set_visible(False)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
