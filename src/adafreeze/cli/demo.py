"""``adafreeze demo``: the same LoRA trained plain, with SAFE, and plain on the top blocks; then one table."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import logging

from ..env import environment
from ..errors import RunError
from ..journal import read_history
from ..methods import Combined, Method, Outcome, Setup, find_method, outcome_of
from ..train import Arguments, train
from ..train.output import JOURNAL_FILE, write_page, writing
from ..train.parser import Parser
from ._demo_data import model_folder, sentences
from ._table import number_table

__all__ = ["main"]

TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]  # all of a block, without the pooler
HELD_OUT = 1000
SHORT = (750, 5)  # training sentences, epochs: three minutes on two cores
FULL = (2500, 6)  # 6 to 10 minutes
MIB = 2**20
MEANINGS = (
    "held-out accuracy: on sentences that no run trained on.",
    "peak saved bytes: the most that autograd keeps in a step, which is what does not fit; mean: over all steps.",
    "FLOPs: counted, with measuring, filling the cache and all checks. By arithmetic: what frozen blocks alone give.",
    "time: wall clock. CPU time: of this process only, so other load does not change it.",
)


class _PadToEights(Method):
    """Few different shapes, so that few steps must be counted."""

    name = "pad-to-eights"

    def configure(self, setup: Setup) -> None:
        setup.collator.pad_to_multiple_of = 8  # type: ignore[attr-defined]


def main(argv: Sequence[str]) -> None:
    """Train three times and print the table."""
    parser = Parser(prog="adafreeze demo", description="Train one LoRA plain, with SAFE, and plain on the top blocks.")
    parser.add_argument("--full", action="store_true", help=f"{FULL[0]:,} sentences, {FULL[1]} epochs: 6 to 10 minutes")
    parser.add_argument("--train_samples", type=int, help=f"training sentences (default: {SHORT[0]:,})")
    parser.add_argument("--epochs", type=int, help=f"epochs of each run (default: {SHORT[1]})")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of data order, dropout and initialization")
    parser.add_argument("--output_dir", default="adafreeze-demo", help="folder of the results")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier demo run")
    parser.add_argument("--smoke", action="store_true", help="a tiny version that only shows that it runs")
    options = parser.parse_args(argv)
    samples, epochs = (64, 2) if options.smoke else FULL if options.full else SHORT
    options.train_samples = samples if options.train_samples is None else options.train_samples
    options.epochs = epochs if options.epochs is None else options.epochs
    output = Path(options.output_dir)
    results = output / "results.json"
    if results.exists() and not options.overwrite_output_dir:
        raise RunError(f"{output} already contains a demo run.", fix="--overwrite_output_dir, or another --output_dir")
    train_rows, test_rows = sentences(options.train_samples, 64 if options.smoke else HELD_OUT, options.seed)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", train_rows), ("test", test_rows)):
            (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(
        f"all-MiniLM-L6-v2 on {len(train_rows):,} Rotten Tomatoes sentences, {options.epochs} epochs, "
        f"tested on {len(test_rows):,} others; three runs."
    )
    logging.set_verbosity_error()  # the new head is expected
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    arguments = Arguments.of(
        task="text-classification",
        model_name_or_path=model_folder(),
        train_file=output / "train.jsonl",
        validation_file=output / "test.jsonl",
        target_modules=TARGETS,
        adapter_r=8,
        adapter_alpha=16,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        seed=options.seed,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        method="none",
        overwrite_output_dir=True,
        output_dir=output,
    )
    found: dict[str, Outcome] = {}
    for name in ("plain", "safe", "top-blocks"):
        print(f"\n{name}")
        found[name] = _train(arguments.changed(output_dir=output / name), name, found)
    plain, safe, top = found.values()
    cache = read_history(output / "safe").cache or {}
    _print_table(plain, safe, top)
    _print_conclusions(plain.metrics["accuracy"], safe, cache, len(test_rows))
    record = {
        "settings": vars(options),
        "environment": environment(),
        "arms": [_arm(outcome) for outcome in found.values()],
        "theory": dict(zip(("saved_bytes_ratio", "flops_ratio"), safe.theory() or (), strict=False)),
        "cache": cache,
    }
    results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"Journal: {output / 'safe' / JOURNAL_FILE}\nNumbers: {results}")
    write_page(output, [output / name for name in found])


def _train(arguments: Arguments, name: str, found: Mapping[str, Outcome]) -> Outcome:
    method = Combined([find_method(name), _PadToEights()])
    method.name = name  # type: ignore[misc]
    metrics = train(arguments, method=method, found=found)
    which: dict[str, Any] = {"task": "demo", "method": name, "seed": arguments.training.seed, "settings": {}}
    return outcome_of(arguments.folder / JOURNAL_FILE, metrics, **which)


def _arm(outcome: Outcome) -> dict[str, Any]:
    kept = ("peak_saved_bytes", "mean_saved_bytes", "flops", "seconds", "cpu_seconds", "steps", "epochs", "blocks")
    numbers = {name: getattr(outcome, name) for name in kept}
    freezes = [(step, depth) for step, _, depth in outcome.freezes]
    return {"name": outcome.method, "accuracy": outcome.metrics["accuracy"], **numbers, "freezes": freezes}


def _print_table(plain: Outcome, safe: Outcome, top: Outcome) -> None:
    arms = (plain, safe, top)
    saved_theory, flops_theory = safe.theory() or (None, None)
    rows = [
        ("held-out accuracy, %", [100 * arm.metrics["accuracy"] for arm in arms], ".1f", None),
        ("peak saved bytes, MiB", [arm.peak_saved_bytes / MIB for arm in arms], ".1f", None),
        ("mean saved bytes, MiB", [arm.mean_saved_bytes / MIB for arm in arms], ".1f", saved_theory),
        ("FLOPs, TFLOP", [arm.flops / 1e12 for arm in arms], ".2f", flops_theory),
        ("time, s", [arm.seconds for arm in arms], ".0f", None),
        ("CPU time, s", [arm.cpu_seconds for arm in arms], ".0f", None),
    ]
    live = f"plain, top {len(safe.units) - safe.frozen}"
    headings = ("plain", "SAFE", live, "SAFE / plain", "by arithmetic", "")
    table = number_table("One LoRA, trained three times", "", *headings)
    for label, values, form, theory in rows:
        worse = values[1] < values[0] if "accuracy" in label else values[1] > values[0]
        table.add_row(
            label,
            *(format(value, form) for value in values),
            f"{values[1] / values[0]:.3f}" if values[0] else "-",
            f"{theory:.3f}" if theory is not None else "",
            "worse" if worse else "",
        )
    console = Console(width=110)
    console.print()
    console.print(table)
    for line in MEANINGS:
        print(line)


def _print_conclusions(plain: float, safe: Outcome, cache: Mapping[str, Any], tested: int) -> None:
    frozen = ", ".join(f"{depth} of {safe.blocks} blocks from step {step}" for step, _, depth in safe.freezes)
    print(f"Frozen prefix: {frozen or 'nothing froze'} (of {safe.steps} steps).")
    if cache:
        hits = cache["hits"] + cache["advanced"]
        size = sum(cache["nbytes"].values()) / MIB
        print(
            f"Prefix cache: {hits:,} of {hits + cache['misses']:,} samples found after the first freeze; {size:.0f} MiB"
        )
    error = 100 * math.sqrt(plain * (1 - plain) / tested)
    print(
        f"Accuracy: SAFE {100 * (safe.metrics['accuracy'] - plain):+.1f} points against plain; one standard error of "
        f"plain's accuracy is {error:.1f} points. One seed proves nothing: run `adafreeze demo --seed 1`."
    )
