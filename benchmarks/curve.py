"""Plot score against cost from tables of benchmarks/paper.py.

    python benchmarks/curve.py benchmarks/results/paper-large-5.json benchmarks/results/paper-large-share-5.json
                               benchmarks/results/paper-main-5.json [-o docs/img/cost.png]

One panel per table. x: FLOPs relative to plain training; y: difference of the score; both averaged over the tasks. Bars
are 95 % intervals if there are several seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def panel(axes: plt.Axes, table: dict) -> None:
    seeds = table["settings"]["seeds"]
    tasks = table["settings"]["tasks"]
    points = [row for row in table["rows"] if (row["task"] is None or len(tasks) == 1) and row["ratios"]]
    points = [row for row in points if row["difference"] or row["method"] == table["reference"]]
    for row in points:
        difference = row["difference"] or {"mean": 0.0, "low": None, "high": None}
        cost, mean = row["ratios"]["flops"], difference["mean"]
        ours = row["method"] == "safe"
        colour = "#c0392b" if ours else "#555555"
        bounds = [difference["low"], difference["high"]]  # None with one seed
        if None not in bounds and bounds[0] != bounds[1]:
            axes.plot([cost, cost], bounds, color=colour, linewidth=1, alpha=0.5)
        axes.plot([cost], [mean], "o", color=colour, markersize=6 if ours else 4)
        right = cost > 0.9
        axes.annotate(
            row["method"], (cost, mean), xytext=(-6 if right else 6, 4), textcoords="offset points", color=colour,
            fontsize=8, fontweight="bold" if ours else "normal", ha="right" if right else "left",
        )  # fmt: skip
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    large = "; --large" if table["settings"].get("large") else ""
    axes.set_title(f"{', '.join(tasks)}{large}; {len(seeds)} seed{'s' * (len(seeds) > 1)}", fontsize=9)
    axes.set_xlabel("FLOPs, plain = 1")
    axes.set_xlim(min([0.4, *(row["ratios"]["flops"] - 0.05 for row in points)]), 1.05)
    axes.margins(y=0.12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/img/cost.png"))
    options = parser.parse_args()
    tables = []
    for path in options.tables:
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            tables.append({name: table[name] for name in ("reference", "rows", "settings")})
        except (OSError, ValueError, LookupError, TypeError):
            parser.error(f"{path} is not a table of benchmarks/paper.py")
    figure, panels = plt.subplots(1, len(options.tables), figsize=(5.2 * len(options.tables), 4), squeeze=False)
    for axes, table in zip(panels[0], tables, strict=True):
        panel(axes, table)
    panels[0][0].set_ylabel("score, points against plain")
    figure.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=130)
    print(f"Drawn: {options.output}")


if __name__ == "__main__":
    main()
