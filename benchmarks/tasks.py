"""Six tasks with real pre-trained weights through ``adafreeze train``: plain LoRA and LoRA with SAFE.

    python benchmarks/tasks.py [--tasks trec6 sst2 mrpc rte banking77 e2e_nlg] [--data ../shared/data]
                               [--language_model smollm2] [-o benchmarks/results/tasks.json]

Question types, sentiment, paraphrases, entailment, and intents on all-MiniLM-L6-v2; E2E NLG on SmolLM2-135M-Instruct or
stories15M; weights from benchmarks/weights.py. Runs are short: stratified, seeded draws of the training and evaluation
rows (e2e_nlg: of the meaning representations, with all their references). SAFE uses its defaults. A task is skipped,
with the reason, if its data (``DATA/TASK/train.parquet`` and ``dev.parquet``) or weights are missing.

The metric before is that of the untrained head, or of the pre-trained language model. One seed: differences within a
few points are noise. FLOPs and bytes are counted, including measuring.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import train_test_split
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar
from weights import fetch

from adafreeze.env import environment
from adafreeze.errors import AdafreezeError, DataError
from adafreeze.journal import read_history
from adafreeze.train import train as fine_tune
from adafreeze.train.arguments import parse

ARMS = {"plain": "none", "SAFE": "safe"}


@dataclass(frozen=True)
class Setting:
    """A task and the length of its training.

    Args:
        flags: of ``adafreeze train``: the task and its columns.
        metric: shown in the table: an accuracy in percent or a score from 0 to 100.
        train: rows to train on.
        evaluate: rows to evaluate on, or distinct prompts.
        epochs: over the training rows.
        batch: rows per step.
        learning_rate: the peak.
    """

    flags: tuple[str, ...]
    metric: str = "accuracy"
    train: int = 480
    evaluate: int = 300
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 2e-3


TASKS = {
    "trec6": Setting(("--task", "text-classification"), train=1000),
    "sst2": Setting(("--task_name", "sst2"), train=640),
    "mrpc": Setting(("--task_name", "mrpc")),
    "rte": Setting(("--task_name", "rte")),
    "banking77": Setting(("--task", "text-classification"), train=1540, epochs=4),
    "e2e_nlg": Setting(
        (
            *("--task", "text-generation", "--prompt_column", "mr", "--completion_column", "ref"),
            *("--max_seq_length", "128", "--generation_max_new_tokens", "60"),
        ),
        metric="bleu",
        train=120,
        evaluate=16,
        batch=8,
        learning_rate=5e-4,
    ),
}


def draw(file: Path, count: int, by: str | None, seed: int) -> Dataset:
    """A seeded draw of ``count`` rows.

    Args:
        file: parquet.
        count: the most rows.
        by: ``"label"``: stratify by label; ``"mr"``: all rows of ``count`` distinct values; None: any rows.
        seed: of the draw.

    Raises:
        DataError: the file does not exist.
    """
    if not file.is_file():
        raise DataError(
            f"{file} does not exist; the repository does not contain the data.", fix="--data FOLDER, see --help"
        )
    rows = load_dataset("parquet", data_files=str(file), split="train")
    if by == "mr":
        chosen = set(Dataset.from_dict({by: sorted(set(rows[by]))}).shuffle(seed=seed)[by][:count])
        return rows.select([index for index, value in enumerate(rows[by]) if value in chosen])
    if count >= len(rows):
        return rows
    labels = rows[by][:] if by is not None else None
    return rows.select(train_test_split(range(len(rows)), train_size=count, stratify=labels, random_state=seed)[0])


def train(method: str, setting: Setting, model: Path, folder: Path, files: dict[str, str], seed: int) -> dict[str, Any]:
    """One run: metrics before and after, and the freezes in its journal."""
    flags = {
        **{f"{name}_file": path for name, path in files.items()},
        "model_name_or_path": str(model),
        "method": method,
        "output_dir": str(folder),
        "cache_dir": str(folder.parent / "datasets"),
        "adapter_r": "8",
        "adapter_alpha": "16",
        "num_train_epochs": str(setting.epochs),
        "learning_rate": str(setting.learning_rate),
        "per_device_train_batch_size": str(setting.batch),
        "per_device_eval_batch_size": str(setting.batch),
        "seed": str(seed),
        "eval_on_start": "true",
        "save_strategy": "no",
        "logging_steps": "10",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    targets = ["query", "key", "value", "intermediate.dense", "output.dense"]
    if setting.metric == "bleu":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    found = fine_tune(parse([*setting.flags, *words, "--target_modules", *targets]))
    history = read_history(folder)
    return {
        "before": {name: values[0][1] for name, values in history.logs.items() if name.startswith("eval_")},
        "after": {name: value for name, value in found.items() if name.startswith("eval_")},
        "freezes": history.depths,
        "steps": history.steps,
        "blocks": AutoConfig.from_pretrained(model).num_hidden_layers,
        "cache_hit_rate": found.get("cache_hit_rate"),
        "flops": found["train_flops"] + found.get("score_flops", 0),
        "peak_saved_bytes": found["train_peak_saved_bytes"],
        "mean_saved_bytes": found["train_mean_saved_bytes"],
    }


def measure(name: str, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Both runs of a task.

    Raises:
        AdafreezeError: its data or its weights are missing.
    """
    generates = setting.metric == "bleu"
    draws = {  # e2e_nlg draws single training rows: a meaning representation is not a label
        "train": ("train", setting.train, None if generates else "label"),
        "validation": ("dev", setting.evaluate, "mr" if generates else "label"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {split: str(folder / f"{split}.parquet") for split in draws}
        for split, (file, count, by) in draws.items():
            draw(Path(options.data) / name / f"{file}.parquet", count, by, options.seed).to_parquet(files[split])
        model = fetch(options.language_model if generates else "minilm")
        runs = {
            arm: train(method, setting, model, folder / method, files, options.seed) for arm, method in ARMS.items()
        }
        return {"model": model.name, "setting": asdict(setting), "runs": runs}


def print_table(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="LoRA by adafreeze train, plain and with SAFE's defaults")
    for heading in ("task", "metric before", "plain", "SAFE", "frozen blocks", "from step", "cache hits", "FLOPs"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    table.add_column("mean saved MiB", justify="right")
    for name, result in results.items():
        plain, safe = (result["runs"][arm] for arm in ARMS)
        metric = result["setting"]["metric"]
        scale = 100 if metric == "accuracy" else 1
        scores = [found[f"eval_{metric}"] * scale for found in (safe["before"], plain["after"], safe["after"])]
        table.add_row(
            f"{name} ({metric})",
            *(f"{score:.1f}" for score in scores),
            f"{max((depth for _, depth in safe['freezes']), default=0)} of {safe['blocks']}",
            ", ".join(str(step) for step, _ in safe["freezes"]) + f" of {safe['steps']}",
            f"{safe['cache_hit_rate']:.0%}" if safe["cache_hit_rate"] is not None else "-",
            f"{safe['flops'] / 1e12:.2f} T = {safe['flops'] / plain['flops']:.2f} of plain",
            f"{safe['mean_saved_bytes'] / 2**20:.0f} = {safe['mean_saved_bytes'] / plain['mean_saved_bytes']:.2f}",
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data", default="../shared/data", help="the folder of the tasks (default ../shared/data)")
    parser.add_argument("--language_model", choices=("smollm2", "stories15m"), default="smollm2")
    parser.add_argument("--train", type=int, help="rows to train on, instead of each task's own number")
    parser.add_argument("--epochs", type=int, help="epochs, instead of each task's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="benchmarks/results/tasks.json")
    options = parser.parse_args()
    disable_progress_bars()
    disable_progress_bar()
    results: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name in options.tasks:
        given = {key: value for key in ("train", "epochs") if (value := getattr(options, key)) is not None}
        try:
            results[name] = measure(name, Setting(**(vars(TASKS[name]) | given)), options)
        except AdafreezeError as error:
            skipped[name] = error.fact
            print(f"Skipped {name}: {error}")
            continue
        output = Path(options.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        kept = {"tasks": results, "skipped": skipped, "seed": options.seed, "environment": environment()}
        output.write_text(json.dumps(kept, indent=2) + "\n")
    print_table(results)


if __name__ == "__main__":
    main()
