"""What each method costs, side by side; and how the cost of measuring and of the cache grows with size.

    python benchmarks/speed.py [--part methods|growth|all] [--rounds 2] [--train_samples 1250] [--epochs 6]
                               [--work FOLDER] [-o benchmarks/results/speed.json]

``methods``: the demo's task (all-MiniLM-L6-v2, LoRA r = 8, Rotten Tomatoes sentences grouped by length, 1,000 held
out) by ``adafreeze compare``: plain, full checkpointing, GradES, bottom-up, SAFE as published and SAFE's defaults, one
after the other, and all of them again with the same seed in each further round. Of each round a method's time is
divided by plain's of that round; the table shows the median. FLOPs, bytes and score must be the same in all rounds,
and it is said if they are not. Times hold what counting costs: each kind of step (widths of the batch, what is frozen)
is counted once a run, so that methods that freeze have more to count than plain. Cells that are done are kept in
``--work``, times included.

``growth``, each size by itself, times being medians of several repeats:

* blocks: one measurement of all scores, 1,024 tokens of a random BERT (hidden 128); ``safe.step()`` when it measures
  nothing; what the guard looks at in each step with the lower half frozen; a plain training step beside them.
* tokens, and hidden: CKA of one block, what is kept of its pre-trained side, and its FLOPs as a share of those of the
  block's own forward pass. With n tokens of d features it takes 4·d² FLOPs a token where n > d, and 2·n·d elsewhere;
  the block takes 24·d² and attention. So it grows with hidden as the block does, then less, from a sixth of it down.
* cache: what a look-up and a write of one sample take, in batches of 32, when so many samples are held: real keys and
  identities, values of 256 bytes. Disk: each batch is one transaction, and most of its time is the disk's, which syncs
  it (CPU time, of other batches, stands beside); reads come out of the system's page cache. Bytes beyond the values
  are those of the process (memory; not told below 1e5 samples) or of the file's pages (disk).

The last row of each table is p in "grows as size to the power of p" from the first size to the last: 0 is flat, 1
linear. Each part leaves the other's rows in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, BertModel

from adafreeze import Safe, SafeConfig
from adafreeze.cache import DiskTier, Identity, RamTier, Tier
from adafreeze.cache.store import Store
from adafreeze.cache.tiers import Entry
from adafreeze.cli._demo_data import model_folder, sentences
from adafreeze.cli.compare import main as compare
from adafreeze.cli.demo import HELD_OUT, TARGETS
from adafreeze.costs import CountFlops
from adafreeze.decide.cka import CKAReference
from adafreeze.env import environment
from adafreeze.journal import Journal
from adafreeze.loop.guard import Guard
from adafreeze.model.rows import Rows

METHODS = ("plain", "checkpointing", "grades", "bottom-up", "safe-paper", "safe")
COUNTED = ("flops", "peak_saved_bytes", "mean_saved_bytes", "metrics", "freezes")  # the same in all rounds

BLOCKS = (6, 12, 24, 48)
TOKENS = (512, 1024, 2048, 4096, 8192)
HIDDEN = (128, 256, 512, 1024, 2048, 4096)
HELD = (1_000, 10_000, 100_000, 1_000_000)
REPEATS = 7
BATCH = 32
TIMED = 40  # batches at each size of the cache: looked up, written by the clock, and written by CPU time
STATE = (4, 16)  # of one sample: as many must fit as the largest size asks for
BUDGET = 5 * 2**29

Record = dict[str, Any]


def task_file(options: argparse.Namespace, folder: Path) -> Path:
    """The demo's rows and settings, as flags of ``adafreeze train``."""
    files = {}
    for name, rows in zip(("train", "validation"), sentences(options.train_samples, HELD_OUT, seed=0), strict=True):
        files[f"{name}_file"] = str(folder / f"{name}.parquet")
        Dataset.from_dict({"text": rows.texts, "label": rows.labels}).to_parquet(files[f"{name}_file"])
    flags = {
        "task": "text-classification",
        **files,
        "model_name_or_path": str(model_folder()),
        "target_modules": TARGETS,
        "adapter_r": 8,
        "adapter_alpha": 16,
        "num_train_epochs": options.epochs,
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 20,
        "disable_tqdm": True,
    }
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")
    return path


def methods(options: argparse.Namespace, work: Path) -> list[Record]:
    """All methods in each round, and what they came to."""
    folder = work / f"{options.train_samples}-samples-{options.epochs}-epochs"
    folder.mkdir(parents=True, exist_ok=True)
    task, rounds = task_file(options, folder), []
    for number in range(options.rounds):
        cells = folder / f"round-{number}"
        compare([str(task), "--methods", *METHODS, "--seeds", "0", "--output_dir", str(cells)])
        outcomes = json.loads((cells / "compare.json").read_text())["outcomes"]
        rounds.append({outcome["method"]: outcome for outcome in outcomes})
    return [of_method(name, rounds) for name in METHODS]


