"""``plan``: memory and FLOPs of a run, from shapes alone."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import AT_START
from ..costs.devices import GPUS, usable_memory
from ..errors import AdafreezeError, ConfigError, ModelError, error_line, warn
from ..model.batch import rows_of
from ..model.blocks import users_class
from ..sizes import readable
from ..tasks.weightless import PLANNED_TASKS, adapted, build, configuration, example_inputs
from ._planner import QUANTIZED, PlannedStep, StepPlanner, Way
from .checkpointing import CAN_BE_SELECTIVE
from .optimizer import optimizer_names
from .rehearsal import failing_module, largest_that_fits

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

__all__ = ["GPUS", "Plan", "PlannedStep", "plan"]

# Shares of the blocks frozen from the start that are planned beside that of SafeConfig(), and one block live.
DEEPER = (0.5, 2 / 3, 0.75)
SELECTIVE = Way(lean=True, checkpointing="selective")


@dataclass(frozen=True)
class Plan:
    """Predicted memory and FLOPs of a run.

    Attributes:
        model: its class.
        blocks: in all stacks.
        steps: of SafeConfig(), so with lean adapters; one per prefix depth, ascending: none, that of SafeConfig() at
            the start, those of DEEPER, the deepest.
        selective: the same steps with ``SafeConfig(checkpointing="selective")``; empty where torch is too old for it,
            or the model's own code fails under it.
        offloaded: the steps with ``SafeConfig(offload="cpu", fill="before")`` and selective checkpointing, or full if
            that was asked for; None where nothing is frozen. Their ``job`` is the peak of the whole run.
        plain: plain adapter-tuning: PEFT's layers, nothing frozen, activation checkpointing only if it was asked for.
        checkpointed: the same with activation checkpointing of every block.
        limit: usable bytes of the device; None without a device.
        micro_batches: samples that fit: ``"plain"``, ``"safe"`` (SafeConfig() at the start), ``"selective"`` (the same,
            selectively checkpointed, where no other checkpointing was asked for), and ``"checkpointed"``, the most that
            a memory budget can reach. Empty without a device.
        causes: what costs avoidable memory, each with its fix.
        advice: what to change if not even one sample fits.
        proposal: the flags of the cheapest way to fit the batch on the device; None if none was found, or without a
            device.
        estimated: parts that are estimated, not counted.
        settings: the arguments of ``plan``.
    """

    model: str
    blocks: int
    steps: tuple[PlannedStep, ...]
    selective: tuple[PlannedStep, ...]
    offloaded: tuple[PlannedStep | None, ...]
    plain: PlannedStep
    checkpointed: PlannedStep
    limit: int | None
    micro_batches: Mapping[str, int]
    causes: tuple[str, ...]
    advice: tuple[str, ...]
    proposal: str | None
    estimated: tuple[str, ...]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def plan(
    model: str | os.PathLike[str] | PretrainedConfig | nn.Module,
    adapter: PeftConfig | None = None,
    *,
    task: str = "causal-lm",
    batch_size: int = 8,
    max_length: int = 512,
    inputs: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    mixed_precision: bool = False,
    quantization: str | None = None,
    optim: str = "adamw_torch_fused",
    checkpointing: bool = False,
    padding: bool = True,
    accumulate: bool = False,
    autocast_adapter_dtype: bool = True,
    target: str = "cuda",
    device_memory: int | str | None = None,
    **hub: Any,
) -> Plan:
    """Predict memory and FLOPs of a run from shapes alone, without weights and without an accelerator.

    Builds the model on ``meta``, adds the adapter and runs the training step on tensors without data, once for each
    prefix depth: the model's own code with torch's autograd, counted to the byte.

    Args:
        model: a name on the Hub, a folder, the path of a config.json, a configuration, or a module with or without
            adapters; a module is not changed.
        adapter: for ``peft.get_peft_model``; None if the module has adapters.
        task: ``"text-classification"``, ``"regression"``, ``"question-answering"``, ``"causal-lm"``,
            ``"seq2seq-lm"`` or ``"image-classification"``; ignored for a module with ``inputs``.
        batch_size: samples per micro-batch.
        max_length: tokens of the longest sample.
        inputs: a batch for a module's forward; only shapes and dtypes matter. Replaces the inputs that follow from
            ``task``, ``batch_size`` and ``max_length``.
        dtype: of the weights; ``"auto"`` reads it from the configuration.
        mixed_precision: bfloat16 autocast, like ``TrainingArguments.bf16``.
        quantization: ``"nf4"`` or ``"int8"``: estimate the linear layers of the blocks as bitsandbytes stores them.
        optim: as in ``TrainingArguments``.
        checkpointing: activation checkpointing of all blocks above the prefix.
        padding: batches are padded, so attention needs a mask.
        accumulate: gradients are accumulated over micro-batches, so they exist before the forward pass.
        autocast_adapter_dtype: as in ``peft.get_peft_model``: float32 adapters on a half-precision model.
        target: ``"cuda"`` or ``"cpu"``, whose attention kernels save different tensors.
        device_memory: bytes, a text such as ``"24GiB"``, or a name in ``GPUS``. Reserves 1 GiB of CUDA memory for
            the context, workspaces and fragmentation.
        hub: ``revision``, ``cache_dir``, ``token`` and ``trust_remote_code`` for the configuration.

    Raises:
        ConfigError: a setting is unknown or out of range.
        ModelError: the model does not exist, cannot be built, or has no adapters in its blocks.
    """
    rows = batch_size if inputs is None else rows_of(inputs)
    settings = {
        "task": task,
        "batch_size": rows,
        "max_length": max_length,
        "dtype": str(dtype),
        "mixed_precision": mixed_precision,
        "quantization": quantization,
        "optim": optim,
        "checkpointing": checkpointing,
        "padding": padding,
        "target": target,
        "device_memory": device_memory,
    }
    _check("task", task, PLANNED_TASKS)
    _check("target", target, ("cpu", "cuda"))
    _check("quantization", quantization, (None, *QUANTIZED))
    _check("optim", optim, optimizer_names())
    limit = usable_memory(device_memory, target)
    if isinstance(dtype, str):
        _check("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    weights = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else configuration(model, **hub)

    def batch(rows: int, module: nn.Module) -> dict[str, Any]:
        if inputs is not None:
            return {name: _with_rows(value, rows, rows_of(inputs)) for name, value in inputs.items()}
        own = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return example_inputs(config, task, rows, max_length, padded=padding, dtype=own)  # type: ignore[arg-type]

    def planned(device: str, target: str, fake: bool, quantization: str | None = quantization) -> Plan:
        module = model if isinstance(model, nn.Module) else build(config, task, weights, device)  # type: ignore[arg-type]
        planner = StepPlanner(
            module if adapter is None else adapted(module, adapter, autocast_adapter_dtype),
            batch,
            optimizer=optim,
            mixed_precision=mixed_precision,
            quantization=quantization,
            accumulate=accumulate,
            target=target,
            fake=fake,
            rows=1 if inputs is None else rows,  # given tensors may not be divisible by sample
        )
        with planner:
            return _plan(planner, rows, checkpointing, limit, settings, given=inputs is not None)

    try:
        found = planned("meta", target, fake=True)
        if limit is None or found.proposal is not None or quantization is not None or target != "cuda":
            return found
        in_nf4 = planned("meta", target, fake=True, quantization="nf4").proposal
        return dataclasses.replace(found, proposal=None if in_nf4 is None else _flags(NF4, in_nf4))
    except AdafreezeError:
        raise
    except Exception as error:  # from the model's own code, on tensors without data
        warn(
            f"{failing_module(error)} cannot be built or run without data ({error_line(error)}): one real step at each "
            "depth is measured instead, on the CPU and with random weights.",
            fix="Nothing, if the model fits into host memory; else plan a smaller configuration of it.",
        )
    try:
        return planned("cpu", "cpu", fake=False)
    except AdafreezeError:
        raise
    except Exception as error:
        names = inputs if inputs is not None else batch(1, nn.Linear(1, 1))
        raise ModelError(
            f"A training step of the model with {', '.join(names)} fails in {failing_module(error)}: "
            f"{error_line(error)}",
            fix="Correct --task, add what config.json lacks, or call adafreeze.plan(model, inputs=batch) with a real "
            "batch.",
        ) from error


def _plan(
    planner: StepPlanner, rows: int, checkpointing: bool, limit: int | None, settings: Mapping[str, Any], *, given: bool
) -> Plan:
    own = Way(True, "full" if checkpointing or planner.was_checkpointed else None)
    without = own._replace(lean=False)
    plain, checkpointed = planner.step(rows, without), planner.step(rows, Way(False, "full"))
    causes = list(planner.causes(rows))
    micro_batches = {}

    def fit(name: str, way: Way) -> None:
        if limit is None:
            return
        known = planner.step(rows, way)

        def peak(count: int) -> int:
            return planner.step(count, way).peak

        held = known.peak - known.saved - known.transient
        try:
            micro_batches[name] = largest_that_fits(peak, rows, known.peak, held, limit)
        except Exception as error:
            if not given:
                raise
            warn(
                f"How many samples fit is not known: inputs= work only with {rows} samples ({error_line(error)}).",
                fix="Plan with a batch of the size that the run will use.",
            )

    fit("plain", without)
    steps, selective = [planner.step(rows, own)], []
    offloaded: list[PlannedStep | None] = [None]
    if CAN_BE_SELECTIVE:
        try:
            selective.append(planner.step(rows, SELECTIVE))
        except Exception as error:  # such as a product that the model's own code changes in place
            causes.append(f"No selective checkpointing: {failing_module(error)} fails under it ({error_line(error)}).")
    away = (SELECTIVE if selective and own.checkpointing is None else own)._replace(offload=True)
    # What SafeConfig() freezes before step 0: nothing if the adapters move ranks, as AdaLoRA does.
    at_start = [] if planner.freezer.backend.moves_ranks else planner.lowest(AT_START)
    choices: dict[frozenset[str], str | None] = {
        frozenset(planner.lowest(share)): f"--freeze_at_start {share:.2g}" for share in DEEPER
    }
    choices |= {frozenset(planner.lowest(1)): None, frozenset(at_start): ""}  # only the topmost block is too little
    ways: list[tuple[int, str, int]] = []  # how much it costs: rank, then the order here; flags; peak
    if not at_start:
        ways += _ways("", steps[0], selective[0] if selective else None, None, own)
    for names, flag in sorted(choices.items(), key=lambda choice: len(choice[0])):
        if not planner.freezer.frozen.issuperset(names):
            planner.freeze(names)
            steps.append(planner.step(rows, own))
            if selective:
                selective.append(planner.step(rows, SELECTIVE))
            offloaded.append(planner.step(rows, away))
            if flag is not None:
                ways += _ways(flag, steps[-1], selective[-1] if selective else None, offloaded[-1], own)
        if names == frozenset(at_start):
            fit("safe", own)
            fit("checkpointed", Way(True, "full"))
            if selective and own.checkpointing is None:
                fit("selective", SELECTIVE)
    cheapest = [way[1:] for way in sorted(ways, key=lambda way: way[0])]
    estimated = []
    if planner.quantization is not None:
        estimated.append(f"weights in {planner.quantization}, from their bytes per element")
    if planner.target != settings["target"]:
        estimated.append("attention and dropout, as measured on the CPU")
    if planner.mixed_precision and settings["target"] == "cuda":
        estimated.append("mixed precision, from what autocast casts on the CPU")
    return Plan(
        model=users_class(planner.module),
        blocks=len(planner.blocks),
        steps=tuple(steps),
        selective=tuple(selective),
        offloaded=tuple(offloaded),
        plain=plain,
        checkpointed=checkpointed,
        limit=limit,
        micro_batches=micro_batches,
        causes=tuple(causes),
        advice=tuple(_advice(checkpointed, rows, limit, planner.quantization)),
        proposal=next((flags for flags, peak in cheapest if limit is not None and peak <= limit), None),
        estimated=tuple(estimated),
        settings=settings,
    )


def _ways(
    flag: str, step: PlannedStep, selective: PlannedStep | None, offloaded: PlannedStep | None, own: Way
) -> Iterator[tuple[int, str, int]]:
    """Settings at one depth of the start, with their rank by what they cost, and the peak of a run with them."""
    light = "--gradient_checkpointing" if own.checkpointing == "full" else ""
    yield (2 if flag else 0), _flags(flag, light), step.peak
    if selective is not None and own.checkpointing is None:
        light = "--checkpointing selective"
        yield (3 if flag else 1), _flags(flag, light), selective.peak
    if offloaded is not None:
        yield 4, _flags(flag, light, "--fill before --offload cpu"), offloaded.job


NF4 = "--quantization nf4"  # of plan: training takes it as transformers' BitsAndBytesConfig


def _flags(*flags: str) -> str:
    return " ".join(filter(None, flags))


def _advice(leanest: PlannedStep, rows: int, limit: int | None, quantization: str | None) -> Iterator[str]:
    """What to change if checkpointing all blocks is not enough."""
    if limit is None or leanest.peak <= limit:
        return
    if rows > 1:
        yield f"--per_device_train_batch_size 1 --gradient_accumulation_steps {rows}"
    yield "a smaller --max_seq_length"
    if quantization is None and leanest.weights > 0.4 * limit:
        yield "--quantization nf4 (QLoRA)"
    if leanest.weights > limit:
        yield f"a smaller model: the weights alone take {readable(leanest.weights)}"


def _check(name: str, value: Any, known: Iterable[Any]) -> None:
    if value not in known:
        names = [str(one) for one in known if one is not None]
        close = difflib.get_close_matches(str(value), names, n=1) or names
        raise ConfigError(f"--{name} is {value!r}, not one of {', '.join(names)}.", fix=f"--{name} {close[0]}")


def _with_rows(value: Any, rows: int, before: int) -> Any:
    """An input for ``rows`` samples instead of ``before``; keeps the number of entries per sample."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) % before:
        return value
    length = len(value) // before * rows
    if value.is_meta:
        return torch.empty((length, *value.shape[1:]), dtype=value.dtype, device="cpu")
    return value.cpu()[torch.arange(length) % len(value)]  # with its data, for a model that needs some
