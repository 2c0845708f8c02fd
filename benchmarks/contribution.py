"""What each block's adapters contribute to a task, beside what they cost: the ground truth for scores.

    python benchmarks/contribution.py [--tasks trec6 sst2 rotten_tomatoes mrpc banking77] [--seeds 0 1 2]
                                      [--parts depth single] [--depths 1 2 3 4 5] [--epochs 5] [--large]
                                      [--work FOLDER] [--data ../shared/data] [-o benchmarks/results/contribution.json]

Tasks, rows and weights are those of benchmarks/paper.py. Besides plain LoRA:

- ``depth``: a static prefix of every depth, frozen from step 0 at rest, on kept states (``keep_cache``);
- ``single``: adapters everywhere but in one block (``without``), and in one block only (``alone``).

Score and held-out loss are those after training. FLOPs and saved bytes are counted. Finished cells stay in ``--work``
and in the output: the same command continues, another one extends the table, and two at once share the cells. The table
is one line per task and run; the figure shows each block's contribution beside its share of the cost.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from datasets import disable_progress_bars
from paper import TASKS, large, task_file
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar
from weights import fetch

from adafreeze.cli.compare import main as compare
from adafreeze.errors import AdafreezeError
from adafreeze.journal import read_history

METHODS = Path(__file__).with_name("contribution_methods.py")
KEPT = ("score", "loss", "flops", "peak_saved_bytes", "mean_saved_bytes", "cpu_seconds")


def methods_of(parts: list[str], depths: list[int] | None, blocks: int) -> list[str]:
    """Names of the runs, without two that repeat others: block 0 left out is depth 1, the last alone depth B − 1."""
    names = []
    if "depth" in parts:
        names += [f"Depth{depth}" for depth in depths or range(1, blocks)]
    if "single" in parts:
        names += [f"Without{block}" for block in range(1, blocks)]
        names += [f"Alone{block}" for block in range(blocks - 1)]
    return ["plain", *(f"{METHODS}:{name}" for name in names)]


def collect(cells: Path, tasks: list[str]) -> dict[str, Any]:
    """All finished cells: by task and run, each number by seed."""
    found: dict[str, Any] = {task: {} for task in tasks}
    for path in sorted(cells.glob("*/*/seed-*/outcome.json")):
        outcome = json.loads(path.read_text())
        if outcome["task"] not in found or outcome["reason"] is not None:
            continue
        metrics = outcome["metrics"]
        numbers = {
            "score": 100 * metrics["accuracy"] if "accuracy" in metrics else metrics["bleu"],
            "loss": metrics["loss"],
            **{name: outcome[name] for name in KEPT[2:]},
        }
        runs = found[outcome["task"]].setdefault(outcome["method"], {name: {} for name in (*KEPT, "online")})
        # The training loss along the run, of each interval of ``logging_steps``.
        numbers["online"] = [loss for _, loss in read_history(path.parent).logs["loss"]]
        for name, number in numbers.items():
            runs[name][str(outcome["seed"])] = number
    return found


def merged(found: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """``found``, and what an earlier table has beside it."""
    for task, runs in earlier.items():
        for run, numbers in runs.items():
            mine = found.setdefault(task, {}).setdefault(run, {name: {} for name in numbers})
            for name, by_seed in numbers.items():
                mine[name] = {**by_seed, **mine[name]}
    return found


def paired(runs: dict[str, Any], run: str, name: str) -> list[float]:
    """Differences to plain on the same seeds."""
    ours, plain = runs[run][name], runs["plain"][name]
    return [ours[seed] - plain[seed] for seed in ours if seed in plain]


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task and run: the mean difference to plain in score and loss, and ratios of the costs."""
    rows = []
    for task, runs in found.items():
        for run in sorted(runs, key=lambda name: (name.partition("-")[0] != "plain", name)):
            score, loss = (paired(runs, run, name) for name in ("score", "loss"))
            if not score:
                continue
            ratios = {
                name: mean(runs[run][name][seed] / runs["plain"][name][seed] for seed in runs[run][name])
                for name in KEPT[2:]
                if all(runs["plain"][name].get(seed) for seed in runs[run][name])
            }
            rows.append(
                {
                    "task": task,
                    "run": run,
                    "seeds": len(score),
                    "score": mean(runs[run]["score"].values()),
                    "difference": mean(score),
                    "sd": stdev(score) if len(score) > 1 else None,
                    "loss_difference": mean(loss),
                    "ratios": ratios,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("task", "run", "n", "score", "to plain", "loss to plain", "FLOPs", "peak", "mean saved", "CPU time")
    for row in rows:
        ratios = [f"{row['ratios'].get(name, float('nan')):.2f}" for name in KEPT[2:]]
        difference = f"{row['difference']:+.2f}" + (f" ± {row['sd']:.2f}" if row["sd"] is not None else "")
        numbers = (f"{row['score']:.2f}", difference, f"{row['loss_difference']:+.3f}")
        table.add_row(row["task"], row["run"], str(row["seeds"]), *numbers, *ratios)
    Console(width=130).print(table)


def draw_figure(rows: list[dict[str, Any]], file: Path) -> None:
    """By task: points that leaving the lowest k blocks out costs, that one block alone wins, and the share of cost."""
    import matplotlib.pyplot as plt

    by_task: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_task[row["task"]][row["run"]] = row
    shown = {task: runs for task, runs in by_task.items() if any(run.startswith("depth") for run in runs)}
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.2), sharey=True, squeeze=False)
    for axis, (task, runs) in zip(axes[0], shown.items(), strict=True):
        depths = sorted(int(run.split("-")[1]) for run in runs if run.startswith("depth-"))
        differences = [runs[f"depth-{depth}"]["difference"] for depth in depths]
        spread = [runs[f"depth-{depth}"]["sd"] or 0.0 for depth in depths]
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.errorbar(
            [0, *depths], [0, *differences], [0, *spread], marker="o", capsize=2, label="lowest k never train"
        )
        for kind, marker, label in (("without", "v", "block k never trains"), ("alone", "^", "only block k trains")):
            # The two runs that are a static prefix have its number.
            blocks = sorted(int(run.split("-")[1]) for run in runs if run.startswith(f"{kind}-"))
            if blocks:
                values = [runs[f"{kind}-{block}"]["difference"] for block in blocks]
                axis.plot([block + 1 for block in blocks], values, marker=marker, linestyle=":", label=label)
        costs = axis.twinx()
        costs.bar([0, *depths], [1.0, *(runs[f"depth-{d}"]["ratios"]["flops"] for d in depths)], color="#dddddd")
        costs.set_ylim(0, 3)
        costs.set_yticks([0, 1] if task == list(shown)[-1] else [])
        axis.set_zorder(costs.get_zorder() + 1)
        axis.patch.set_visible(False)
        axis.set_title(task)
        axis.set_xlabel("k, from the bottom")
    axes[0][0].set_ylabel("points against plain LoRA")
    costs.set_ylabel("FLOPs / plain (bars)")
    axes[0][0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["trec6", "sst2", "rotten_tomatoes", "mrpc", "banking77"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=names)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--parts", nargs="*", choices=["depth", "single"], default=["depth", "single"])
    parser.add_argument("--also", nargs="+", default=[], help="more methods: FILE.py:Class")
    parser.add_argument("--depths", nargs="+", type=int, help="default: every depth")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--large", action="store_true", help="about 4,000 rows to train on")
    parser.add_argument("--work", default="contribution-runs", help="folder of cells and states")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--no-train", action="store_true", help="only table, file and figure of finished cells")
    parser.add_argument("--figure", type=Path, help="also draw it to this file")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/contribution.json"))
    options = parser.parse_args()
    disable_progress_bars()
    disable_progress_bar()
    cells = Path(options.work) / f"{'large-' if options.large else ''}epochs-{options.epochs:g}"
    for name in [] if options.no_train else options.tasks:
        try:
            file = task_file(name, large(TASKS[name]) if options.large else TASKS[name], options)
            blocks = AutoConfig.from_pretrained(fetch(TASKS[name].model)).num_hidden_layers
            kept = ["--keep_cache", "true", "--prefix_cache_dir", str(Path(options.work) / "states")]
            runs = [*methods_of(options.parts, options.depths, blocks), *options.also]
            compare([str(file), "--methods", *runs, "--seeds", *options.seeds, *kept, "--output_dir", str(cells)])
        except AdafreezeError as error:
            print(f"Skipped {name}: {error}")
    found = collect(cells, options.tasks)
    if options.output.exists():
        found = merged(found, json.loads(options.output.read_text())["cells"])
    rows = summary(found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("epochs", "large")}
    options.output.write_text(json.dumps({"cells": found, "summary": rows, "settings": settings}, indent=1) + "\n")
    show(rows)
    if options.figure is not None:
        draw_figure(rows, options.figure)


if __name__ == "__main__":
    main()
