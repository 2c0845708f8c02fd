"""One rank of a loop with Accelerate: python accelerate_worker.py FOLDER NAME ... (see RUNS)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from launch import tell
from torch import distributed as dist
from worker import History, weights

import cases
from adafreeze import SafeConfig
from adafreeze.integrations.accelerate import AcceleratedSafe

EPOCHS = 6
CONFIG = {"warmup": 0.2, "ramp_end": 0.7, "freeze_share": 0.7, "probe_tokens": 256, "min_measurements": 4}
RUNS = {
    "whole": {},
    "resumed": {"resume": "whole"},
    "back": {"back": True},
    "split": {"split": True, "rows": 6},
    "accumulate": {"accumulate": 2},
}


def train(
    folder: Path, name: str, *, family="llama", rows=3, accumulate=1, dropout=0.0, split=False, resume=None,
    back=False, mixed_precision="no", save_at=8, config=None,
):  # fmt: skip
    """A run that is saved after ``save_at`` optimizer steps, resumed from ``resume``, or goes back."""
    AcceleratorState._reset_state(reset_partial_state=False)  # otherwise a second precision in one process is refused
    set_seed(3)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=split, use_seedable_sampler=True),
    )  # fmt: skip
    model = cases.lora_model(family, dropout=dropout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 500)
    data = cases.loader(family, 18, rows, length=12)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    steps = -(-len(data) // accumulate)
    settings = SafeConfig(**{**CONFIG, **(config or {})})
    safe = AcceleratedSafe(accelerator, model, optimizer, data, settings, total_steps=steps * EPOCHS)
    if resume is not None:
        accelerator.load_state(str(folder / resume))
    history, epoch = History(), safe.steps // steps
    while epoch < EPOCHS:
        data.set_epoch(epoch)
        done = safe.steps - epoch * steps
        for batch in skip_first_batches(data, done * accumulate):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                safe.step()
            if not accelerator.sync_gradients:
                continue
            history.add(safe, accelerator.unwrap_model(model))
            if safe.steps == save_at and resume is None:
                accelerator.save_state(str(folder / name))
        epoch += 1
        if back and epoch == EPOCHS:
            back = False
            history.forget()
            accelerator.load_state(str(folder / name))
            epoch = safe.steps // steps
    made = {
        "history": history.frozen, "moved": history.moved, "weights": weights(accelerator.unwrap_model(model)),
        "steps": safe.steps,
        "total": safe.total_steps, "events": [event["event"] for event in safe.journal.events],
        "kind": type(model).__name__, "logs": safe.logs(), "parallel": safe.parallel.name,
        "registered": len(accelerator._custom_objects),
    }  # fmt: skip
    safe.close()
    accelerator.free_memory()
    return made


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    for name in names:
        tell(folder, name, int(os.environ["RANK"]), **train(folder, name, **RUNS[name]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
