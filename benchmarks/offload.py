"""What it brings that the frozen part leaves the device, and what it costs.

    python benchmarks/offload.py [--parts resident job plan cards] [-o benchmarks/results/offload.json]

resident: a Llama of 8 blocks on the CPU, the lower half frozen from the start; its weights leave for the disk after the
first epoch. The share of the weights that is resident then, how far the process's memory (RSS) falls in that step,
losses and weights against a run in which they stay, and CPU time of a step in both, in turns.

job: a Llama of 20 blocks of which the process may hold a quarter, loaded from disk by ``from_pretrained``, filled and
trained, against what ``plan`` says: bytes of weights and of tensors that are alive at the same time, counted by a
dispatch mode over the whole run.

plan: the shape of Llama-3.1-8B in bf16, one sample of 1,024 tokens, LoRA on all linear layers, against plain PEFT; and
with nf4 weights on 6 GiB.

cards: the flags that ``plan`` proposes for three models on three cards, four samples of 1,024 tokens, or one where four
do not fit. These two parts run nothing; together they take twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import adafreeze
from adafreeze import Safe, SafeConfig
from adafreeze.costs.memory import StorageTracker
from adafreeze.env import environment

MIB = 2**20
LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
MODELS = {
    "Qwen2.5-1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    ),
}  # fmt: skip
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0}


class Rows(torch.utils.data.Dataset):
    """Random samples of 64 tokens."""

    def __init__(self, count: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, vocabulary, (count, 64), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def saved_model(folder: Path, **shape: Any) -> Path:
    """A random Llama with a head of its own, saved in float32."""
    config = LlamaConfig(**SHAPE, **shape, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100MB")
    return folder


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """With LoRA on all linear layers of the blocks."""
    torch.manual_seed(1)
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings).train()


def weights_of(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of all parameters, and of those that are not on ``meta``."""
    sizes = [(p.nbytes, p.is_meta) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, away in sizes if not away)


def started(
    model: torch.nn.Module, rows: Rows, share: float, offload: str, fill: str | None = None
) -> tuple[Safe, Any, DataLoader]:
    """A Safe, an optimizer and a loader of one epoch after the other."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    # Nothing freezes later, so that all steps are alike.
    settings = {"freeze_share": 0.0, "checkpointing": "selective", "score": "random", "cache": "ram"}
    config = SafeConfig(freeze_at_start=share, fill=fill, offload=offload, **settings)
    return (
        Safe(model, config, optimizer=optimizer, probe=loader, total_steps=1000, samples_per_step=4),
        optimizer,
        loader,
    )


def step(model: torch.nn.Module, safe: Safe, optimizer: Any, batch: Any) -> float:
    """One optimizer step."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    safe.step()
    return loss.item()


class Counted(StorageTracker):
    """Counts what takes memory: not what is on ``meta``."""

    def hold(self, *tensors: torch.Tensor) -> None:
        super().hold(*(tensor for tensor in tensors if not tensor.is_meta))


def rss() -> int:
    """Bytes of this process in memory, without those that glibc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def resident(folder: Path) -> dict[str, Any]:
    """Of the module's docstring."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8000}
    path, rows = saved_model(folder / "resident", **shape), Rows(32, 8000)
    made: dict[str, Any] = {}
    runs = {}
    losses: dict[str, list[float]] = {"disk": [], "off": []}
    seconds: dict[str, list[float]] = {"disk": [], "off": []}
    for offload in ("disk", "off"):
        model = adapted(AutoModelForCausalLM.from_pretrained(path))
        safe, optimizer, loader = started(model, rows, 0.5, offload)
        batches = [batch for _ in range(6) for batch in loader]
        runs[offload] = model, safe, optimizer, batches
        while offload == "disk" and not made:  # alone, so that nothing else moves memory
            before = rss()
            losses["disk"].append(step(model, safe, optimizer, batches[len(losses["disk"])]))
            if moved := safe.freezing.offload.nbytes:
                everything, here = weights_of(model)
                made |= {"weights": everything, "resident_share": here / everything, "offloaded": moved}
                made |= {"at_step": safe.steps, "rss_fell_by": (before - rss()) / moved}
    losses["off"] += [step(*runs["off"][:3], runs["off"][3][number]) for number in range(made["at_step"])]
    for number in range(made["at_step"], len(runs["off"][3])):
        for offload in ("disk", "off") if number % 2 else ("off", "disk"):
            model, safe, optimizer, batches = runs[offload]
            start = time.process_time()
            losses[offload].append(step(model, safe, optimizer, batches[number]))
            seconds[offload].append(time.process_time() - start)
    made["same_losses"] = losses["disk"] == losses["off"]
    for run in runs.values():
        run[1].close()
    weights = zip(runs["disk"][0].parameters(), runs["off"][0].parameters(), strict=True)
    made["same_weights"] = all(torch.equal(one, other) for one, other in weights)
    made["step_cpu_time"] = statistics.median(seconds["disk"]) / statistics.median(seconds["off"])
    return made


