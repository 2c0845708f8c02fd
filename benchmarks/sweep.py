"""A sweep on kept states: what the first run costs, which fills the store, and what each later one costs.

    python benchmarks/sweep.py [--tasks trec6 sst2 e2e_nlg] [--epochs 1 3 5] [--data ../shared/data]
                               [-o benchmarks/results/sweep.json]
    python benchmarks/sweep.py --time [--tasks ...] [--rounds 3]
    python benchmarks/sweep.py --dtypes [--tasks ...] [--rounds 3]

For each task and number of epochs one store, and 2 seeds × 2 learning rates × 2 ranks with
``SafeConfig(freeze_at_start=0.5, keep_cache=True)``. MiniLM on TREC-6 and SST-2, SmolLM2-135M-Instruct on E2E NLG
(weights from benchmarks/weights.py). Each run evaluates on held-out rows four times, at equal distances.

FLOPs of training (with measuring and all that the cache computes) and of evaluation are counted operation by operation,
and divided by those of plain LoRA on the same batches. Calls of the blocks of the lower half are counted in their own
forward, in training and in evaluation. A run that is in the output file already is not repeated.

``--time``: counting takes time, so plain, the first run, one that fills its store ahead (``fill="before"``), and a
later one are timed without it, in turn, several rounds; medians of the ratios of CPU seconds within a round.

``--dtypes``: what each ``cache_dtype`` changes. Runs on stores filled ahead, so that every training step and every
evaluation reads rounded states: held-out loss and score less those of the run on exact states with the same seed, and
the bytes of the store.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar
from weights import fetch

from adafreeze import SafeCallback, SafeConfig
from adafreeze.costs import CountFlops
from adafreeze.env import environment
from adafreeze.model import find_stacks
from tasks import draw

EVALUATIONS = 4
TARGETS = {
    "minilm": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "smollm2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Setting:
    """A task: its model, columns, and the rows to train and evaluate on."""

    model: str
    text: str
    label: str
    train: int
    evaluate: int
    batch: int
    rates: tuple[float, float]


TASKS = {
    "trec6": Setting("minilm", "text", "label", 480, 128, 32, (2e-3, 1e-3)),
    "sst2": Setting("minilm", "sentence", "label", 480, 128, 32, (2e-3, 1e-3)),
    "e2e_nlg": Setting("smollm2", "mr", "ref", 64, 16, 8, (5e-4, 2e-4)),
}
RANKS = (8, 16)
DTYPES = (None, "bfloat16", "float8_e4m3fn", "int8")
# (seed, learning rate, rank): all combinations; the second differs from the first in everything.
GRID = [(0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 0)]


def rows(task: str, split: str, count: int, tokenizer: Any, data: Path) -> list[dict[str, Any]]:
    """Tokenized rows; of a language model the labels of the prompt are ignored."""
    setting = TASKS[task]
    drawn = draw(data / task / f"{split}.parquet", count, "label" if setting.model == "minilm" else None, 0)
    if setting.model == "minilm":
        return [
            {**tokenizer(row[setting.text], truncation=True, max_length=128), "labels": row[setting.label]}
            for row in drawn
        ]
    found = []
    for row in drawn.select(range(min(count, len(drawn)))):
        prompt = tokenizer(f"{row[setting.text]}\n")["input_ids"]
        answer = [*tokenizer(row[setting.label])["input_ids"], tokenizer.eos_token_id]
        ids = (prompt + answer)[:128]
        labels = ([-100] * len(prompt) + answer)[:128]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


class Counting(Trainer):
    """Counts the FLOPs of training steps and of evaluation, and calls of the blocks of the lower half."""

    counts = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.flops = {"training": 0, "evaluation": 0}
        self.calls = {"training": 0, "evaluation": 0}
        self.phase: str | None = None

    @contextmanager
    def counted(self, phase: str) -> Iterator[None]:
        self.phase = phase
        with CountFlops() as count:
            yield
        self.phase = None
        self.flops[phase] += count.total

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        if not self.counts:
            return super().training_step(*args, **options)
        with self.counted("training"):
            return super().training_step(*args, **options)

    def prediction_step(self, *args: Any, **options: Any) -> Any:
        if not self.counts:
            return super().prediction_step(*args, **options)
        with self.counted("evaluation"):
            return super().prediction_step(*args, **options)

    @contextmanager
    def watching(self, blocks: list[torch.nn.Module]) -> Iterator[None]:
        """Count the calls of these blocks below everything that adafreeze puts around them."""
        kind, inside = type(blocks[0]), set(map(id, blocks))
        original = kind.forward

        @functools.wraps(original)  # else it would be code of the user's, whose states are not kept
        def forward(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.phase is not None and id(block) in inside:
                self.calls[self.phase] += 1
            return original(block, *args, **kwargs)

        kind.forward = forward
        try:
            yield
        finally:
            kind.forward = original


def accuracy(found: Any) -> dict[str, float]:
    """Of classes, in percent."""
    return {"accuracy": 100 * float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def run(
    task: str,
    data: Path,
    epochs: int,
    *,
    seed: int,
    rate: float,
    rank: int,
    store: Path | None,
    counts: bool = True,
    **safe: Any,
) -> dict[str, Any]:
    """One run; ``store`` is None for plain LoRA, ``safe`` are more settings."""
    setting = TASKS[task]
    folder = fetch(setting.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train_rows, eval_rows = (
        rows(task, split, count, tokenizer, data)
        for split, count in (("train", setting.train), ("dev", setting.evaluate))
    )
    set_seed(seed)
    if setting.model == "minilm":
        labels = 1 + max(row["labels"] for row in train_rows)
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
    kind = "SEQ_CLS" if setting.model == "minilm" else "CAUSAL_LM"
    lora = LoraConfig(task_type=kind, r=rank, lora_alpha=2 * rank, target_modules=TARGETS[setting.model])
    model = get_peft_model(base, lora)
    steps = epochs * -(-setting.train // setting.batch)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            num_train_epochs=epochs,
            learning_rate=rate,
            per_device_train_batch_size=setting.batch,
            per_device_eval_batch_size=setting.batch,
            seed=seed,
            eval_strategy="steps",
            eval_steps=max(1, steps // EVALUATIONS),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            label_names=["labels"],
        )
        callback = None
        if store is not None:
            callback = SafeCallback(SafeConfig(freeze_at_start=0.5, keep_cache=True, cache_dir=store, **safe))
        padding = DataCollatorWithPadding if setting.model == "minilm" else DataCollatorForSeq2Seq
        trainer = Counting(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=padding(tokenizer),
            compute_metrics=accuracy if setting.model == "minilm" else None,
            callbacks=[callback] if callback is not None else [],
        )
        trainer.counts = counts
        stack = find_stacks(model)[0]
        began = time.process_time()
        with trainer.watching(list(stack.blocks[: len(stack) // 2])):
            trainer.train()
        seconds = time.process_time() - began
        last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        safe = callback.safe if callback is not None else None
        return {
            "flops": trainer.flops["training"] + (safe.flops_spent if safe is not None else 0),
            "evaluation_flops": trainer.flops["evaluation"],
            "calls": trainer.calls["training"],
            "evaluation_calls": trainer.calls["evaluation"],
            "seconds": seconds,
            "metrics": {name: value for name, value in last.items() if name in ("eval_loss", "eval_accuracy")},
        }


def swept(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All runs; yields the results after each."""
    for task, epochs in itertools.product(options.tasks, options.epochs):
        store = options.store / f"{task}-{epochs}"
        for number in options.runs:
            seed, high, large = GRID[number]
            rate, rank = TASKS[task].rates[high], RANKS[large]
            plain = f"{task} {epochs} plain {seed} {rank}"
            name = f"{task} {epochs} run {number}"
            if plain not in found:
                found[plain] = run(
                    task, options.data, epochs, seed=seed, rate=TASKS[task].rates[0], rank=rank, store=None
                )
                yield found
            if name not in found:
                if number == 0:
                    shutil.rmtree(store, ignore_errors=True)
                one = run(task, options.data, epochs, seed=seed, rate=rate, rank=rank, store=store)
                ratios = {
                    f"{kind}ratio": one[f"{kind}flops"] / found[plain][f"{kind}flops"] for kind in ("", "evaluation_")
                }
                setting = {"seed": seed, "learning_rate": rate, "rank": rank}
                found[name] = {**setting, **one, **ratios, "store_bytes": size_of(store)}
                yield found


