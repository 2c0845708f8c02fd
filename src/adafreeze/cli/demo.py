"""``adafreeze demo``: the same LoRA trained plain, with SAFE, and plain on the top blocks; then one table."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..env import environment
from ..errors import RunError
from ..train.output import JOURNAL_FILE, write_page
from ._demo_data import Sentences, model_folder, sentences

__all__ = ["main"]

TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]  # all of a block, and not the pooler
HELD_OUT = 1000
TIMES = ("train_runtime", "train_cpu_seconds")


@dataclass
class Arm:
    """What one training run gave."""

    name: str
    accuracy: float
    peak_saved_bytes: float
    mean_saved_bytes: float
    flops: float
    seconds: float
    cpu_seconds: float  # of this process, all its threads together
    freezes: list[tuple[int, int]] = field(default_factory=list)  # (step, blocks in the prefix from then on)
    steps: int = 0
    epochs: int = 1
    blocks: int = 0
    cache: dict[str, Any] = field(default_factory=dict)  # what the prefix cache found, computed and held

    @property
    def theory(self) -> tuple[float, float]:
        """Saved bytes and FLOPs against plain, by arithmetic, for the freeze steps that happened."""
        from ..costs import expected_ratios

        depths = [max((depth for at, depth in self.freezes if at <= step), default=0) for step in range(self.steps)]
        return expected_ratios(self.blocks, depths, self.steps / self.epochs if self.cache else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.smoke:
        options.train_samples, options.epochs = 64, 2
    output = Path(options.output_dir)
    if (output / "results.json").exists() and not options.overwrite_output_dir:
        raise RunError(
            f"{output} already holds a demo run.",
            cause="It has a results.json, which this run would write over.",
            fix="--overwrite_output_dir, or another --output_dir",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for journal in output.glob(f"*/{JOURNAL_FILE}"):
            journal.unlink()
    except OSError as error:
        raise RunError(
            f"The output folder {output} cannot be written ({error.strerror}).",
            cause="It is read-only, or below something that is no folder.",
            fix="--output_dir with a folder that you can write to",
        ) from error
    folder = model_folder()
    train, test = sentences(options.train_samples, 64 if options.smoke else HELD_OUT, options.seed)
    print(
        f"all-MiniLM-L6-v2 on {len(train):,} Rotten Tomatoes sentences, {options.epochs} epochs, "
        f"tested on {len(test):,} others; three runs."
    )
    runs = _Runs(folder, train, test, options, output)
    plain = runs.train("plain")
    safe = runs.train("safe")
    live = safe.blocks - (safe.freezes[-1][1] if safe.freezes else 0)
    top = runs.train(f"top {live}", blocks=live)
    _print_table(plain, safe, top, len(test))
    results = {
        "settings": vars(options),
        "environment": environment(),
        "arms": [asdict(arm) for arm in (plain, safe, top)],
    }
    results["theory"] = dict(zip(("saved_bytes_ratio", "flops_ratio"), safe.theory, strict=True))
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"Journal: {output / 'safe' / JOURNAL_FILE}\nNumbers: {output / 'results.json'}")
    write_page(output, [output / _folder_of(arm.name) for arm in (plain, safe, top)])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adafreeze demo", description=__doc__)
    parser.add_argument("--train_samples", type=int, default=2500, help="training sentences (default 2500)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run (default 6)")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="peak learning rate (default 5e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of data order, dropout and initialisation (default 0)")
    parser.add_argument("--output_dir", default="adafreeze-demo", help="default adafreeze-demo")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="write over an earlier demo run")
    parser.add_argument("--smoke", action="store_true", help="a tiny version that only shows that it runs")
    return parser


def _folder_of(name: str) -> str:
    return name.replace(" ", "-")


class _Runs:
    """The three runs: everything the same but the method."""

    def __init__(self, folder: Path, train: Sentences, test: Sentences, options: Any, output: Path) -> None:
        from transformers import AutoTokenizer, logging

        # The new classifier head and upstream's deprecations are no news to whoever runs a demo.
        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        self.folder, self.options, self.output = folder, options, output
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.train_set, self.test_set = self._encode(train), self._encode(test)

    def _encode(self, data: Sentences) -> Any:
        from datasets import Dataset

        encoded = dict(self.tokenizer(data.texts, truncation=True, max_length=128))
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return Dataset.from_dict({**encoded, "length": lengths, "labels": data.labels})

    def train(self, name: str, blocks: int | None = None) -> Arm:
        """One run. ``blocks``: adapters on so many top blocks only."""
        from peft import LoraConfig, get_peft_model
        from transformers import (
            AutoModelForSequenceClassification,
            DataCollatorWithPadding,
            TrainingArguments,
            set_seed,
        )

        from ..integrations.transformers import SafeCallback
        from ..journal import Journal
        from ..train.trainer import JournalCallback, MeteredTrainer, meter_of

        options = self.options
        print(f"\n{name}")
        set_seed(options.seed)
        model = AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=2)
        depth = model.config.num_hidden_layers
        top = None if blocks is None else list(range(depth - blocks, depth))
        lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=TARGETS, layers_to_transform=top)
        model = get_peft_model(model, lora)
        set_seed(options.seed)
        folder = self.output / _folder_of(name)
        journal = Journal(folder / JOURNAL_FILE)
        journal.write("run", command="demo", method=name, settings={})
        callback = SafeCallback(journal=journal) if name == "safe" else None
        meter = meter_of(model, callback)
        logged = JournalCallback(journal, rewinds=callback is None, meter=meter)
        trainer = MeteredTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                num_train_epochs=options.epochs,
                learning_rate=options.learning_rate,
                seed=options.seed,
                train_sampling_strategy="group_by_length",
                length_column_name="length",
                logging_steps=20,
                save_strategy="no",
                report_to=[],
                dataloader_pin_memory=False,
            ),
            train_dataset=self.train_set,
            eval_dataset=self.test_set,
            # Few different shapes, so that few steps need counting.
            data_collator=DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=8),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            callbacks=[callback, logged] if callback else [logged],
            meter=meter,
        )
        times = {name: seconds for name, seconds in trainer.train().metrics.items() if name in TIMES}
        trainer.save_model()
        costs = meter.summary()
        safe = callback.safe if callback else None
        events = journal.events
        scores = trainer.evaluate()
        counted = {**times, **{f"train_{key}": value for key, value in costs.items()}}
        journal.write("done", step=trainer.state.global_step, score_flops=safe.flops_spent if safe else 0, **counted,
                      **scores)  # fmt: skip
        journal.close()
        return Arm(
            name=name,
            accuracy=scores["eval_accuracy"],
            peak_saved_bytes=costs["peak_saved_bytes"],
            mean_saved_bytes=costs["mean_saved_bytes"],
            flops=costs["flops"] + (safe.flops_spent if safe else 0),
            seconds=times["train_runtime"],
            cpu_seconds=times["train_cpu_seconds"],
            freezes=[(e["step"], sum(e["prefixes"].values())) for e in events if e["event"] == "freeze"],
            steps=trainer.state.global_step,
            epochs=options.epochs,
            blocks=depth,
            cache=next((event for event in events if event["event"] == "cache"), {}),
        )


def _print_table(plain: Arm, safe: Arm, top: Arm, tested: int) -> None:
    from rich.console import Console
    from rich.table import Table

    mib = 2**20
    saved_theory, flops_theory = safe.theory
    error = math.sqrt(plain.accuracy * (1 - plain.accuracy) / tested)
    rows = [
        ("held-out accuracy, %", "accuracy", 100.0, ".1f", None),
        ("peak saved bytes, MiB", "peak_saved_bytes", 1 / mib, ".1f", None),
        ("mean saved bytes, MiB", "mean_saved_bytes", 1 / mib, ".1f", saved_theory),
        ("FLOPs, TFLOP", "flops", 1e-12, ".2f", flops_theory),
        ("time, s", "seconds", 1.0, ".0f", None),
        ("CPU time, s", "cpu_seconds", 1.0, ".0f", None),
    ]
    table = Table(title="One LoRA, trained three times")
    for heading in ("", "plain", "SAFE", f"plain, {top.name}", "SAFE / plain", "by arithmetic", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, attribute, scale, form, theory in rows:
        values = [getattr(arm, attribute) for arm in (plain, safe, top)]
        worse = values[1] < values[0] if attribute == "accuracy" else values[1] > values[0]
        table.add_row(
            label,
            *(format(value * scale, form) for value in values),
            f"{values[1] / values[0]:.3f}" if values[0] else "-",
            f"{theory:.3f}" if theory is not None else "",
            "worse" if worse else "",
        )
    console = Console(width=110)
    console.print()
    console.print(table)
    print("Time is by the clock; CPU time is what this process took of the CPUs, whatever else they had to do.")
    frozen = ", ".join(f"{depth} of {safe.blocks} blocks from step {step}" for step, depth in safe.freezes)
    print(f"Frozen prefix: {frozen or 'nothing froze'} (of {safe.steps} steps).")
    if safe.cache:
        found = safe.cache["hits"] + safe.cache["advanced"]
        print(
            f"Prefix cache: of {found + safe.cache['misses']:,} samples after the first freeze {found:,} were found; "
            f"{sum(safe.cache['nbytes'].values()) / mib:.0f} MiB held."
        )
    print(
        f"Accuracy: SAFE {100 * (safe.accuracy - plain.accuracy):+.1f} points against plain; one standard error of "
        f"plain's accuracy is {100 * error:.1f} points. One seed proves nothing: run `adafreeze demo --seed 1`."
    )
