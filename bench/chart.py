"""The chart of a result file: `python -m bench.chart bench/results/NAME.json` writes NAME.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def draw(path: Path) -> Path:
    """How many times its interleaved baseline every row of one result is, and its rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text())
    rows = {name: row for name, row in result["rows"].items() if row.get("channel_windows_per_s")}
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.38 * len(rows)), layout="constrained")
    names = list(rows)[::-1]
    ratios = [rows[name].get("ratio") or 1.0 for name in names]
    # From 1 on a logarithmic scale: twice as fast is as long to the right as half as fast to the left.
    axes.set_xscale("log", base=2)
    axes.barh(names, [ratio - 1 for ratio in ratios], left=1.0, color="#3b6ea5")
    for place, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        rate = rows[name]["channel_windows_per_s"]
        label = f" {ratio:.2f}x,  {float(f'{rate:.3g}'):g} a second"
        axes.text(max(ratio, 1.0), place, label, va="center")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlim(min(*ratios, 0.5), 6 * max(*ratios, 1.0))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times its interleaved baseline; channel-windows a second")
    facts = result["machine"]
    axes.set_title(f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, {facts['date']}")
    axes.spines[["top", "right"]].set_visible(False)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="result files with a table of rows")
    for path in parser.parse_args().results:
        print(draw(path))
