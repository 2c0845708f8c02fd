"""What the freezes of measured runs come to at the sizes of the paper, counted without weights or accelerator.

    python benchmarks/paper_resources.py [-o benchmarks/results/paper_resources.json]
    python benchmarks/paper_resources.py --houlsby [-o ...]    # with transformers 4.57 and adapters 1.3

LoRA through PEFT, and Houlsby adapters (``double_seq_bn``, reduction 16) through AdapterHub, in BERT, RoBERTa, GPT-2
and Llama-2 of published sizes, built without memory; one training step at each prefix depth is run on tensors without
data, as by ``adafreeze plan``, for a CUDA device. Each command writes its part of the file, and leaves the other's.

A pattern is how a run froze: after which share of its steps which share of its blocks. ``demo`` is what SafeConfig()
found in the run of benchmarks/results/demo.json; ``budget`` is what benchmarks/budget.py sets by hand, two thirds of
the blocks after a fifth of the run. A model of L blocks freezes round(share × L) of them, at most L − 1, at the same
share of the run. That is a mapping and no measurement: where a larger model would freeze, no run of it has shown.

Saved: bytes that autograd keeps of the forward pass. Step: all that a training step holds at its fullest moment,
weights and optimizer state included. Mean: over the steps of the run; after: when the last block has frozen. With the
cache, a sample's forward pass starts at the depth of the prefix when it last came, an epoch before; measuring (at most
1 % of the plain run) is left out. First: of the first steps, the peak of the run. Under the budget no step holds more
than the first after the first freeze by score, or than one in which every live block recomputes; its FLOPs, with the
cache, are at most those of a run in which all of them do until that freeze. The paper's figures are averages over its
tasks, of runs whose freezes it does not list: they stand beside, and are not reproduced.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, RobertaConfig
from transformers.utils import logging

from adafreeze.env import environment
from adafreeze.memory._planner import PlannedStep, StepPlanner, Way
from adafreeze.sizes import readable
from adafreeze.tasks.weightless import adapted, build, example_inputs

RESULTS = Path(__file__).parent / "results"
# Son et al., NAACL 2025, abstract: against plain adapter-tuning.
PAPER = {"memory": 1 - 0.4285, "flops": 1 - 0.3459}

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BERT = {"vocab_size": 30522, "max_position_embeddings": 512}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50257, "pad_token_id": 50256}
LLAMA2 = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model of the paper: what it is fine-tuned for, and in what micro-batches."""

    config: PretrainedConfig
    task: str
    targets: tuple[str, ...]
    rows: int
    length: int
    r: int = 8
    dtype: torch.dtype = torch.float32


