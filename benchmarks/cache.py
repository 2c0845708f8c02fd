"""Time and FLOPs of an epoch: plain, frozen without the cache, with the cache in memory, and on disk.

    python benchmarks/cache.py [--shapes minilm bert-base] [--rounds 5] [-o benchmarks/results/cache.json]

Four copies of one model train side by side on Rotten Tomatoes sentences, batch by batch, so that noise of the machine
affects all of them. In three of them the lower two thirds of the blocks are frozen from the start. The first epoch
fills the caches and is reported separately; the other epochs are compared. FLOPs are counted in separate copies of the
same runs, because counting takes time.

Then the same on sentences that never repeat, with cache="auto" and cache="off": the cost of the cache where it cannot
help, once with a known epoch length (it ends after one epoch) and once without.

"minilm" is all-MiniLM-L6-v2 (6 × 384). "bert-base" has 12 × 768 and random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from adafreeze import Safe, SafeConfig
from adafreeze.cli._demo_data import model_folder, sentences
from adafreeze.costs import Meter, expected_ratios
from adafreeze.env import environment

TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
ARMS = ("plain", "no cache", "memory", "disk")
BATCH = {"minilm": 32, "bert-base": 16}
SAMPLES = {"minilm": 512, "bert-base": 128}


def model(shape: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if shape == "minilm":
        network = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    else:
        network = BertForSequenceClassification(BertConfig())
    return get_peft_model(network, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=TARGETS)).train()


def batches(shape: str) -> list[dict[str, torch.Tensor]]:
    """One epoch: sentences sorted by length, padded to the longest of each batch."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    data, _ = sentences(SAMPLES[shape], 1000, seed=0)
    rows = sorted(((row["text"], row["label"]) for row in data), key=lambda row: len(tokenizer(row[0])["input_ids"]))
    epoch = []
    for start in range(0, len(rows), BATCH[shape]):
        texts, labels = zip(*rows[start : start + BATCH[shape]], strict=True)
        batch = dict(tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"))
        epoch.append(batch | {"labels": torch.tensor(labels)})
    return epoch


class Arm:
    """One of the compared runs."""

    def __init__(self, name: str, shape: str, epoch: list[Any], epochs: int, folder: str, config: Any = None) -> None:
        self.name, self.model = name, model(shape)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-4)
        self.safe: Safe | None = None
        self.seconds: list[list[float]] = []
        if name != "plain":
            blocks = self.model.config.num_hidden_layers
            frozen = [f"bert.encoder.layer.{index}" for index in range(blocks * 2 // 3)]
            how = {"no cache": {"cache": "off"}, "memory": {"cache": "ram"}, "disk": {"cache": "disk"}}.get(name, {})
            if name == "disk":
                how["cache_dir"] = folder
            self.safe = Safe(
                self.model,
                SafeConfig(freeze=frozen, warmup=0, ramp_end=0, **{**how, **(config or {})}),
                optimizer=self.optimizer,
                probe=epoch[:1],
                total_steps=len(epoch) * epochs,
                samples_per_epoch=None if name == "auto, epoch unknown" else sum(len(b["labels"]) for b in epoch),
            )
            self.safe.decider.plan = ()  # no measurements: only training is timed
        key = (lambda: self.safe.state_key) if self.safe else (lambda: 0)
        nested = (lambda: self.safe.nested_flops) if self.safe else (lambda: 0)
        self.meter = Meter(self.model, key, nested)

    def step(self, batch: dict[str, torch.Tensor], *, count: bool = False) -> float:
        start = time.perf_counter()
        if count:
            with self.meter.step(batch):
                self.model(**batch).loss.backward()
        else:
            self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.safe is not None:
            self.safe.step()
        return time.perf_counter() - start


def compare(arms: list[Arm], epochs: Iterator[list[Any]], shuffle: torch.Generator) -> None:
    """Train each batch with all arms; the first arm changes in turn."""
    for epoch in epochs:
        for arm in arms:
            arm.seconds.append([])
        for turn, index in enumerate(torch.randperm(len(epoch), generator=shuffle).tolist()):
            first = turn % len(arms)
            for arm in arms[first:] + arms[:first]:
                arm.seconds[-1].append(arm.step(epoch[index]))


def ratio(arm: Arm, base: Arm, epochs: slice) -> dict[str, float]:
    """Least, median, and most of the ratios of whole epochs' times."""
    ratios = [sum(a) / sum(b) for a, b in zip(arm.seconds[epochs], base.seconds[epochs], strict=True)]
    return {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}


def flops(shape: str, epoch: list[Any], folder: str) -> dict[str, list[int]]:
    """FLOPs of three epochs of each arm."""
    counted = {}
    for name in ARMS:
        arm, totals = Arm(name, shape, epoch, 4, folder), []
        for _ in range(3):
            before = arm.meter.summary()["flops"]
            for batch in epoch:
                arm.step(batch, count=True)
            totals.append(int(arm.meter.summary()["flops"] - before))
        if arm.safe is not None:
            arm.safe.close()
        counted[name] = totals
    return counted


def one_shape(shape: str, rounds: int, folder: str) -> dict[str, Any]:
    epoch, shuffle = batches(shape), torch.Generator().manual_seed(0)
    blocks = model(shape).config.num_hidden_layers
    depth = blocks * 2 // 3
    counted = flops(shape, epoch, folder)
    arms = [Arm(name, shape, epoch, rounds + 2, folder) for name in ARMS]
    compare(arms, iter([epoch] * (rounds + 1)), shuffle)
    result: dict[str, Any] = {"blocks": blocks, "frozen": depth, "samples": SAMPLES[shape], "arms": {}}
    plain = arms[0]
    for arm in arms:
        cached = arm.name in ("memory", "disk")
        theory = expected_ratios(blocks, [depth] * 4, steps_per_epoch=1 if cached else None)[1]
        if cached:  # an epoch in which every sample is found
            theory = (theory * 4 - expected_ratios(blocks, [depth])[1]) / 3
        events = arm.safe.journal.events if arm.safe else []
        if arm.safe is not None:
            logs = arm.safe.logs()
            arm.safe.close()
            result["arms"][arm.name] = {"logs": {k: v for k, v in logs.items() if "cache" in k}}
            assert not [e for e in events if e["event"] == "cache_off"], events
        else:
            result["arms"][arm.name] = {}
        result["arms"][arm.name] |= {
            "seconds_of_an_epoch": statistics.median(sum(times) for times in arm.seconds[1:]),
            "first_epoch": ratio(arm, plain, slice(0, 1))["median"],
            "later_epochs": ratio(arm, plain, slice(1, None)),
            "flops_first_epoch": counted[arm.name][0] / counted["plain"][0],
            "flops_later_epochs": counted[arm.name][2] / counted["plain"][2],
            "flops_by_arithmetic": theory if arm.name != "plain" else 1.0,
        }
    return result


def never_twice(shape: str, steps: int = 64) -> dict[str, Any]:
    """The cost of cache="auto" if no sample repeats."""
    epoch, generator = batches(shape), torch.Generator().manual_seed(1)

    def fresh() -> Iterator[list[Any]]:
        for _ in range(max(2, steps // len(epoch))):
            yield [
                b | {"input_ids": torch.randint(999, 29000, b["input_ids"].shape, generator=generator)} for b in epoch
            ]

    names = ("no cache", "auto", "auto, epoch unknown")
    arms = [Arm(name, shape, epoch, max(2, steps // len(epoch)), "") for name in names]
    compare(arms, fresh(), generator)
    result = {}
    for arm in arms[1:]:
        whole = sum(map(sum, arm.seconds)) / sum(map(sum, arms[0].seconds))
        pairs = [
            a / b
            for one, other in zip(arm.seconds, arms[0].seconds, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        reasons = [e["reason"] for e in arm.safe.journal.events if e["event"] == "cache_off"]
        result[arm.name] = {"whole": whole, "median_step": statistics.median(pairs), "off": reasons}
    for arm in arms:
        arm.safe.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", default="benchmarks/results/cache.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "environment": environment(), "shapes": {}}
    table = Table(title="An epoch against plain training, two thirds of the blocks frozen")
    for heading in ("", "", "s/epoch", "fill epoch", "later epochs (least to most)", "FLOPs", "by arithmetic"):
        table.add_column(heading, justify="left" if not heading else "right")
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            result = one_shape(shape, options.rounds, folder)
        result["never_twice"] = never_twice(shape)
        results["shapes"][shape] = result
        for name, row in result["arms"].items():
            later = row["later_epochs"]
            table.add_row(
                shape,
                name,
                f"{row['seconds_of_an_epoch']:.1f}",
                f"{row['first_epoch']:.2f}",
                f"{later['median']:.3f} ({later['least']:.3f} to {later['most']:.3f})",
                f"{row['flops_later_epochs']:.3f}",
                f"{row['flops_by_arithmetic']:.3f}",
            )
    Console(width=110).print(table)
    for shape, result in results["shapes"].items():
        for name, row in result["never_twice"].items():
            print(f"{shape}, nothing repeats, {name}: {row['whole']:.3f} of the time of cache='off'. {row['off']}")
    output = Path(options.output)
    os.makedirs(output.parent, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
