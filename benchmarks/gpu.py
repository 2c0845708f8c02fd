"""Checks that need a GPU: does the allocator use what was planned, and does it stay under a budget?

    python benchmarks/gpu.py [--shape 1b] [--rows 8] [--length 1024] [-o benchmarks/results/gpu.json]

A Llama-like model with random weights in bfloat16 and LoRA on all linears takes training steps on the device, at prefix
depths of none, a quarter, a half, three quarters, and the deepest, and under checkpointing. For each: the plan,
torch.cuda.max_memory_allocated, max_memory_reserved, tokens per second. Then runs of SAFE under budgets a tenth, 0.4,
and 0.7 of the way from checkpointing every block to plain training, with the allocator's peak early and late. Then
three epochs of a few batches with the lower half frozen, with and without the prefix cache in pinned memory.

With --device cpu the storage tracker replaces the allocator, and a small shape shows that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from adafreeze import Safe, SafeConfig, plan
from adafreeze.costs import StorageTracker
from adafreeze.env import environment
from adafreeze.errors import RunError
from adafreeze.memory.plan import Plan
from adafreeze.sizes import readable

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def configuration(shape: str) -> LlamaConfig:
    tiny = shape == "tiny"
    return LlamaConfig(
        vocab_size=512 if tiny else 128256, num_key_value_heads=2 if tiny else 8, max_position_embeddings=8192,
        tie_word_embeddings=True, use_cache=False, **SHAPES[shape],
    )  # fmt: skip


class Device:
    """Peaks of a device: from the allocator, or on the CPU from the storage tracker."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tracker: StorageTracker | None = None

    def __enter__(self) -> Device:
        if self.name == "cpu":
            self.tracker = StorageTracker()
            self.tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.tracker is not None:
            self.tracker.__exit__(None, None, None)

    def start(self) -> None:
        if self.tracker is not None:
            self.tracker.reset_peak()
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return self.tracker.peak if self.tracker is not None else torch.cuda.max_memory_allocated()

    def reserved(self) -> int:
        return 0 if self.tracker is not None else torch.cuda.max_memory_reserved()

    def wait(self) -> None:
        if self.tracker is None:
            torch.cuda.synchronize()