GLUE: tuple[Any, ...] = ("text-classification", ("query", "value"), 32, 128)
CASES = {
    "BERT-base": Case(BertConfig(**BASE, **BERT), *GLUE),
    "BERT-large": Case(BertConfig(**LARGE, **BERT), *GLUE),
    "RoBERTa-base": Case(RobertaConfig(**BASE, **ROBERTA), *GLUE),
    "RoBERTa-large": Case(RobertaConfig(**LARGE, **ROBERTA), *GLUE),
    "GPT-2 medium": Case(GPT2Config(**MEDIUM), "causal-lm", ("c_attn",), 8, 512, r=4),
    "Llama-2-7B": Case(LlamaConfig(**LLAMA2), "causal-lm", ("q_proj", "v_proj"), 4, 512, dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Pattern:
    """How a run froze: after these shares of its steps, these shares of its blocks."""

    source: str
    steps: int
    epochs: int
    freezes: tuple[tuple[float, float], ...]

    def depths(self, blocks: int) -> list[int]:
        """Blocks in the prefix at each step, in a model of ``blocks``."""
        found = [0] * self.steps
        for after, share in self.freezes:
            start = round(after * self.steps)
            found[start:] = [min(round(share * blocks), blocks - 1)] * (self.steps - start)
        return found


def patterns() -> dict[str, Pattern]:
    (safe,) = (arm for arm in json.loads((RESULTS / "demo.json").read_text())["arms"] if arm["name"] == "safe")
    freezes = tuple((step / safe["steps"], frozen / safe["blocks"]) for step, frozen in safe["freezes"])
    by_hand = json.loads((RESULTS / "budget.json").read_text())["runs"]["SAFE"]["prefix"]
    return {
        "demo": Pattern("results/demo.json, arm safe", safe["steps"], safe["epochs"], freezes),
        "budget": Pattern("results/budget.json, set by hand", 480, 6, ((0.2, by_hand / 12),)),
    }


def network(case: Case, houlsby: bool) -> torch.nn.Module:
    model = build(case.config, case.task, case.dtype)
    if not houlsby:
        from peft import LoraConfig

        return adapted(model, LoraConfig(r=case.r, lora_alpha=16, target_modules=list(case.targets)))
    import adapters

    with torch.device("meta"):
        adapters.init(model)
        model.add_adapter("task", config="double_seq_bn")
    model.train_adapter("task")
    return model.train()


def steps_at(
    case: Case, houlsby: bool, depths: set[int], starts: set[int]
) -> tuple[dict[int, PlannedStep], dict[int, PlannedStep]]:
    """A step at each of ``depths``, and, at those of ``starts``, one with every live block checkpointed."""

    def batch(rows: int, _: torch.nn.Module) -> dict[str, Any]:
        return example_inputs(case.config, case.task, rows, case.length, padded=True, dtype=case.dtype)

    with StepPlanner(network(case, houlsby), batch, target="cuda") as planner:
        found, recomputed = {}, {}
        for depth in sorted(depths):
            planner.freeze(planner.lowest(depth / len(planner.blocks)))
            found[depth] = planner.step(case.rows)
            assert found[depth].prefix == depth
            if depth in starts:
                recomputed[depth] = planner.step(case.rows, Way(False, "full"))
    return found, recomputed


def of_run(
    pattern: Pattern, blocks: int, steps: dict[int, PlannedStep], recomputed: dict[int, PlannedStep]
) -> dict[str, Any]:
    """Bytes and FLOPs of a whole run, against the plain run's."""
    by_step = pattern.depths(blocks)
    plain, count = steps[0], len(by_step)
    per_epoch = count // pattern.epochs
    last = steps[by_step[-1]]
    of_block = (last.flops - last.cached_flops) / last.prefix  # the forward pass of one
    # What the cache holds of a sample: the prefix as it was when it last came, on average over the epoch before.
    held = [
        sum(by_step[start - per_epoch : start]) / per_epoch if (start := i // per_epoch * per_epoch) else 0.0
        for i in range(count)
    ]
    looked_up = of_block * sum(held) / count
    at_start = by_step[0]
    first_frozen = next(depth for depth in by_step if depth > at_start)
    budget = max(steps[first_frozen].peak, recomputed[at_start].peak)
    flops = sum(steps[depth].flops for depth in by_step) / count
    recomputing = sum((steps[depth] if depth > at_start else recomputed[at_start]).flops for depth in by_step) / count
    return {
        "frozen": sorted(set(by_step)),
        "saved_mean": sum(steps[depth].saved for depth in by_step) / count / plain.saved,
        "saved_after": last.saved / plain.saved,
        "step_mean": sum(steps[depth].peak for depth in by_step) / count / plain.peak,
        "step_after": last.peak / plain.peak,
        "peak": steps[at_start].peak / plain.peak,
        "flops": flops / plain.flops,
        "flops_with_cache": (flops - looked_up) / plain.flops,
        "peak_under_budget": budget / plain.peak,
        "flops_under_budget_at_most": (recomputing - looked_up) / plain.flops,
    }


def measure(houlsby: bool) -> dict[str, Any]:
    results = {}
    for name, case in CASES.items():
        if houlsby and name.startswith("Llama"):
            continue  # in the paper with LoRA
        blocks, known = case.config.num_hidden_layers, patterns()
        by_step = [pattern.depths(blocks) for pattern in known.values()]
        starts = {0, *(depths[0] for depths in by_step)}
        steps, recomputed = steps_at(case, houlsby, {0}.union(*by_step), starts)
        results[name] = {
            "micro_batch": [case.rows, case.length],
            "blocks": blocks,
            "plain": vars(steps[0]),
            "recomputed": vars(recomputed[0]),
            "patterns": {key: of_run(pattern, blocks, steps, recomputed) for key, pattern in known.items()},
        }
    return results


def table(title: str, results: dict[str, Any]) -> Table:
    made = Table(title=f"{title}; against plain adapter-tuning = 1", title_justify="left")
    columns = ("model", "batch", "plain: step", "saved", "frozen", "saved: mean", "after", "step: mean", "after")
    for column in (*columns, "first", "FLOPs", "with cache", "budget: peak", "FLOPs, at most"):
        made.add_column(column, justify="left" if column == "model" else "right")
    for name, found in results.items():
        for key, run in found["patterns"].items():
            made.add_row(
                f"{name}, {key}",
                "×".join(map(str, found["micro_batch"])),
                readable(found["plain"]["peak"]),
                readable(found["plain"]["saved"]),
                f"{', '.join(str(depth) for depth in run['frozen'] if depth)} of {found['blocks']}",
                *(f"{value:.2f}" for name, value in run.items() if name != "frozen"),
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--houlsby", action="store_true", help="AdapterHub's bottleneck adapters in the place of LoRA")
    parser.add_argument("-o", "--output", type=Path, default=None)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    part = "houlsby" if arguments.houlsby else "lora"
    results = measure(arguments.houlsby)
    Console(width=190).print(table("Houlsby adapters" if arguments.houlsby else "LoRA", results))
    print(f"The paper reports, on average over its tasks: memory {PAPER['memory']:.2f}, FLOPs {PAPER['flops']:.2f}.")
    if arguments.output is not None:
        written = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
        written["paper"] = PAPER
        written["patterns"] = {key: vars(pattern) for key, pattern in patterns().items()}
        written[part] = {"environment": environment(), "models": results}
        arguments.output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
