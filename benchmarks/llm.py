"""Language models as people train them: TRL's SFTTrainer, with packing and checkpointing, plain and with adafreeze.

    python benchmarks/llm.py [--weights smollm2] [--data ../shared/data] [--rows 192] [--length 256] [--batch 4]
                             [--epochs 3] [--learning_rate 2e-4] [--packing] [--dtype float32] [--task gsm8k]
                             [--methods plain plain+checkpointing ...] [--seeds 0] [-o benchmarks/results/llm.json]

SmolLM2-135M on worked answers of GSM8K (prompt and completion), or on E2E NLG as a chat in the model's own template;
the loss is on the completion. LoRA r = 16 on all linear layers. ``--dtype`` is that of the weights below the adapters:
with bfloat16 and nf4 (QLoRA), the adapters are in float32 and the steps under autocast. Every cell is a process of its
own, and is kept in the output: the same command continues. Methods:

- ``plain`` and ``safe`` without activation checkpointing, ``+checkpointing`` with it, as TRL's SFTConfig sets it;
- ``half``: the lower half of the blocks is frozen from the start, nothing else; ``half+kept``: its states are kept
  (``keep_cache``), which the first cell with the same data computes; ``half+offload``: they are there before step 0,
  and the weights of that half are on the disk;
- ``two-thirds+checkpointing``: two thirds from the start.

FLOPs and bytes are counted: ``peak`` is the most that a step saves for the backward pass, ``weights`` the least that is
on the device after a step. CPU time is that of the process in ``train()``, which counting makes longer in the first
step of each kind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer
from weights import fetch

from adafreeze import SafeCallback, SafeConfig
from adafreeze.env import environment
from adafreeze.train.trainer import MeteredTrainer, meter_of

HALF = {"freeze_at_start": 0.5, "freeze_share": 0.0, "lr_scale": 1.0}
METHODS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "plain": (None, False),
    "plain+checkpointing": (None, True),
    "safe": ({}, False),
    "safe+checkpointing": ({}, True),
    "half+checkpointing": (HALF, True),
    "half+kept": ({**HALF, "keep_cache": True}, True),
    "half+offload": ({**HALF, "keep_cache": True, "fill": "before", "offload": "disk"}, True),
    "two-thirds+checkpointing": ({**HALF, "freeze_at_start": 0.67}, True),
}


class Resident(TrainerCallback):
    """The least bytes of weights that were on the device after a step."""

    def __init__(self) -> None:
        self.least = 1 << 62

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.least = min(self.least, sum(p.nbytes for p in model.parameters() if not p.is_meta))


class Metered(MeteredTrainer, SFTTrainer):
    """TRL's trainer, whose steps are counted."""


def rows(data: Path, task: str, split: str, count: int) -> Dataset:
    """The first rows as prompt and completion."""
    found = Dataset.from_parquet(str(data / task / f"{split}.parquet")).select(range(count))
    return found.map(AS_PROMPT[task], remove_columns=found.column_names)


def question(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"{row['question']}\n", "completion": row["answer"]}


def chat(row: dict[str, str]) -> dict[str, Any]:
    asked = f"Describe this restaurant in a sentence or two: {row['mr']}"
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["ref"]}],
    }


AS_PROMPT = {"gsm8k": question, "e2e_nlg": chat}


def loaded(name: str, dtype: str) -> Any:
    """The weights, in nf4 as the QLoRA paper stores them (double quantization, products in bfloat16)."""
    if dtype != "nf4":
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=stored)


def train(options: argparse.Namespace, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """One cell."""
    settings, checkpointing = METHODS[method]
    name = str(fetch(options.weights))
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = loaded(name, options.dtype)
    config = None if settings is None else SafeConfig(**settings, cache_dir=options.states)
    callback = SafeCallback(config, journal=folder / "journal.jsonl") if config is not None else None
    trainer = Metered(
        model=model,
        args=SFTConfig(
            output_dir=str(folder), num_train_epochs=options.epochs, per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate, max_length=options.length, packing=options.packing, seed=seed,
            logging_steps=4, gradient_checkpointing=checkpointing, bf16=options.dtype != "float32", use_cpu=True,
            report_to=[], save_strategy="no", eval_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows(options.data, options.task, "train", options.rows),
        eval_dataset=rows(options.data, options.task, "test", options.rows // 3),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[callback] if callback else [],
    )  # fmt: skip
    trainer.meter = meter_of(trainer.model, callback)
    resident = Resident()
    trainer.add_callback(resident)
    result = trainer.train()
    found = {**trainer.meter.summary(), "cpu_seconds": result.metrics["train_cpu_seconds"], "weights": resident.least}
    found["train_loss"] = result.metrics["train_loss"]
    found["eval_loss"] = trainer.evaluate()["eval_loss"]
    if callback is not None:
        found["hit_rate"] = max(entry.get("safe/cache_hit_rate", 0.0) for entry in trainer.state.log_history)
    return found


def table(cells: dict[str, Any]) -> None:
    """Each cell against plain of the same key."""
    print(f"{'cell':60s} {'loss':>7s} {'FLOPs':>6s} {'peak':>6s} {'mean':>6s} {'weights':>7s} {'CPU':>5s}")
    for key, cell in sorted(cells.items()):
        method, rest = key.split("|", 1)
        plain = cells.get(f"plain|{rest}")
        parts = ("flops", "peak_saved_bytes", "mean_saved_bytes", "weights", "cpu_seconds")
        ratios = [f"{cell[part] / plain[part]:6.2f}" if plain else "     –" for part in parts]
        print(f"{method + ' ' + rest:60s} {cell['eval_loss']:7.4f} {' '.join(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="smollm2", choices=["smollm2", "stories15m"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "nf4"])
    parser.add_argument("--task", default="gsm8k", choices=AS_PROMPT)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "adafreeze-llm")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help="train this one cell and print it")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/llm.json"))
    options = parser.parse_args()
    options.states = options.work / "states"
    torch.set_num_threads(1)
    if options.cell:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(train(options, options.cell[0], int(options.cell[1]), Path(folder))))
        return
    setting = f"{options.weights} {options.rows}x{options.length} batch {options.batch}, {options.epochs} epochs"
    setting += f", {options.dtype}{', packed' if options.packing else ''}"
    if options.task != parser.get_default("task"):
        setting = f"{options.task} as a chat, {setting}"
    if options.learning_rate != parser.get_default("learning_rate"):
        setting += f", rate {options.learning_rate:g}"
    for seed in options.seeds:
        for method in options.methods:
            key = f"{method}|{setting}, seed {seed}"
            stored = json.loads(options.output.read_text()) if options.output.exists() else {"cells": {}}
            if key in stored["cells"]:
                continue
            words = [*sys.argv[1:], "--cell", method, str(seed)]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
            stored = json.loads(options.output.read_text()) if options.output.exists() else {"cells": {}}
            stored["cells"][key] = json.loads(done.stdout.splitlines()[-1])
            stored["environment"] = environment()
            options.output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    table(json.loads(options.output.read_text())["cells"])


if __name__ == "__main__":
    main()