class Run:
    """A model, its optimizer, and batches on the device."""

    def __init__(self, shape: str, device: str, rows: int, length: int, checkpointing: bool = False) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            network = LlamaForCausalLM._from_config(configuration(shape), dtype=torch.bfloat16)
        self.model = get_peft_model(network, LORA).to(device).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.draw = partial(torch.randint, 3, 500, (rows, length), device=device)
        self.batch = self.another()

    def another(self) -> dict[str, torch.Tensor]:
        ids = self.draw()
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}

    def safe(
        self,
        budget: int | None = None,
        steps: int = 1000,
        batches: int | None = None,
        cache: str = "off",
        **config: Any,
    ) -> Safe:
        rows = len(self.batch["input_ids"])
        settings = SafeConfig(cache=cache, memory_budget=budget, freeze_at_start=0, **config)
        return Safe(
            self.model, settings, optimizer=self.optimizer,
            probe=self.batch, total_steps=steps, samples_per_step=rows, batch_size=rows,
            samples_per_epoch=batches and batches * rows,
        )  # fmt: skip

    def step(self, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        loss = self.model(**(batch or self.batch)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(run: Run, device: Device, steps: int = 4) -> dict[str, float]:
    for _ in range(2):  # choose kernels, create optimizer state
        run.step()
    device.start()
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    device.wait()
    seconds = time.perf_counter() - start
    tokens = run.batch["input_ids"].numel() * steps
    return {"peak": device.peak(), "reserved": device.reserved(), "tokens_per_second": tokens / seconds}


def epochs(run: Run, device: Device, cache: str, batches: int = 8, count: int = 3) -> dict[str, Any]:
    """Tokens per second in each epoch, and all losses."""
    pool = [run.another() for _ in range(batches)]
    safe = run.safe(steps=batches * count, batches=batches, cache=cache)
    safe.freeze(list(safe.units)[: len(safe.units) // 2])
    speeds, losses = [], []
    for _ in range(count):
        device.wait()
        start = time.perf_counter()
        losses += [run.step(batch) for batch in pool]
        device.wait()
        speeds.append(batches * run.batch["input_ids"].numel() / (time.perf_counter() - start))
    found = {"cache": cache, "tokens_per_second": speeds, "losses": list(map(float, losses)), "logs": safe.logs()}
    safe.close()
    return found


def under_budget(run: Run, device: Device, limit: int, steps: int = 40) -> dict[str, Any]:
    """Peak of the first ten steps and of the later ones; the choices and corrections of the budget."""
    try:
        safe = run.safe(limit, steps=steps, warmup=0.5, ramp_end=0.7, probe_tokens=256)
    except RunError as error:
        return {"limit": limit, "reason": error.fact}
    peaks = []
    for _ in range(steps):
        if device.tracker is not None:
            device.start()  # on CUDA the budget resets the peak itself, before each forward pass
        run.step()
        safe.step()
        peaks.append(device.peak())
    events = [event for event in safe.journal.events if event["event"] in ("recompute", "budget_corrected")]
    safe.close()
    kept = ("event", "peak", "excess", "blocks")
    return {
        "limit": limit,
        "peak_of_ten_steps": max(peaks[:10]),
        "peak_later": max(peaks[10:]),
        "events": [{name: event.get(name) for name in kept} for event in events],
    }


def depths(shape: tuple[str, str, int, int], device: Device, planned: Plan) -> list[dict[str, Any]]:
    """Plan and device at each depth of the prefix, and under checkpointing."""
    run = Run(*shape)
    safe = run.safe()
    rows: list[dict[str, Any]] = []
    for step in planned.steps:
        safe.freeze([name for name in list(safe.units)[: step.prefix] if name not in safe.frozen])
        rows.append({"prefix": step.prefix, "planned": step.peak, **measure(run, device)})
    safe.close()
    del run, safe
    gc.collect()
    rows.append(
        {
            "prefix": "checkpointed",
            "planned": planned.checkpointed.peak,
            **measure(Run(*shape, checkpointing=True), device),
        }
    )
    return rows


def show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    for column in ("prefix", "planned", "allocated", "planned / allocated", "reserved", "tokens / s"):
        table.add_column(column, justify="right")
    for row in rows:
        ratio = row["planned"] / row["peak"]
        table.add_row(
            str(row["prefix"]), readable(row["planned"]), readable(row["peak"]), f"{ratio:.3f}",
            readable(row["reserved"]), f"{row['tokens_per_second']:,.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--commit", default="", help="the measured commit (default: that of the checkout)")
    parser.add_argument("-o", "--output", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --shape tiny --rows 4 --length 64 tries the script")
    shape = (arguments.shape, arguments.device, arguments.rows, arguments.length)
    commit = (
        arguments.commit
        or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    )
    document: dict[str, Any] = {
        "commit": commit,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "shape": list(shape),
        "environment": environment(),
    }

    def keep(name: str, found: Any) -> None:
        document[name] = found
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    console = Console()
    planned = plan(
        configuration(arguments.shape), LORA, batch_size=arguments.rows, max_length=arguments.length,
        dtype="bfloat16", target=arguments.device, optim="adamw_torch_fused",
    )  # fmt: skip
    with Device(arguments.device) as device:
        rows = depths(shape, device, planned)
    show(rows, f"{arguments.shape}, {arguments.rows} × {arguments.length} on {arguments.device}", console)
    keep("rows", rows)
    budgets = []
    for share in (0.1, 0.4, 0.7):
        gc.collect()
        limit = int(planned.checkpointed.peak + share * (planned.plain.peak - planned.checkpointed.peak))
        with Device(arguments.device) as device:
            one = under_budget(Run(*shape), device, limit)
        budgets.append({"share": share, **one})
        peaks = one.get("reason") or (
            f"first ten steps {readable(one['peak_of_ten_steps'])}, later {readable(one['peak_later'])}"
        )
        console.print(f"budget {readable(limit)}: {peaks}")
        keep("budgets", budgets)
    caches = []
    for cache in ("off", "ram", "off", "ram"):
        gc.collect()
        with Device(arguments.device) as device:
            found = epochs(Run(*shape), device, cache)
        caches.append(found)
        speeds = ", ".join(f"{speed:,.0f}" for speed in found["tokens_per_second"])
        console.print(f"lower half frozen, cache {cache}: {speeds} tokens / s in epochs 1, 2, 3")
        keep("caches", caches)
    same = caches[0]["losses"] == caches[1]["losses"]
    console.print(f"losses with and without the cache: {'equal to the bit' if same else 'not equal'}")


if __name__ == "__main__":
    main()
