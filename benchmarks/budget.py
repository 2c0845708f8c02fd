"""What a memory budget costs: peak bytes, FLOPs, and time of whole runs, side by side.

    python benchmarks/budget.py [--blocks 12] [--rounds 3] [-o benchmarks/results/budget.json]

Plain LoRA, LoRA under full activation checkpointing, SAFE without a budget, and SAFE at three budgets: the peak of full
checkpointing, and one half and three quarters of what plain training uses above its weights; with and without the
prefix cache. Six epochs on Rotten Tomatoes sentences; in SAFE runs two thirds of the blocks freeze at a fifth of the
run.

Peak: the most bytes of storages alive in any step (weights, adapters, optimizer state, gradients, activations,
transients, measuring), counted over the whole run. FLOPs: everything, including measuring and filling the cache. The
cache is on disk, because in memory it would count as the device's memory on a CPU. Saved: the most that autograd keeps
of a forward pass. Time: of runs without counting, including the rehearsals of the budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from adafreeze import Safe, SafeConfig
from adafreeze.cli._demo_data import model_folder, sentences
from adafreeze.costs import CountFlops, SavedBytes, StorageTracker
from adafreeze.env import environment
from adafreeze.sizes import readable

EPOCHS, SAMPLES, BATCH, LENGTH = 6, 128, 16, 48
FROZEN_AT, FROZEN = 0.2, 2 / 3


def model(blocks: int, checkpointing: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=blocks)
    network = get_peft_model(
        BertForSequenceClassification(config),
        LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]),
    )
    if checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network.train()


def batches() -> list[dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    data, _ = sentences(SAMPLES, 1000, seed=0)
    rows = tokenizer(
        [row["text"] for row in data], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    rows = dict(rows) | {"labels": torch.tensor([row["label"] for row in data])}
    return [{name: value[i : i + BATCH] for name, value in rows.items()} for i in range(0, SAMPLES, BATCH)]


class Run:
    """One arm: its setup and the times of its runs."""

    def __init__(self, name: str, blocks: int, *, checkpointing: bool = False, safe: bool = False, **config: Any):
        self.name, self.blocks, self.checkpointing, self.safe, self.config = name, blocks, checkpointing, safe, config
        self.seconds: list[float] = []

    def once(self, count: str = "") -> dict[str, Any]:
        """A whole run. ``count``: "" for time only, "peak" for peak and FLOPs, "saved" for saved bytes."""
        network, epoch = model(self.blocks, self.checkpointing), batches()
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=5e-4)
        losses: list[float] = []
        saved = 0
        with tempfile.TemporaryDirectory() as folder:
            tracker, flops = StorageTracker(), CountFlops()
            tracker.hold(*network.parameters(), *network.buffers())
            held = tracker.now
            if count == "peak":
                tracker.__enter__(), flops.__enter__()
            start = time.perf_counter()
            safe = self._safe(network, optimizer, epoch, folder) if self.safe else None
            for _ in range(EPOCHS):
                for batch in epoch:
                    if count == "saved":
                        with SavedBytes(network) as counter:
                            loss = network(**batch).loss
                        saved = max(saved, counter.total)
                    else:
                        loss = network(**batch).loss
                    loss.backward()
                    losses.append(loss.item())
                    del loss
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if safe is not None:
                        safe.step()
            seconds = time.perf_counter() - start
            if count == "peak":
                flops.__exit__(None, None, None), tracker.__exit__(None, None, None)
            found: dict[str, Any] = {"losses": losses}
            if safe is not None:
                events = [e for e in safe.journal.events if e["event"] == "recompute"]
                found["recomputed"] = [len(e["blocks"]) for e in events]
                found["prefix"] = sum(safe.prefixes.values())
                safe.close()
        if not count:
            self.seconds.append(seconds)
        return found | {"held": held, "peak": tracker.peak, "flops": flops.total, "saved": saved}

    def _safe(self, network: Any, optimizer: Any, epoch: list[Any], folder: str) -> Safe:
        config = SafeConfig(
            policy="bottom_up",
            freeze_share=FROZEN,
            warmup=FROZEN_AT,
            ramp_end=FROZEN_AT,
            **self.config | ({"cache_dir": folder} if self.config.get("cache") == "disk" else {}),
        )
        return Safe(
            network, config, optimizer=optimizer, probe=epoch, total_steps=EPOCHS * len(epoch), batch_size=BATCH,
            samples_per_step=BATCH, samples_per_epoch=SAMPLES,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=None)
    arguments = parser.parse_args()
    plain = Run("plain", arguments.blocks)
    full = Run("full checkpointing", arguments.blocks, checkpointing=True)
    counted = {run.name: run.once("peak") for run in (plain, full)}
    held, most = counted["plain"]["held"], counted["plain"]["peak"]
    budgets = {
        "peak of full checkpointing": counted[full.name]["peak"],
        "0.5": int(held + 0.5 * (most - held)),
        "0.75": int(held + 0.75 * (most - held)),
    }
    arms = [plain, full]
    for cache, label in (("off", ""), ("disk", ", cache")):
        arms.append(Run(f"SAFE{label}", arguments.blocks, safe=True, cache=cache))
        for name, budget in budgets.items():
            arms.append(Run(f"SAFE, {name}{label}", arguments.blocks, safe=True, cache=cache, memory_budget=budget))
    for run in arms:
        if run.name not in counted:
            counted[run.name] = run.once("peak")
        counted[run.name]["saved"] = run.once("saved")["saved"]
    for _ in range(arguments.rounds):
        for run in arms:
            run.once()
    results = {}
    table = Table(title=f"{arguments.blocks} blocks, {EPOCHS} epochs; against full checkpointing in brackets")
    for column in ("", "budget", "peak of a step", "peak saved", "FLOPs", "time", "blocks recomputed", "losses"):
        table.add_column(column, justify="left" if not column else "right")
    reference = counted[full.name]
    for run in arms:
        found, seconds = counted[run.name], statistics.median(run.seconds)
        ratio = statistics.median(a / b for a, b in zip(run.seconds, full.seconds, strict=True))
        same = counted["SAFE"]["losses"] if run.safe else counted["plain"]["losses"]
        differs = max(abs(a - b) for a, b in zip(found["losses"], same, strict=True))
        results[run.name] = {
            "budget": run.config.get("memory_budget"),
            **{name: found[name] for name in ("held", "peak", "saved", "flops")},
            "flops_of_full_checkpointing": found["flops"] / reference["flops"],
            "seconds": seconds,
            "time_of_full_checkpointing": ratio,
            "recomputed": found.get("recomputed"),
            "prefix": found.get("prefix"),
            "largest_difference_of_losses": differs,
        }
        budget = run.config.get("memory_budget")
        table.add_row(
            run.name,
            readable(budget) if budget else "",
            f"{readable(found['peak'])} ({found['peak'] / reference['peak']:.2f})",
            f"{readable(found['saved'])} ({found['saved'] / reference['saved']:.2f})",
            f"{found['flops'] / 1e12:.2f} T ({found['flops'] / reference['flops']:.2f})",
            f"{seconds:.1f} s ({ratio:.2f})",
            " → ".join(map(str, dict.fromkeys(found.get("recomputed", ())))),
            "identical" if differs == 0 else f"± {differs:.0e}",
        )
    Console(width=170).print(table)
    if arguments.output is not None:
        document = {"threads": torch.get_num_threads(), "environment": environment(), "runs": results}
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
