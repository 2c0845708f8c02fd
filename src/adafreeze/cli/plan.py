"""``adafreeze plan``: will it fit, and what will it cost, before the run and without its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Literal

from rich.console import Console
from transformers.utils import logging

from ..memory.plan import NF4, Plan, PlannedStep, plan
from ..sizes import readable
from ..tasks.adapters import config_from_flags
from ..tasks.weightless import PLANNED_TASKS
from ..train.arguments import AdapterArguments
from ..train.parser import Parser, build, flag
from ._table import number_table

__all__ = ["main"]


@dataclass
class PlanArguments:
    """The planned run; names as of ``adafreeze train``."""

    _argument_group_name = "run"

    model_name_or_path: str = flag("A name on the Hub, a folder, or a config.json.", MISSING)
    task: str = flag("What the model learns to do.", "causal-lm", choices=PLANNED_TASKS)
    per_device_train_batch_size: int = flag("Samples of a micro-batch.", 8)
    gradient_accumulation_steps: int = flag("Micro-batches of an optimizer step.", 1)
    max_seq_length: int = flag("Tokens of the longest row.", 512)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "Dtype of the weights; auto: as in the configuration.", "auto", aliases=["--torch_dtype"]
    )
    bf16: bool = flag("Mixed precision, like TrainingArguments.bf16.", False)
    quantization: Literal["nf4", "int8"] | None = flag("Quantize the blocks like bitsandbytes (an estimate).")
    optim: str = flag("Like TrainingArguments.optim.", "adamw_torch_fused")
    gradient_checkpointing: bool = flag("Checkpoint every block.", False, aliases=["--activation_checkpointing"])
    no_padding: bool = flag("All rows have one length: attention needs no mask.", False)
    target: Literal["cuda", "cpu"] = flag("Device of the run; attention saves different tensors on each.", "cuda")
    device_memory: str | None = flag("24GiB, or a name such as 'RTX 4090': print the batch sizes that fit.")
    json: bool = flag("Print JSON.", False)
    model_revision: str | None = flag("Branch, tag or commit on the Hub.")
    cache_dir: str | None = flag("Folder for downloads.")
    token: str | None = flag("Access token for the Hub.")
    trust_remote_code: bool = flag("Run code that comes with the model.", False)


def main(argv: Sequence[str]) -> None:
    """Parse, plan, print."""
    parser = Parser(
        PlanArguments,
        AdapterArguments,
        prog="adafreeze plan",
        description="Memory and FLOPs of a run before it starts: no weights are loaded, no accelerator is needed.",
    )
    values = vars(parser.parse_args(argv))
    run = build(PlanArguments, values)
    logging.set_verbosity_error()  # hides transformers' warning that checkpointing turns use_cache off
    planned = plan(
        run.model_name_or_path,
        config_from_flags(vars(build(AdapterArguments, values)), PLANNED_TASKS[run.task][1]),
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
        _show(planned)


def _show(plan: Plan) -> None:
    selective = dict(zip(plan.steps, plan.selective, strict=False))  # empty where the model does not allow it
    rows: list[tuple[str, PlannedStep]] = [(f"{step.prefix} of {plan.blocks}", step) for step in plan.steps]
    away = dict(zip(plan.steps, plan.offloaded, strict=True))
    if plan.checkpointed != plan.plain:
        rows.append(("all checkpointed", plan.checkpointed))
    if plan.steps[0] != plan.plain:
        rows.insert(0, ("plain PEFT", plan.plain))
    settings = plan.settings
    tokens = "" if settings["task"] == "image-classification" else f" of {settings['max_length']} tokens"
    way = ", gradient checkpointing" if settings["checkpointing"] else ""
    title = (
        f"{plan.model}, micro-batches of {settings['batch_size']} samples{tokens}{way}, {settings['target'].upper()}"
    )
    console = Console(width=max(158, Console().width))
    parts = ("weights", "adapters", "gradients", "optimizer", "saved", "transient", "peak")
    also = ("selective", "of plain")
    memory = number_table(
        f"Memory of a training step: {title}", "frozen prefix", *parts, "of plain", *also, "offload", "of plain"
    )
    columns = ("forward", "backward", "both", "of plain", "with the cache", "of plain", *also)
    flops = number_table("FLOPs of a micro-batch", "frozen prefix", *columns)
    for name, step in rows:
        light, moved = selective.get(step), away.get(step)
        memory.add_row(
            name,
            *(readable(getattr(step, part)) for part in parts),
            f"{step.peak / plan.plain.peak:.2f}",
            *(("", "") if light is None else (readable(light.peak), f"{light.peak / plan.plain.peak:.2f}")),
            *(() if moved is None else (readable(moved.job), f"{moved.job / plan.plain.peak:.2f}")),
        )
        flops.add_row(
            name,
            *map(_flops, (step.forward_flops, step.backward_flops, step.flops)),
            f"{step.flops / plan.plain.flops:.2f}",
            _flops(step.cached_flops),
            f"{step.cached_flops / plan.plain.flops:.2f}",
            *(() if light is None else (_flops(light.flops), f"{light.flops / plan.plain.flops:.2f}")),
        )
    console.print(memory)
    console.print("peak = weights + adapters + optimizer + saved + transient; gradients are part of transient.")
    console.print('selective: the peak with SafeConfig(checkpointing="selective").', highlight=False)
    with_it = "gradient checkpointing" if settings["checkpointing"] else "selective checkpointing"
    console.print(
        f'offload: the peak of the whole run with {with_it}, offload="cpu" and fill="before".', highlight=False
    )
    console.print(flops)
    for line in _conclusions(plan):
        console.print(line, markup=False, highlight=False)


def _conclusions(plan: Plan) -> list[str]:
    lines = []
    if plan.limit is not None:
        fits = plan.micro_batches
        way = " with gradient checkpointing" if plan.settings["checkpointing"] else ""
        selective = f', {fits["selective"]} with checkpointing="selective"' if "selective" in fits else ""
        lines.append(
            f"Of {plan.settings['device_memory']}, {readable(plan.limit)} can be used. Micro-batches that fit{way}: "
            f"{fits['plain']} plain, {fits['safe']} with SafeConfig(){selective}, up to {fits['checkpointed']} with "
            'memory_budget="auto", which recomputes as needed.'
        )
        if plan.proposal is not None:
            flags = plan.proposal.removeprefix(NF4).strip()
            how = f"adafreeze train with {flags}" if flags else "adafreeze train as it is"
            if bits := plan.settings["quantization"] or ("nf4" if flags != plan.proposal else None):
                how = f"{bits} weights, from BitsAndBytesConfig in your own script, with {flags or 'the defaults'}"
            lines.append(f"The cheapest way to fit {plan.settings['batch_size']} samples: {how}.")
        if not fits["checkpointed"]:
            lines.append("Nothing fits. " + "; ".join(plan.advice) + ".")
    if len(plan.steps) > 1 and not plan.steps[-1].prefix:
        lines.append("No block can join a frozen prefix, see below.")
    half = next((one for one in plan.offloaded if one is not None and 2 * one.prefix >= plan.blocks), None)
    if half is not None and half.offloaded:
        lines.append(
            f"- With {half.prefix} of {plan.blocks} blocks frozen from the start and their weights away, the device "
            f"holds {readable(half.filling)} while states are filled and {readable(half.peak)} in training; "
            f"{readable(half.offloaded)} of weights are on the host or on disk (--fill before --offload cpu)."
        )
    lines += [f"- {cause}" for cause in plan.causes]
    lines += [f"- Estimated: {part}." for part in plan.estimated]
    return lines


def _flops(flops: int) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} M"