def timed(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Plain, first and later runs in turn, without counting."""
    for task, epochs in itertools.product(options.tasks, options.epochs):
        rounds = found.setdefault("time", {}).setdefault(f"{task} {epochs}", [])
        while len(rounds) < options.rounds:
            with tempfile.TemporaryDirectory() as store, tempfile.TemporaryDirectory() as other:
                arms: dict[str, tuple[Path | None, dict[str, Any]]] = {
                    "plain": (None, {}),
                    "first": (Path(store), {}),
                    "filled": (Path(other), {"fill": "before"}),
                    "later": (Path(store), {}),
                }
                rounds.append(
                    {
                        arm: run(
                            task,
                            options.data,
                            epochs,
                            seed=len(rounds),
                            rate=TASKS[task].rates[0],
                            rank=RANKS[0],
                            store=folder,
                            counts=False,
                            **safe,
                        )["seconds"]
                        for arm, (folder, safe) in arms.items()
                    }
                )
            yield found


def rounded(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same runs on states of each data type."""
    for task, epochs in itertools.product(options.tasks, options.epochs):
        kinds = found.setdefault("dtypes", {}).setdefault(f"{task} {epochs}", {})
        for seed, dtype in itertools.product(range(options.rounds), DTYPES):
            runs = kinds.setdefault(str(dtype), {})
            if str(seed) in runs:
                continue
            with tempfile.TemporaryDirectory() as folder:
                one = run(
                    task,
                    options.data,
                    epochs,
                    seed=seed,
                    rate=TASKS[task].rates[0],
                    rank=RANKS[0],
                    store=Path(folder),
                    counts=False,
                    fill="before",
                    cache_dtype=dtype,
                )
                runs[str(seed)] = {**one["metrics"], "store_bytes": size_of(Path(folder))}
            yield found


def size_of(store: Path) -> int:
    """Bytes on the disk."""
    return sum(file.stat().st_blocks * 512 for file in store.rglob("*") if file.is_file())


def show(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The tables."""
    table = Table(
        "task", "epochs", "run", "FLOPs / plain", "evaluation / plain", "calls below", "in evaluation", "result"
    )
    for task, epochs in itertools.product(options.tasks, options.epochs):
        done = [found[name] for number in options.runs if (name := f"{task} {epochs} run {number}") in found]
        for label, group in (("first", done[:1]), (f"later ({len(done) - 1})", done[1:])):
            if group:
                worst = {key: max(one[key] for one in group) for key in ("ratio", "evaluation_ratio")}
                calls = [str(sum(one[key] for one in group)) for key in ("calls", "evaluation_calls")]
                key = "eval_accuracy" if "eval_accuracy" in group[0]["metrics"] else "eval_loss"
                results = [one["metrics"][key] for one in group]
                spread = f"{key.removeprefix('eval_')} {min(results):.3g} to {max(results):.3g}"
                numbers = (f"{worst['ratio']:.3f}", f"{worst['evaluation_ratio']:.3f}")
                table.add_row(task, str(epochs), label, *numbers, *calls, spread)
    Console(width=120).print(table)
    for name, rounds in found.get("time", {}).items():
        ratios = {
            arm: statistics.median(one[arm] / one["plain"] for one in rounds) for arm in ("first", "filled", "later")
        }
        print(
            f"{name}: CPU time against plain, median of {len(rounds)}: "
            + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items())
        )
    for name, kinds in found.get("dtypes", {}).items():
        exact = kinds[str(None)]
        for dtype, runs in kinds.items():
            differences = {
                key: [one[key] - exact[seed][key] for seed, one in runs.items()]
                for key in next(iter(runs.values()))
                if key.startswith("eval_")
            }
            size = statistics.mean(one["store_bytes"] / exact[seed]["store_bytes"] for seed, one in runs.items())
            print(f"{name}, cache_dtype {dtype}: bytes {size:.2f}", end="")
            print("".join(f", {key} {min(all_):+.4f} to {max(all_):+.4f}" for key, all_ in differences.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 3, 5])
    parser.add_argument("--runs", nargs="+", type=int, default=list(range(8)), help="which of the eight combinations")
    parser.add_argument("--rounds", type=int, default=3)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--time", action="store_true")
    parts.add_argument("--dtypes", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "adafreeze-sweep")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/sweep.json"))
    options = parser.parse_args()
    disable_progress_bar()
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    part = timed if options.time else rounded if options.dtypes else swept
    for state in part(options, found):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**state, "environment": environment()}, indent=1) + "\n")
    show(options, found)


if __name__ == "__main__":
    main()
