"""Which score tells how deep a task bears to be frozen: judged by benchmarks/contribution.py.

    python benchmarks/scores.py [--tasks trec6 sst2 rotten_tomatoes mrpc banking77] [--seeds 0 1 2]
                                [--work FOLDER] [--data ../shared/data] [--truth benchmarks/results/contribution.json]
                                [-o benchmarks/results/scores.json]

Along the plain run all scores are read at 5, 10, 20, 30 and 50 % of the steps: those of ``SafeConfig(score=...)`` on
2,048 tokens of training samples, and three more:

- ``ablation``: the rise of the loss when the adapters of the lowest k blocks are off, on training samples
  (``ablation_train``) and on samples held out (``ablation_held_out``), in nats;
- ``first_order``: its estimate without passes, −Σ ∂loss/∂B · B over the steps since the last reading (Molchanov et al.
  2019);
- ``potential``: Σ |∂loss/∂θ|, by which one Adam step of unit length lowers the loss, to first order.

And one that trains: ``look``, two or more depths side by side over the first part of the run, on the same batches: how
much higher the online training loss is at depth k than at the best smaller depth, over the later half of that part, as
a share of what training has won there (of the first logged loss). It costs that part of a run at each depth.

A score chooses the deepest prefix whose share of the total (of ablation also: whose nats) is at most a threshold. The
threshold is fitted on the other tasks: the one with the lowest mean FLOPs at a mean score of at least plain − 0.3. What
the choice costs and loses on the task left out is looked up in the ground truth, beside fixed depths and beside the
oracle: the deepest prefix whose mean score is within one standard error of plain's. The rank correlation is Spearman's,
of the score's shares at each depth with the points lost there, over all tasks and depths.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from contribution import METHODS as CONTRIBUTION
from datasets import disable_progress_bars
from paper import TASKS, task_file
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from transformers.utils.logging import disable_progress_bar

from adafreeze.cli.compare import main as compare
from adafreeze.errors import AdafreezeError

METHODS = Path(__file__).with_name("scores_methods.py")
PLAIN_LOSS = 0.3  # points on average that a fitted threshold may cost on the tasks it is fitted on
LOOK_AT = ("0.1", "0.2", "0.3", "0.5")
Curve = list[float]  # by depth, 0 to B: the part of the score in the lowest k blocks


def curves(reading: dict[str, Any], units: list[str]) -> dict[str, Curve]:
    """Each score's share in the lowest k blocks; of ablation also the rise of the loss in nats."""
    found = {}
    for name, value in reading.items():
        if name == "step":
            continue
        if name.startswith("ablation"):
            losses = [mean(chunks) for chunks in value]
            rises = [loss - losses[0] for loss in losses]
            found[f"{name}, nats"] = rises
            found[f"{name}, share"] = [rise / rises[-1] if rises[-1] > 0 else 0.0 for rise in rises]
            continue
        parts = [max(0.0, value.get(unit) or 0.0) for unit in units]
        total = sum(parts) or 1.0
        found[name] = [sum(parts[:depth]) / total for depth in range(len(parts) + 1)]
    return found


