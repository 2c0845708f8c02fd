"""How the cost of measuring scores and of the prefix cache grows with size.

    python benchmarks/speed.py [--work FOLDER] [-o benchmarks/results/speed.json]

Times are medians of several repeats.

* blocks: one measurement of all scores, 1,024 tokens of a random BERT (hidden 128); ``safe.step()`` without a
  measurement; the checks on frozen parameters in each step with the lower half frozen; a plain training step.
* tokens and hidden: CKA of one block, the size of its pre-trained reference, and its FLOPs as a share of the block's
  own forward pass. n tokens of d features take 4·d² FLOPs per token if n > d, else 2·n·d; the block takes 24·d² plus
  attention. So CKA grows with hidden as the block does, then more slowly.
* cache: reading and writing one sample, in batches of 32, at each number of stored samples: real keys and identities,
  values of 256 bytes. Disk: each batch is one transaction, most of its time is the sync (CPU time has its own column);
  reads come from the system's page cache. Bytes beyond the values are those of the process (memory; unknown below
  1e5 samples) or of the file's pages (disk).

The last row of each table is p in "grows as size to the power of p" from the first size to the last: 0 is flat, 1 is
linear.
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
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, BertModel

from adafreeze import Safe, SafeConfig
from adafreeze.cache import DiskTier, Identity, RamTier, Tier
from adafreeze.cache.store import Store
from adafreeze.cache.tiers import Entry
from adafreeze.costs import CountFlops
from adafreeze.decide.cka import CKAReference
from adafreeze.env import environment
from adafreeze.journal import Journal
from adafreeze.model.rows import Rows

TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
BLOCKS = (6, 12, 24, 48)
TOKENS = (512, 1024, 2048, 4096, 8192)
HIDDEN = (128, 256, 512, 1024, 2048, 4096)
HELD = (1_000, 10_000, 100_000, 1_000_000)
REPEATS = 7
BATCH = 32
TIMED = 40  # batches at each size of the cache: read, written by wall time, and written by CPU time
STATE = (4, 16)  # of one sample; small, so that a million fit
BUDGET = 5 * 2**29

Record = dict[str, Any]


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
    lora = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)  # so that not all scores are zero
    return get_peft_model(BertForSequenceClassification(bert(blocks, 128)), lora).train()


def of_blocks(blocks: int) -> Record:
    """One measurement, and a step of SAFE without one."""
    network = with_adapters(blocks)
    ids = torch.randint(1, 1000, (32, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    config = SafeConfig(probe_tokens=ids.numel(), dry_run=True)
    safe = Safe(network, config, probe=[batch], total_steps=10**8, samples_per_step=len(ids))
    safe.step()  # fits the probe and records the pre-trained representations
    scorer = safe.decider.scorer
    assert scorer is not None and scorer.probe.samples == len(ids)
    before = scorer.flops_spent
    measuring = seconds(lambda: scorer.measure({}))
    flops = (scorer.flops_spent - before) // REPEATS
    idle = seconds(lambda: [safe.step() for _ in range(1000)], repeats=50)
    assert not safe.scores, "these steps must not measure"
    training = seconds(lambda: network(**batch).loss.backward(), repeats=3)
    safe.freezer.freeze(list(safe.units)[: blocks // 2])
    watching = seconds(safe._watch.look, repeats=200)
    found = {
        "blocks": blocks,
        "measure_s": measuring,
        "measure_s_per_block": measuring / blocks,
        "flops_per_block": flops / blocks,
        "bytes_per_block": scorer.nbytes / blocks,
        "idle_step_us": 1e3 * idle,
        "guard_us": 1e6 * watching,
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
    with CountFlops() as block, torch.device("meta"):  # FLOPs depend on shapes only
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
    """Keys of the samples of one batch."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 30_000, (BATCH, 16), generator=generator)
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).keys()


def of_tier(tier: Tier) -> Iterator[Record]:
    """Fill the tier from size to size; at each size, read and write batches as training steps do."""
    safe = Safe(with_adapters(2), SafeConfig(dry_run=True), probe={"input_ids": torch.ones(2, 8).long()}, total_steps=1)
    identity, depths, slots = Identity(safe.model, safe.stacks, safe.backend), (1,), [(safe.stacks[0].path, 0)]
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
            store.put([item for number in range(batches, until) for item in items(number)], step=0)
            batches = until
        held = batches * BATCH
        in_memory = (rss() - start) / held if size >= 100_000 else math.nan
        beyond = (in_memory if isinstance(tier, RamTier) else tier.nbytes / held) - payload
        asked = [keys(number) for number in torch.randint(batches, (TIMED,)).tolist()]
        new = [items(number) for number in range(batches, batches + 2 * TIMED)]
        batches += 2 * TIMED
        gets, puts = iter(asked), iter(new)
        got = seconds(lambda gets=gets: store.read(next(gets), depths, slots), TIMED)  # type: ignore[misc]
        put = seconds(lambda puts=puts: store.put(next(puts), step=0), TIMED)  # type: ignore[misc]
        cpu = seconds(lambda puts=puts: store.put(next(puts), step=0), TIMED, time.process_time)  # type: ignore[misc]
        assert not tier.full and all(None not in store.read(some, depths, slots) for some in (asked[0], asked[-1]))
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
    parser.add_argument("--work", type=Path, default=Path("runs/speed"), help="folder for the disk tier")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/speed.json"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    found = growth(options.work)
    for name, rows in found.items():
        console.print(table_of_growth(name, rows))
    settings = {"threads": torch.get_num_threads(), "repeats": REPEATS, "state": STATE, "batch": BATCH}
    document = {"environment": environment(), "settings": settings, **found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {options.output}")


if __name__ == "__main__":
    main()
