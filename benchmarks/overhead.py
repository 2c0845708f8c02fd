"""The cost of measuring scores and of the cache's checks, in FLOPs; and a check that nothing else changes.

    python benchmarks/overhead.py [--part measuring looking] [-o benchmarks/results/overhead.json]

measuring: for runs of several lengths on a random BERT of MiniLM's shape (6 × 384) with sentences of Rotten Tomatoes'
lengths, all measurements run and are counted. Of the plain run, one micro-step of each batch width is counted and
multiplied. Then a short run is trained without Safe and with it (measuring but not freezing: by dry_run, and by a
freeze_share of 0); losses and weights must be bit-identical.

looking: runs of 300 and 600 steps are trained with the prefix cache, once as it is and once without checks (no shadow
step, no row check, no spot checks). FLOPs and the peak bytes of a step are counted in both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from adafreeze import Safe, SafeConfig
from adafreeze.cache.independence import IndependenceCheck
from adafreeze.cache.layout import Layout
from adafreeze.cache.padding import PaddingCheck
from adafreeze.cache.shadow import ShadowCheck
from adafreeze.costs import CountFlops
from adafreeze.costs.flops import flops_of
from adafreeze.costs.memory import StorageTracker
from adafreeze.env import environment

BATCH = 32
VOCABULARY = 1000
LOOKS = [(400, 6), (800, 6)]  # (training samples, epochs) of the runs with the cache
# (training samples, epochs): the demo, Rotten Tomatoes, a long run, a short run, one too short for its probe
RUNS = [(2500, 6), (8530, 3), (60_000, 3), (500, 3), (200, 1)]


def model(layers: int = 6, hidden: int = 384) -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * hidden,
    )
    lora = LoraConfig(r=8, target_modules=["query", "key", "value", "intermediate.dense", "output.dense"])
    return get_peft_model(BertForSequenceClassification(config), lora).train()


class Sentences(torch.utils.data.Dataset):
    """Random tokens; lengths are normal around 27 (8 to 60), like those of Rotten Tomatoes."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = (27 + 11 * torch.randn(count, generator=generator)).clamp(8, 60).long().tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, VOCABULARY, (self.lengths[index],), generator=generator)
        return {"input_ids": ids, "labels": torch.tensor(index % 2)}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True)
    labels = torch.stack([s["labels"] for s in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def plain_flops(data: Sentences, epochs: int) -> int:
    """FLOPs of a plain run with batches sorted by length, the fewest possible: one step per width, multiplied."""
    network, total, known = model(), 0, {}
    order = sorted(range(len(data)), key=data.lengths.__getitem__)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        shape = (len(rows), max(data.lengths[row] for row in rows))
        if shape not in known:
            with CountFlops() as count:
                network(**collate([data[row] for row in rows])).loss.backward()
            known[shape] = count.total
        total += known[shape]
    return total * epochs


def measuring_flops(data: Sentences, epochs: int) -> dict[str, Any]:
    """Run all measurements of Safe without the training in between."""
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=collate)
    safe = Safe(
        model(),
        SafeConfig(dry_run=True),
        probe=loader,
        total_steps=len(loader) * epochs,
        samples_per_step=BATCH,
    )
    for _ in range(safe.total_steps):
        safe.step()
    events = safe.journal.events
    failed = [event for event in events if event["event"] == "measure_failed"]
    if failed:
        raise SystemExit(failed[0]["error"])
    probe = next(event for event in events if event["event"] == "probe")
    return {
        "steps": safe.total_steps,
        "measurements": sum(event["event"] == "measure" for event in events),
        "probe_samples": probe["samples"],
        "probe_bytes": probe["nbytes"],
        "flops": safe.flops_spent,
    }


@contextlib.contextmanager
def unexamined() -> Iterator[None]:
    """Serve every stored state without checks."""

    def find_layouts(_self: Any, kind: Any, rows: Any, _call: Any, whole: Any, _below: Any) -> None:
        for slot, hidden in whole.boundary.items():
            kind.layouts[slot] = Layout(hidden.dtype, by_position=hidden.shape[1] == rows.width(0))

    with contextlib.ExitStack() as undo:
        for owner, name, method in (
            (IndependenceCheck, "_find_layouts", find_layouts),
            (IndependenceCheck, "verify_rows", lambda *_: True),
            (ShadowCheck, "allows", lambda *_: True),
            (PaddingCheck, "_changes_states", lambda *_: False),
        ):
            undo.enter_context(mock.patch.object(owner, name, method))
        yield


class Counter(StorageTracker):
    """Count bytes alive and FLOPs in one dispatch mode."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made(result)
        self.flops += flops_of(func, args, kwargs or {}, result)
        return result


def cached_run(samples: int, epochs: int, rows: int = 8) -> dict[str, int]:
    """Train with Safe's defaults; count the FLOPs of all steps and the peak bytes of a step."""
    torch.manual_seed(0)
    network = model(hidden=96)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    data = Sentences(samples)
    loader = DataLoader(data, batch_size=rows, shuffle=True, collate_fn=collate)
    total = len(loader) * epochs
    safe = Safe(network, SafeConfig(), optimizer=optimizer, probe=loader, total_steps=total, samples_per_step=rows)
    flops = peak = 0
    for _ in range(epochs):
        for batch in loader:
            with Counter() as counter:
                counter.hold(*network.parameters(), *network.buffers(), *batch.values())
                network(**batch).loss.backward()
            flops, peak = flops + counter.flops, max(peak, counter.peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            safe.step()
    safe.close()
    if safe.cache.off_because is not None:
        raise SystemExit(f"The cache went off: {safe.cache.off_because}.")
    return {"steps": total, "flops": flops, "peak": peak}


def looking(samples: int, epochs: int) -> dict[str, Any]:
    """A run with the cache, with and without checks."""
    looked = cached_run(samples, epochs)
    with unexamined():
        blind = cached_run(samples, epochs)
    return {
        "samples": samples,
        "epochs": epochs,
        **looked,
        "flops_unexamined": blind["flops"],
        "peak_unexamined": blind["peak"],
        "share": looked["flops"] / blind["flops"] - 1,
    }


def train(settings: SafeConfig | None = None, steps: int = 12) -> tuple[list[float], list[torch.Tensor]]:
    """A short loop with dropout and a shuffling loader; with Safe if settings are given."""
    network = model(layers=2, hidden=48)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    torch.manual_seed(1)
    loader = DataLoader(Sentences(steps * 4), batch_size=4, shuffle=True, collate_fn=collate)
    safe = Safe(network, settings, optimizer=optimizer, probe=loader, total_steps=steps) if settings else None
    losses = []
    for batch in loader:
        loss = network(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if safe is not None:
            safe.step()
    if safe is not None and not (safe.scores and not safe.frozen):
        raise SystemExit("Safe must measure and must not freeze.")
    return losses, [p.detach() for p in network.parameters() if p.requires_grad]


def identical() -> bool:
    """Whether losses and trained weights are the same to the bit with measuring and without."""
    losses, weights = train()
    for settings in (SafeConfig(dry_run=True), SafeConfig(freeze_share=0)):
        other_losses, other_weights = train(settings)
        if losses != other_losses or not all(map(torch.equal, weights, other_weights)):
            return False
    return True


def measured() -> dict[str, Any]:
    """The cost of measuring, in runs of several lengths."""
    table = Table(title="FLOPs of measuring")
    for heading in ("samples × epochs", "steps", "measurements", "probe samples", "TFLOP", "plain TFLOP", "share"):
        table.add_column(heading, justify="right")
    rows = []
    for samples, epochs in RUNS:
        data = Sentences(samples)
        row = measuring_flops(data, epochs)
        row |= {"samples": samples, "epochs": epochs, "plain_flops": plain_flops(data, epochs)}
        row["share"] = row["flops"] / row["plain_flops"]
        rows.append(row)
        table.add_row(
            f"{samples:,} × {epochs}",
            f"{row['steps']:,}",
            str(row["measurements"]),
            str(row["probe_samples"]),
            f"{row['flops'] / 1e12:.4f}",
            f"{row['plain_flops'] / 1e12:.3f}",
            f"{row['share']:.2%}",
        )
    same = identical()
    Console(width=110).print(table)
    print(f"Losses and weights with measuring and without: {'identical' if same else 'DIFFERENT'}")
    return {"runs": rows, "identical": same}


def looked() -> dict[str, Any]:
    """The cost of the checks before the cache serves."""
    table = Table(title="The cache with and without checks")
    for heading in ("samples × epochs", "steps", "GFLOP", "without", "more", "peak, MiB", "without"):
        table.add_column(heading, justify="right")
    rows = [looking(samples, epochs) for samples, epochs in LOOKS]
    for row in rows:
        table.add_row(
            f"{row['samples']:,} × {row['epochs']}",
            str(row["steps"]),
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops_unexamined'] / 1e9:.2f}",
            f"{row['share']:+.2%}",
            f"{row['peak'] / 2**20:.3f}",
            f"{row['peak_unexamined'] / 2**20:.3f}",
        )
    Console(width=110).print(table)
    return {"looking": rows}


PARTS = {"measuring": measured, "looking": looked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="benchmarks/results/overhead.json")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="the other keeps its numbers")
    options = parser.parse_args()
    output = Path(options.output)
    found = json.loads(output.read_text()) if output.is_file() else {}
    for part in options.part:
        found |= PARTS[part]()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found | {"environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