class Truth:
    """What each static depth costs and loses on a task, from the ground truth."""

    def __init__(self, runs: dict[str, Any]) -> None:
        self.runs = runs
        self.depths = [0, *sorted(int(run.split("-")[1]) for run in runs if run.startswith("depth-"))]

    @property
    def seeds(self) -> list[str]:
        """Those that have been run at every depth."""
        return sorted(set.intersection(*(set(self._run(depth)["online"]) for depth in self.depths)))

    def _run(self, depth: int) -> dict[str, Any]:
        return self.runs[f"depth-{depth}" if depth else "plain"]

    def lost(self, depth: int) -> float:
        """Points below plain, mean over seeds."""
        ours, plain = self._run(depth)["score"], self.runs["plain"]["score"]
        return mean(plain[seed] - ours[seed] for seed in ours)

    def cost(self, depth: int) -> float:
        """FLOPs against plain."""
        ours, plain = self._run(depth)["flops"], self.runs["plain"]["flops"]
        return mean(ours[seed] / plain[seed] for seed in ours)

    def look(self, share: float, seed: str) -> Curve:
        """The rise of the online loss with each depth, as a share of what training has won by then."""

        def level(depth: int) -> float:
            losses = self._run(depth)["online"][seed]
            end = max(1, round(share * len(losses)))
            return mean(losses[end // 2 : end])

        levels = {depth: level(depth) for depth in self.depths}
        won = self.runs["plain"]["online"][seed][0] - min(levels.values())
        rises = [(levels[depth] - min(levels[less] for less in self.depths if less <= depth)) for depth in self.depths]
        return [rise / won if won > 0 else 0.0 for rise in rises]

    def oracle(self) -> int:
        """The deepest prefix within one standard error of plain."""
        plain = list(self.runs["plain"]["score"].values())
        error = stdev(plain) / len(plain) ** 0.5 if len(plain) > 1 else PLAIN_LOSS
        return max(depth for depth in self.depths if self.lost(depth) <= error)

    def deepest(self, curve: Curve, threshold: float) -> int:
        """The deepest prefix that ends before the score exceeds the threshold."""
        chosen = 0
        for depth in self.depths:
            if curve[depth] > threshold:
                break
            chosen = depth
        return chosen


def fitted(truths: dict[str, Truth], scores: dict[str, list[Curve]]) -> float:
    """The threshold with the lowest mean cost at a mean loss of at most PLAIN_LOSS."""
    candidates = sorted({value for curves_ in scores.values() for curve in curves_ for value in curve})

    def outcome(threshold: float) -> tuple[float, float]:
        chosen = [(task, truths[task].deepest(curve, threshold)) for task in scores for curve in scores[task]]
        lost = mean(truths[task].lost(depth) for task, depth in chosen)
        return mean(truths[task].cost(depth) for task, depth in chosen), lost

    allowed = [(*outcome(threshold), threshold) for threshold in candidates]
    return min((one for one in allowed if one[1] <= PLAIN_LOSS), default=(0.0, 0.0, min(candidates)))[2]


def judged(truths: dict[str, Truth], scores: dict[str, list[Curve]]) -> dict[str, Any]:
    """Regret of a score, threshold by leave-one-task-out, and its rank correlation with the truth."""
    by_task = {}
    for task in scores:
        threshold = fitted(truths, {other: scores[other] for other in scores if other != task})
        depths = [truths[task].deepest(curve, threshold) for curve in scores[task]]
        by_task[task] = {
            "depths": depths,
            "lost": mean(truths[task].lost(depth) for depth in depths),
            "cost": mean(truths[task].cost(depth) for depth in depths),
        }
    pairs = [
        (curve[depth], truths[task].lost(depth))
        for task in scores
        for curve in scores[task]
        for depth in truths[task].depths[1:]
    ]
    rank = spearmanr(*zip(*pairs, strict=True)).statistic
    return _averaged(by_task) | {"rank_correlation": float(rank)}


def fixed(truths: dict[str, Truth], choose: Callable[[Truth], int]) -> dict[str, Any]:
    """A depth without a score."""
    by_task = {}
    for task, truth in truths.items():
        depth = choose(truth)
        by_task[task] = {"depths": [depth], "lost": truth.lost(depth), "cost": truth.cost(depth)}
    return _averaged(by_task)


def _averaged(by_task: dict[str, Any]) -> dict[str, Any]:
    rows = list(by_task.values())
    return {
        "lost": mean(row["lost"] for row in rows),
        "worst": max(row["lost"] for row in rows),
        "cost": mean(row["cost"] for row in rows),
        "tasks": by_task,
    }


def judge(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    """All scores at all readings, and fixed depths."""
    truths = {task: Truth(runs) for task, runs in truth["cells"].items() if "depth-1" in runs}
    blocks = max(truths[task].depths[-1] for task in truths) + 1
    result: dict[str, Any] = {"fixed": {"oracle": fixed(truths, Truth.oracle)}, "scores": {}}
    for depth in range(blocks):
        result["fixed"][f"{depth} of {blocks}"] = fixed(truths, lambda truth, depth=depth: min(depth, truth.depths[-1]))
    readings = {share for seeds in found.values() for run in seeds.values() for share in run["readings"]}
    readings = readings or set(LOOK_AT)
    for share in sorted(readings, key=float):
        by_score: dict[str, dict[str, list[Curve]]] = {}
        for task in truths:
            for run in found.get(task, {}).values():
                for name, curve in curves(run["readings"][share], run["units"]).items():
                    by_score.setdefault(name, {}).setdefault(task, []).append(curve)
        by_score["look"] = {
            task: [truth.look(float(share), seed) for seed in truth.seeds] for task, truth in truths.items()
        }
        for name, scores in by_score.items():
            result["scores"].setdefault(name, {})[share] = judged(truths, scores)
    return result


def show(result: dict[str, Any]) -> None:
    """The table."""
    table = Table("chosen by", "read at", "points lost", "worst task", "FLOPs / plain", "rank correlation", "depths")
    rows = [(name, "-", one) for name, one in result["fixed"].items()]
    rows += [(name, share, one) for name, shares in result["scores"].items() for share, one in shares.items()]
    for name, share, one in rows:
        depths = " ".join("/".join(map(str, task["depths"])) for task in one["tasks"].values())
        rank = f"{one['rank_correlation']:+.2f}" if "rank_correlation" in one else ""
        table.add_row(name, share, f"{one['lost']:+.2f}", f"{one['worst']:+.2f}", f"{one['cost']:.2f}", rank, depths)
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["trec6", "sst2", "rotten_tomatoes", "mrpc", "banking77"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=names)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--work", default="contribution-runs", help="that of benchmarks/contribution.py")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--truth", type=Path, default=Path("benchmarks/results/contribution.json"))
    parser.add_argument("--no-train", action="store_true", help="only judge what was read")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/scores.json"))
    options = parser.parse_args()
    options.large = False
    disable_progress_bars()
    disable_progress_bar()
    cells = Path(options.work) / f"epochs-{options.epochs:g}"
    for name in [] if options.no_train else options.tasks:
        try:
            file = task_file(name, TASKS[name], options)
            runs = ["--methods", f"{METHODS}:Scored", "--seeds", *options.seeds]
            compare([str(file), *runs, "--output_dir", str(cells)])
        except AdafreezeError as error:
            print(f"Skipped {name}: {error}")
    found: dict[str, Any] = {}
    for path in sorted(cells.glob("*/scored/seed-*/scores.json")):
        task, seed = path.parts[-4], path.parts[-2].removeprefix("seed-")
        if task in options.tasks:
            found.setdefault(task, {})[seed] = json.loads(path.read_text())
    result = {"readings": found}
    if options.truth.is_file():
        result |= judge(found, json.loads(options.truth.read_text()))
        show(result)
    else:
        print(f"{options.truth} does not exist: python {CONTRIBUTION.with_name('contribution.py')}")
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
