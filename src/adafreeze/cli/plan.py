"""``adafreeze plan``: will it fit, and what will it cost, before the run and without its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..sizes import readable
from ..train.adapter import AdapterArguments, peft_config
from ..train.arguments import parse_flags

if TYPE_CHECKING:
    from rich.table import Table

    from ..memory.plan import Plan, PlannedStep

__all__ = ["main"]


@dataclass
class PlanArguments:
    """What is planned; names as of ``adafreeze train``."""

    _argument_group_name = "run"

    model_name_or_path: str = field(metadata={"help": "A name on the Hub, a folder, or a config.json."})
    task: Literal[
        "text-classification",
        "regression",
        "question-answering",
        "causal-lm",
        "text-generation",
        "seq2seq-lm",
        "image-classification",
    ] = field(default="causal-lm", metadata={"help": "What the model learns to do."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Samples of a micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of an optimizer step."})
    max_seq_length: int = field(default=512, metadata={"help": "Tokens of the longest row."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Of the weights; auto: as the configuration says.", "aliases": ["--torch_dtype"]},
    )
    bf16: bool = field(default=False, metadata={"help": "Mixed precision, as TrainingArguments.bf16."})
    quantization: Literal["nf4", "int8"] | None = field(
        default=None, metadata={"help": "Weights of the blocks as bitsandbytes keeps them (an estimate)."}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "As TrainingArguments.optim."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Every block recomputes.", "aliases": ["--activation_checkpointing"]}
    )
    no_padding: bool = field(default=False, metadata={"help": "All rows are of one length: attention needs no mask."})
    target: Literal["cuda", "cpu"] = field(
        default="cuda", metadata={"help": "Where it will run: attention keeps other tensors there."}
    )
    device_memory: str | None = field(
        default=None, metadata={"help": "24GiB, or a name such as 'RTX 4090': what fits is said."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Access token of the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, plan, print."""
    import sys

    run, adapter = parse_flags(
        [PlanArguments, AdapterArguments],
        list(sys.argv[1:] if argv is None else argv),
        prog="adafreeze plan",
        description="Memory and FLOPs of a run before it starts: no weights are loaded, no accelerator is needed.",
    )
    from transformers.utils import logging

    from ..memory.plan import plan
    from ..tasks.weightless import PLANNED_TASKS

    logging.set_verbosity_error()  # what it says of use_cache when checkpointing is tried is of no use here
    planned = plan(
        run.model_name_or_path,
        peft_config(adapter, PLANNED_TASKS[run.task][1]),
        task=run.task,
        batch_size=run.per_device_train_batch_size,
        max_length=run.max_seq_length,
        dtype=run.dtype,
        mixed_precision=run.bf16,
        quantization=run.quantization,
        optim=run.optim,
        checkpointing=run.gradient_checkpointing,
        padding=not run.no_padding,
        accumulate=run.gradient_accumulation_steps > 1,
        target=run.target,
        device_memory=run.device_memory,
        revision=run.model_revision,
        cache_dir=run.cache_dir,
        token=run.token,
        trust_remote_code=run.trust_remote_code,
    )
    if run.json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        show(planned)
    return 0


def show(plan: Plan) -> None:
    """Print a plan as two tables, and below them what follows."""
    from rich.console import Console

    rows: list[tuple[str, PlannedStep]] = [(f"{step.prefix} of {plan.blocks}", step) for step in plan.steps]
    rows.append(("0, all recomputed", plan.checkpointed))
    if plan.steps[0] != plan.plain:
        rows.insert(0, ("0, none recomputed", plan.plain))
    settings = plan.settings
    tokens = "" if settings["task"] == "image-classification" else f" of {settings['max_length']} tokens"
    title = f"{plan.model}, micro-batches of {settings['batch_size']} samples{tokens}, {settings['target'].upper()}"
    console = Console(width=max(128, Console().width))
    parts = ("weights", "adapters", "gradients", "optimizer", "saved", "transient", "peak")
    memory = _table(f"Memory of a training step: {title}", (*parts, "of plain", "of check-\npointed"))
    flops = _table(
        "FLOPs of a micro-batch",
        ("forward", "backward", "both", "of plain", "of check-\npointed", "with the cache", "of plain"),
    )
    for name, step in rows:
        ratios = (step.peak / plan.plain.peak, step.peak / plan.checkpointed.peak)
        memory.add_row(name, *(readable(getattr(step, part)) for part in parts), *map("{:.2f}".format, ratios))
        flops.add_row(
            name,
            *map(_flops, (step.forward_flops, step.backward_flops, step.flops)),
            f"{step.flops / plan.plain.flops:.2f}",
            f"{step.flops / plan.checkpointed.flops:.2f}",
            _flops(step.cached_flops),
            f"{step.cached_flops / plan.plain.flops:.2f}",
        )
    console.print(memory)
    console.print("peak = weights + adapters + optimizer + saved + transient; gradients are part of transient.")
    console.print(flops)
    for line in _conclusions(plan):
        console.print(line, markup=False, highlight=False)


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("frozen prefix", *columns):
        table.add_column(name, justify="left" if name == "frozen prefix" else "right", no_wrap=True)
    return table


def _conclusions(plan: Plan) -> list[str]:
    lines = []
    if plan.limit is not None:
        plain, safe, leanest = (plan.micro_batches[name] for name in ("plain", "safe", "checkpointed"))
        lines.append(
            f"Of {plan.settings['device_memory']}, {readable(plan.limit)} can be used. Micro-batches that fit: {plain} "
            f'plain, {safe} with SafeConfig(), up to {leanest} with SafeConfig(memory_budget="auto"), which recomputes '
            "as needed."
        )
        if not leanest:
            lines.append("Nothing fits. " + "; ".join(plan.advice) + ".")
    if len(plan.steps) > 1 and not plan.steps[-1].prefix:
        lines.append("No block can join a frozen prefix, see below.")
    lines += [f"- {cause}" for cause in plan.causes]
    lines += [f"- Estimated: {part}." for part in plan.estimated]
    return lines


def _flops(flops: int) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} M"
