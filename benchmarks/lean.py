"""What lean LoRA layers and selective checkpointing save, compared with PEFT's own layers.

    python benchmarks/lean.py [--parts blocks plans] [--rounds 5] [-o benchmarks/results/lean.json]

Eight blocks with random weights, LoRA r = 8 on all linear layers, 2 × 256 tokens; adapters in fp32. Saved bytes of one
forward pass (each storage once, no parameters) per hidden unit, token and block; FLOPs of a step; whether the loss and
all gradients are PEFT's to the bit; and the CPU time of a step against PEFT's: median over rounds, in turn. All of it
for lean layers, and for lean layers in blocks that keep only results of matrix products and attention.

Then kinds of adapters that no lean layer exists for, under selective checkpointing alone, which recomputes what they
keep.

``plans``: what this makes of a whole step, by ``adafreeze.plan``: peaks (of MiniLM saved bytes) against plain PEFT,
with nothing frozen and at the default start.

The floor is what the gradients need at all of x: each different input of the adapted layers once, in the base's data
type, and one bit per element and layer for the dropout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import adafreeze
from adafreeze.costs import CountFlops, SavedBytes
from adafreeze.env import environment
from adafreeze.memory.checkpointing import Checkpointing
from adafreeze.model import find_stacks

HIDDEN, BLOCKS, ROWS, TOKENS = 512, 8, 2, 256


@dataclass(frozen=True)
class Shape:
    """A model. ``inputs``: widths of the different inputs of adapted layers, ``targets``: of all adapted layers."""

    family: str
    dtype: torch.dtype
    dropout: float
    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def floor(self) -> float:
        """Bytes per hidden unit, token and block."""
        bits = sum(self.targets) / 8 if self.dropout else 0.0
        return (sum(self.inputs) * self.dtype.itemsize + bits) / HIDDEN


KINDS: dict[str, PeftConfig] = {
    "DoRA, all linear layers": LoraConfig(r=8, target_modules="all-linear", use_dora=True),
    "OFT, all linear layers": OFTConfig(oft_block_size=32, target_modules="all-linear"),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA, r = 256, attention": VeraConfig(r=256, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "LoHa, query and value": LoHaConfig(r=8, target_modules=["q_proj", "v_proj"]),
}
GATED, WIDE = 1792, 2048
LLAMA = (HIDDEN, HIDDEN, HIDDEN, GATED), (*[HIDDEN] * 6, GATED)
BERT = (HIDDEN, HIDDEN, HIDDEN, WIDE), (*[HIDDEN] * 5, WIDE)
SHAPES = {
    "Llama shape, bf16": Shape("llama", torch.bfloat16, 0.0, *LLAMA),
    "Llama shape, fp32, LoRA dropout 0.1": Shape("llama", torch.float32, 0.1, *LLAMA),
    "BERT shape, bf16": Shape("bert", torch.bfloat16, 0.0, *BERT),
}


def make(shape: Shape, adapter: PeftConfig | None = None) -> PeftModel:
    """The model, with adapters that do something; LoRA by default."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 8}
    if shape.family == "llama":
        base: nn.Module = LlamaModel(
            LlamaConfig(**size, intermediate_size=GATED, num_key_value_heads=2, vocab_size=100, use_cache=False)
        )
    else:
        drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**size, intermediate_size=WIDE, vocab_size=100, **drops)
        base = BertModel(config, add_pooling_layer=False)
    lora = LoraConfig(r=8, target_modules="all-linear", lora_dropout=shape.dropout)
    model = get_peft_model(base.to(shape.dtype), adapter or lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def step(model: PeftModel) -> list[torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 100
    loss = model(input_ids=ids).last_hidden_state.float().pow(2).mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def measure(model: PeftModel, context: AbstractContextManager[Any]) -> dict[str, Any]:
    """Saved bytes and FLOPs of a step, and its results."""
    with context:
        with SavedBytes(model) as saved:
            results = step(model)
        with CountFlops() as count:
            step(model)
    return {"results": results, "flops": count.total, "saved": saved.total / (ROWS * TOKENS * HIDDEN * BLOCKS)}


@contextmanager
def selective(model: PeftModel) -> Iterator[None]:
    """Selective checkpointing of every block."""
    checkpointing = Checkpointing(model, find_stacks(model))
    checkpointing.recomputed = checkpointing.all_selective
    checkpointing.install()
    yield
    checkpointing.restore()


@contextmanager
def both(model: PeftModel) -> Iterator[None]:
    """Lean layers, and selective checkpointing of every block."""
    with adafreeze.lean(model), selective(model):
        yield


def timed(model: PeftModel, ours: Callable[[PeftModel], AbstractContextManager[Any]], rounds: int) -> float:
    """CPU time of our step against PEFT's, median of the ratios within a round."""

    def seconds(context: AbstractContextManager[Any]) -> float:
        with context:
            began = time.process_time()
            step(model)
            return time.process_time() - began

    seconds(nullcontext())
    return statistics.median(seconds(ours(model)) / seconds(nullcontext()) for _ in range(rounds))


OURS: dict[str, Callable[[PeftModel], AbstractContextManager[Any]]] = {
    "lean": adafreeze.lean,
    "lean, selective": both,
}


EVERY = [*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")]
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
)  # fmt: skip
MINILM = BertConfig(
    hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, num_labels=2,
    architectures=["BertForSequenceClassification"],
)  # fmt: skip
BERT_LAYERS = ["query", "key", "value", "intermediate.dense", "output.dense"]


def planned() -> dict[str, dict[str, Any]]:
    """Ratios of whole steps, without padding for the Llama; ``peft`` in bytes."""
    large: dict[str, Any] = {"max_length": 1024, "padding": False}
    small: dict[str, Any] = {"task": "text-classification", "batch_size": 32, "max_length": 64}
    every, few = (LoraConfig(r=16, target_modules=targets) for targets in (EVERY, ["q_proj", "v_proj"]))
    bert = LoraConfig(r=8, target_modules=BERT_LAYERS)
    cases: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
        "Llama-3.1-8B, 1 × 1,024": (LLAMA_8B, every, "peak", {**large, "batch_size": 1}),
        "Llama-3.1-8B, 4 × 1,024": (LLAMA_8B, every, "peak", {**large, "batch_size": 4}),
        "Llama-3.1-8B, 1 × 1,024, query and value": (LLAMA_8B, few, "peak", {**large, "batch_size": 1}),
        "MiniLM, saved": (MINILM, bert, "saved", small),
        "MiniLM, saved, CPU": (MINILM, bert, "saved", {**small, "target": "cpu"}),
    }
    found = {}
    for name, (config, lora, part, settings) in cases.items():
        made = adafreeze.plan(config, lora, dtype="bfloat16", **settings)
        theirs = getattr(made.plain, part)
        found[name] = {"peft": theirs}
        for place, label in enumerate(("nothing frozen", "a third frozen")):
            found[name][label] = getattr(made.steps[place], part) / theirs
            found[name][f"{label}, selective"] = getattr(made.selective[place], part) / theirs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["blocks", "plans"], default=["blocks", "plans"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/lean.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    if "plans" in options.parts:
        found["plans"] = planned()
        for name, row in found["plans"].items():
            print(name, *(f"{label}: {value:.3f}" for label, value in row.items() if label != "peft"), sep="; ")
    table = Table("", "", "PEFT", "ours", "ours / PEFT", "floor", "FLOPs", "time", "equal to the bit")
    arms = [(name, label, shape, None, context) for name, shape in SHAPES.items() for label, context in OURS.items()]
    base = "Llama shape, bf16"
    llama = SHAPES[base]
    arms += [(f"{base}, {kind}", "selective", llama, adapter, selective) for kind, adapter in KINDS.items()]
    for name, label, shape, adapter, context in arms if "blocks" in options.parts else ():
        model = make(shape, adapter)
        theirs, ours = measure(model, nullcontext()), measure(model, context(model))
        same = all(map(torch.equal, theirs["results"], ours["results"]))
        row = {
            "peft": theirs["saved"],
            "ours": ours["saved"],
            "ratio": ours["saved"] / theirs["saved"],
            "floor": None if adapter else shape.floor,
            "flops": ours["flops"] / theirs["flops"],
            "time": timed(model, context, options.rounds),
            "equal": same and len(theirs["results"]) == len(ours["results"]),
        }
        found[f"{name}: {label}"] = row
        floor = "" if adapter else f"{shape.floor:.1f}"
        numbers = [f"{row[key]:.1f}" for key in ("peft", "ours")] + [f"{row['ratio']:.3f}", floor]
        table.add_row(
            name, label, *numbers, f"{row['flops']:.3f}", f"{row['time']:.2f}", "yes" if row["equal"] else "no"
        )
    options.output.write_text(json.dumps({**found, "environment": environment()}, indent=1) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
