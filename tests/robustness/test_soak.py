"""A long run: memory stays flat, and the journal with it."""

import gc
import os

import psutil
import torch

import cases
from adafreeze import Safe, SafeConfig
from cached_run import by_step

# The whole of 2,000 steps takes some 40 s: ADAFREEZE_SOAK=2000. A leak shows in fewer.
STEPS = int(os.environ.get("ADAFREEZE_SOAK", "400"))
GROWTH = 8 * 2**20  # bytes of resident memory over the last four fifths: the allocator's own noise is 1 to 4 MiB


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def test_a_long_run_with_cache_budget_and_evaluations_keeps_its_memory(tmp_path):
    model = cases.lora_model("llama", blocks=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = [cases.sample("llama", index, 12) for index in range(400)]
    settings = {"score": "random", "warmup": 0.0, "ramp_end": 1.0, "policy": by_step({4: 1, 20: 2})}
    held = 256 * 1024  # memory and disk together hold some two thirds of the samples
    config = SafeConfig(
        cache="auto", cache_dir=tmp_path, cache_budget=held, memory_budget="1GiB", overhead=1.0, **settings
    )
    safe = Safe(
        model,
        config,
        optimizer=optimizer,
        probe=[cases.collate(data[:4])],
        total_steps=STEPS,
        samples_per_epoch=len(data),
        samples_per_step=4,
        batch_size=4,
        journal=tmp_path / "journal.jsonl",
    )
    generator = torch.Generator().manual_seed(0)
    sizes = {}
    for step in range(STEPS):
        rows = torch.randint(len(data), (4,), generator=generator).tolist()
        model(**cases.collate([data[row] for row in rows])).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                model(**cases.collate(data[:16]))
            model.train()
        if step + 1 in (STEPS // 5, STEPS):
            sizes[step + 1] = resident(), len(safe.journal.events), dict(safe.cache.prefix_cache.store.nbytes)
    (start, events, _), (end, later, nbytes) = sizes.values()
    print(
        f"{start / 2**20:.1f} MiB after {STEPS // 5} steps, {end / 2**20:.1f} after {STEPS}; {later} events; {nbytes}"
    )
    assert end - start < GROWTH
    assert later - events <= 24, "measurements, at most"
    assert len(nbytes) == 2 and all(0 < size <= held for size in nbytes.values())
    assert safe.cache.prefix_cache.stats.hits > 0
    safe.close()
