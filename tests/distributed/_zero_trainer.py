"""One rank of the runs of test_zero_trainer.py: python _zero_trainer.py FOLDER RUNS."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import torch
from _zero_worker import gathered, gathered_lists
from torch import distributed as dist
from trainer_worker import HistoryCallback
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from worker import CONFIG, History

import cases
from adafreeze import SafeCallback, SafeConfig


def train(folder, name, stage, resume=None, accumulate=1, in_pieces=False, optimizer=None, **config):
    """A Trainer's run, or the rest of one from the checkpoint ``resume``.

    ``in_pieces``: the model is made after the arguments, so ZeRO-3 shards it, and draws other weights, as it is made.
    """
    model = None if in_pieces else cases.lora_model("llama", dropout=0.0)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    settings = {"zero_optimization": zero, **dict.fromkeys(auto, "auto"), **config}
    if optimizer is not None:
        settings["optimizer"] = optimizer
    args = TrainingArguments(
        output_dir=f"{folder}/{name}", use_cpu=True, report_to=[], disable_tqdm=True, max_steps=24,
        per_device_train_batch_size=2 // accumulate, gradient_accumulation_steps=accumulate,
        save_strategy="steps", save_steps=10, logging_steps=4, learning_rate=1e-2, weight_decay=0.1, seed=3,
        lr_scheduler_type="constant", deepspeed=settings,
    )  # fmt: skip
    model = model or cases.lora_model("llama", dropout=0.0)
    safe = SafeCallback(SafeConfig(**CONFIG))
    history = History(gathered_lists)
    trainer = Trainer(
        model=model, args=args, train_dataset=cases.Samples("llama", 24, length=12), data_collator=cases.collate,
        callbacks=[safe, HistoryCallback(safe, history)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=f"{folder}/{resume}" if resume else None)
    trainer.save_model(f"{folder}/{name}/saved")
    found = {
        "history": history.frozen, "moved": history.moved, "weights": gathered(model),
        "parallel": safe.safe.parallel.name,
        "logged": [entry for entry in trainer.state.log_history if "safe/frozen_prefix" in entry],
    }  # fmt: skip
    trainer.model_wrapped.destroy()
    unset_hf_deepspeed_config()
    return found


def main(folder, runs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, settings in runs.items():
        began = time.monotonic()
        try:
            results[name] = train(folder, name, **settings)
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    torch.save(results, Path(folder) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