def of_method(name: str, rounds: list[dict[str, Record]]) -> Record:
    """One method's row: what was counted in the first round, the times of all, and what differs between them."""
    own, plain = [found[name] for found in rounds], rounds[0]["plain"]
    first, ratios = own[0], [found[name]["seconds"] / found["plain"]["seconds"] for found in rounds]
    return {
        "method": name,
        "accuracy": first["metrics"]["accuracy"],
        "seconds": [one["seconds"] for one in own],
        "time_ratios": ratios,
        "time_ratio": statistics.median(ratios),
        **{field: first[field] for field in ("flops", "peak_saved_bytes", "mean_saved_bytes")},
        **{f"{f}_ratio": first[f] / plain[f] for f in ("flops", "peak_saved_bytes", "mean_saved_bytes")},
        "freezes": first["freezes"],
        "blocks": first["blocks"],
        "steps": first["steps"],
        "cached": first["cached"],
        "differs": [field for field in COUNTED if any(one[field] != first[field] for one in own)],
    }


def table_of_methods(rows: list[Record]) -> Table:
    table = Table(title="Demo task; against plain of the same round (least to most)", title_justify="left")
    for heading in ("method", "accuracy", "s", "time", "FLOPs", "peak saved bytes", "mean saved bytes", "frozen"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        least, most = min(row["time_ratios"]), max(row["time_ratios"])
        table.add_row(
            row["method"],
            f"{100 * row['accuracy']:.1f}",
            f"{statistics.median(row['seconds']):.0f}",
            f"{row['time_ratio']:.3f} ({least:.3f} to {most:.3f})",
            *(f"{row[f'{name}_ratio']:.3f}" for name in ("flops", "peak_saved_bytes", "mean_saved_bytes")),
            f"{row['freezes'][-1][1] if row['freezes'] else 0} of {row['blocks']}" if row["blocks"] else "-",
        )
    return table


def seconds(
    work: Callable[[], object], repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median of several repeats."""
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def bert(blocks: int, hidden: int) -> BertConfig:
    return BertConfig(
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
    )


def with_adapters(blocks: int) -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)  # that scores are not all zero
    return get_peft_model(BertForSequenceClassification(bert(blocks, 128)), lora).train()


def of_blocks(blocks: int) -> Record:
    """A measurement, and what SAFE does in a step without one."""
    network = with_adapters(blocks)
    ids = torch.randint(1, 1000, (32, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    config = SafeConfig(probe_tokens=ids.numel(), dry_run=True)
    safe = Safe(network, config, probe=[batch], total_steps=10**8, samples_per_step=len(ids))
    safe.step()  # fits the probe, and takes the pre-trained representations
    scorer = safe.decider.scorer
    assert scorer is not None and scorer.probe.samples == len(ids)
    before = scorer.flops_spent
    measuring = seconds(lambda: scorer.measure({}))
    flops = (scorer.flops_spent - before) // REPEATS
    idle = seconds(lambda: [safe.step() for _ in range(1000)], repeats=50)
    assert not safe.scores, "one of these steps was to measure nothing, and did"
    training = seconds(lambda: network(**batch).loss.backward(), repeats=3)
    safe.freezer.freeze(list(safe.units)[: blocks // 2])
    guard = Guard(network, safe.freezer, safe.journal)

    def look() -> None:
        guard.audit(0)
        guard.look_at_gradients(0)

    looking = seconds(look, repeats=200)
    found = {
        "blocks": blocks,
        "measure_s": measuring,
        "measure_s_per_block": measuring / blocks,
        "flops_per_block": flops / blocks,
        "bytes_per_block": scorer.nbytes / blocks,
        "idle_step_us": 1e3 * idle,
        "guard_us": 1e6 * looking,
        "training_step_s": training,
    }
    safe.close()
    return found


def of_cka(tokens: int, hidden: int, size: str) -> Record:
    """CKA of one block."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(tokens, hidden, generator=generator)
    after = before + 0.1 * torch.randn(tokens, hidden, generator=generator)
    reference = CKAReference(before)
    took = seconds(lambda: reference.score(after))
    with CountFlops() as count:
        reference.score(after)
    with CountFlops() as block, torch.device("meta"):  # shapes are all that is counted
        BertModel(bert(1, hidden), add_pooling_layer=False)(input_ids=torch.ones(tokens // 64, 64, dtype=torch.long))
    return {
        size: {"tokens": tokens, "hidden": hidden}[size],
        "s": took,
        "s_per_token": took / tokens,
        "flops": count.total,
        "flops_per_token": count.total / tokens,
        "flops_of_block": count.total / block.total,
        "kept_bytes": reference.nbytes,
        "kept_bytes_per_token": reference.nbytes / tokens,
    }


def keys(number: int) -> list[bytes]:
    """Of the samples of one batch."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 30_000, (BATCH, 16), generator=generator)
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).keys()


def of_tier(tier: Tier) -> Iterator[Record]:
    """Filled from one size to the next; at each, batches are looked up and written as training steps do."""
    safe = Safe(with_adapters(2), SafeConfig(dry_run=True), probe={"input_ids": torch.ones(2, 8).long()}, total_steps=1)
    identity, depths = Identity(safe.model, safe.stacks, safe.backend), (1,)
    store, states = Store([tier], identity, Journal()), list(torch.randn(BATCH, *STATE))

    def items(number: int) -> list[tuple[bytes, Entry]]:
        digest = identity.of(depths)
        return [(key, Entry(digest, depths, (state,))) for key, state in zip(keys(number), states, strict=True)]

    def rss() -> int:
        gc.collect()
        return psutil.Process().memory_info().rss

    items(0)
    start, batches, payload = rss(), 0, states[0].nbytes
    for size in HELD:
        while batches * BATCH < size:
            until = min(batches + 64, -(-size // BATCH))
            store.hold([item for number in range(batches, until) for item in items(number)], step=0)
            batches = until
        held = batches * BATCH
        in_memory = (rss() - start) / held if size >= 100_000 else math.nan
        beyond = (in_memory if isinstance(tier, RamTier) else tier.nbytes / held) - payload
        asked = [keys(number) for number in torch.randint(batches, (TIMED,)).tolist()]
        new = [items(number) for number in range(batches, batches + 2 * TIMED)]
        batches += 2 * TIMED
        gets, puts = iter(asked), iter(new)
        got = seconds(lambda gets=gets: store.read(next(gets), depths), TIMED)  # type: ignore[misc]
        put = seconds(lambda puts=puts: store.hold(next(puts), step=0), TIMED)  # type: ignore[misc]
        cpu = seconds(lambda puts=puts: store.hold(next(puts), step=0), TIMED, time.process_time)  # type: ignore[misc]
        assert not tier.full and all(None not in store.read(some, depths) for some in (asked[0], asked[-1]))
        yield {
            "samples": size,
            "tier": tier.name,
            "get_us": 1e6 * got / BATCH,
            "put_us": 1e6 * put / BATCH,
            "put_cpu_us": 1e6 * cpu / BATCH,
            "key_us": 1e6 * seconds(lambda: keys(0), TIMED) / BATCH,
            "bytes_beyond_value": None if math.isnan(beyond) else beyond,
        }
    store.close()
    safe.close()


def growth(work: Path) -> dict[str, list[Record]]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        cache = {
            "cache_memory": list(of_tier(RamTier(BUDGET))),
            "cache_disk": list(of_tier(DiskTier(Path(folder) / "cache", BUDGET))),
        }
    return {
        "blocks": [of_blocks(blocks) for blocks in BLOCKS],
        "tokens": [of_cka(tokens, 384, "tokens") for tokens in TOKENS],
        "hidden": [of_cka(2048, hidden, "hidden") for hidden in HIDDEN],
        **cache,
    }


def table_of_growth(name: str, rows: list[Record]) -> Table:
    table = Table(title=name, title_justify="left")
    size = next(iter(rows[0]))
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*("-" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
    table.add_section()
    table.add_row("p", *(power(rows, size, heading) for heading in list(rows[0])[1:]))
    return table


def power(rows: list[Record], size: str, heading: str) -> str:
    known = [row for row in rows if isinstance(row[heading], (int, float))]
    if len(known) < 2:
        return ""
    first, last = known[0], known[-1]
    return f"{math.log(last[heading] / first[heading]) / math.log(last[size] / first[size]):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["methods", "growth", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=2, help="of methods (default 2)")
    parser.add_argument("--train_samples", type=int, default=1250, help="sentences to train on (default 1250)")
    parser.add_argument("--epochs", type=int, default=6, help="of each run (default 6)")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"), help="where cells are kept")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/speed.json"))
    options = parser.parse_args()
    disable_progress_bars()
    options.work.mkdir(parents=True, exist_ok=True)
    console, threads = Console(width=140), torch.get_num_threads()
    found: Record = json.loads(options.output.read_text()) if options.output.exists() else {"settings": {}}
    if options.part != "growth":
        found["methods"] = methods(options, options.work)
        asked = {name: getattr(options, name) for name in ("rounds", "train_samples", "epochs")}
        found["settings"]["methods"] = {"seed": 0, "threads": threads, **asked}
        console.print(table_of_methods(found["methods"]))
        for row in found["methods"]:
            if row["differs"]:
                print(f"{row['method']}: not the same in all rounds: {', '.join(row['differs'])}")
    if options.part != "methods":
        found["growth"] = growth(options.work)
        found["settings"]["growth"] = {"threads": threads, "repeats": REPEATS, "state": STATE, "batch": BATCH}
        for name, rows in found["growth"].items():
            console.print(table_of_growth(name, rows))
    found = {"environment": environment(), **{name: value for name, value in found.items() if name != "environment"}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {options.output}")


if __name__ == "__main__":
    main()
