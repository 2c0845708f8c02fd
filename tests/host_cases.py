"""Runs of tools that train by their own commands, in a folder with the small model of examples/tiny_llama.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from adafreeze.journal import read_journal

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder: Path, *words: str, fails: bool = False) -> str:
    """``python words``; what it printed."""
    tools = {"AXOLOTL_DO_NOT_TRACK": "1", "DISABLE_VERSION_CHECK": "1"}  # the second is LLaMA-Factory's
    env = {**os.environ, **tools, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    env.pop("RANK", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


def losses(output: Path) -> list[float]:
    """By step, as the Trainer saved them at the end or in the last checkpoint."""
    histories = [json.loads(path.read_text())["log_history"] for path in output.rglob("trainer_state.json")]
    return [entry["loss"] for entry in max(histories, key=len) if "loss" in entry]


def frozen_at(output: Path) -> dict[int, int]:
    """How many units froze, by step."""
    return {e["step"]: len(e["units"]) for e in read_journal(output / "journal.jsonl") if e["event"] == "freeze"}


def trained_blocks(model: Path, adapter: Path) -> set[int]:
    """Blocks whose adapters differ from how LoRA starts, in a model that PEFT loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    weights = {name: weight for name, weight in loaded.named_parameters() if "lora_B" in name}
    assert len(weights) == 6 * 7  # all linear layers of all blocks
    return {int(name.split(".layers.")[1].split(".")[0]) for name, weight in weights.items() if torch.any(weight)}