def job(folder: Path) -> dict[str, Any]:
    """Of the module's docstring."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 20, "vocab_size": 2000}
    path, rows = saved_model(folder / "job", **shape), Rows(24, 2000)
    planned = adafreeze.plan(
        str(path),
        LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        batch_size=4,
        max_length=64,
        padding=False,
        optim="adamw_torch",
        target="cpu",
    )
    share = 19 / 20  # all but one
    with Counted() as tracker:
        model = adapted(adafreeze.from_pretrained(str(path), device="cpu"))
        everything, _ = weights_of(model)
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.clone()
        tracker.hold(*(p for p in model.parameters() if not p.is_meta))
        tracker.reset_peak()
        safe, optimizer, loader = started(model, rows, share, "disk", fill="before")
        filled = tracker.peak
        tracker.hold(*(p for p in model.parameters() if not p.is_meta))
        tracker.reset_peak()
        states = sum(safe.cache.prefix_cache.store.nbytes.values())  # on this device, and not in the plan
        losses = [step(model, safe, optimizer, batch) for batch in loader]  # with checks of what is served
        job = max(filled, tracker.peak)
        tracker.reset_peak()
        losses += [step(model, safe, optimizer, batch) for _ in range(2) for batch in loader]
        trained = tracker.peak - states
        _, here = weights_of(model)
    depth = sum(safe.prefixes.values())
    safe.close()
    one = next(one for one in planned.offloaded if one is not None and one.prefix == depth)
    return {
        "weights": everything,
        "resident_share": here / everything,
        "peak": job,
        "peak_share_of_weights": job / everything,
        "as_planned": job / one.job,
        "peak_of_training": trained,
        "training_as_planned": trained / one.peak,
        "losses": losses,
    }


def planned(_: Path) -> dict[str, Any]:
    """Of the module's docstring."""
    settings: dict[str, Any] = {"batch_size": 1, "max_length": 1024, "dtype": "bfloat16", "padding": False}
    made = {}
    for name, more in {
        "selective": {},
        "full": {"checkpointing": True},
        "nf4 on 6 GiB": {"checkpointing": True, "quantization": "nf4", "device_memory": "6GiB"},
    }.items():
        found = adafreeze.plan(MODELS["Llama-3.1-8B"], LORA, **settings, **more)
        base = found.checkpointed if name == "full" else found.plain
        made[name] = {
            "against": base.peak,
            "limit": found.limit,
            "proposal": found.proposal,
            "jobs": [
                {"prefix": one.prefix, "peak": one.job, "filling": one.filling, "share": one.job / base.peak}
                for one in found.offloaded
                if one is not None
            ],
        }
    return made


def cards(_: Path) -> dict[str, Any]:
    """Of the module's docstring."""
    made: dict[str, Any] = {}
    for name, config in MODELS.items():
        for card in ("RTX 3070", "RTX 3060", "RTX 4090"):
            for rows in (4, 1):
                settings = {"batch_size": rows, "max_length": 1024, "dtype": "bfloat16", "device_memory": card}
                found = adafreeze.plan(config, LORA, **settings)
                made.setdefault(name, {"plain": found.plain.peak})[card] = {"samples": rows, "flags": found.proposal}
                if found.proposal is not None:
                    break
    return made


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"resident": resident, "job": job, "plan": planned, "cards": cards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("-o", "--output", default="benchmarks/results/offload.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output = Path(options.output)
    found = json.loads(output.read_text()) if output.exists() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            found[part] = PARTS[part](Path(folder))
        found["environment"] = environment()
        found["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(found[part], indent=1))
    print(f"Written: {output}")


if __name__ == "__main__":
    main()
