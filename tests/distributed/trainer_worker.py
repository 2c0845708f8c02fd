"""One rank of a Trainer run: python trainer_worker.py FOLDER NAME [--resume] [--die STEP] [--flag value ...]."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
from launch import tell
from transformers import Trainer, TrainerCallback, TrainingArguments
from worker import CONFIG, History, weights

import cases
from adafreeze import SafeCallback, SafeConfig


class Dying(TrainerCallback):
    """SIGKILL for rank 1 after ``step`` steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)


class HistoryCallback(TrainerCallback):
    """Adds to a ``History`` after each step."""

    def __init__(self, safe: SafeCallback, history: History) -> None:
        self.safe, self.history = safe, history

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.history.add(self.safe.safe, model)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die", type=int)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--find_unused", action="store_true")
    parser.add_argument("--cache", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    args = TrainingArguments(
        output_dir=str(arguments.folder / arguments.name), use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=arguments.rows, gradient_accumulation_steps=arguments.accumulate, max_steps=24,
        save_strategy="steps", save_steps=5, logging_steps=4, learning_rate=1e-2, weight_decay=0.1, seed=3,
        lr_scheduler_type="constant", ddp_find_unused_parameters=arguments.find_unused,
    )  # fmt: skip
    journal = arguments.folder / arguments.name / "journal.jsonl"
    safe = SafeCallback(SafeConfig(**CONFIG, cache=arguments.cache), journal=journal)
    history = History()
    trainer = Trainer(
        model=cases.lora_model(arguments.family, dropout=0.0),
        args=args,
        train_dataset=cases.Samples(arguments.family, 24, length=12),
        data_collator=cases.collate,
        callbacks=[safe, HistoryCallback(safe, history), *([Dying(arguments.die)] if arguments.die else [])],
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    name = arguments.name + ("-resumed" if arguments.resume else "")
    tell(
        arguments.folder, name, args.process_index, history=history.frozen, moved=history.moved,
        weights=weights(trainer.model), kind=type(trainer.model_wrapped).__name__,
        events=[event["event"] for event in safe.safe.journal.events], parallel=safe.safe.parallel.name,
        logs=safe.safe.logs(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
