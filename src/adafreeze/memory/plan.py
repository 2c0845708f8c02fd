"""Plan: memory and FLOPs of a run before it starts, without its weights and without an accelerator."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import AT_START
from ..costs.devices import GPUS, usable_memory
from ..decide.policy import PolicyInput, bottom_up
from ..errors import AdafreezeError, ConfigError, ModelError, warn
from ..model.batch import rows_of
from ..sizes import readable
from ..tasks.weightless import PLANNED_TASKS, adapted, build, configuration, example_inputs
from ._stage import QUANTISED, Stage
from .optimizer import optimizer_names
from .planned import PlannedStep
from .rehearsal import failing_module, largest_that_fits

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

__all__ = ["GPUS", "Plan", "PlannedStep", "plan"]


@dataclass(frozen=True)
class Plan:
    """What a run is going to hold and to compute.

    Attributes:
        model: its class.
        blocks: in all stacks.
        steps: at prefix depth 0, that of SafeConfig() at the start, a half, three quarters, and the deepest; by depth.
        plain: plain adapter-tuning: nothing frozen, nothing recomputed.
        checkpointed: the same with activation checkpointing of every block, as transformers switches it on.
        limit: bytes that may be held; None if no device was named.
        micro_batches: how many samples fit: ``"plain"``, ``"safe"`` (SafeConfig() at the start), and
            ``"checkpointed"``, which is what a memory budget can come down to. Empty without a device.
        causes: what makes it hold more than it would have to, with the remedy.
        advice: what to change, if not even one sample fits.
        estimated: parts that are estimates and not counted.
        settings: what was planned for.
    """

    model: str
    blocks: int
    steps: tuple[PlannedStep, ...]
    plain: PlannedStep
    checkpointed: PlannedStep
    limit: int | None
    micro_batches: Mapping[str, int]
    causes: tuple[str, ...]
    advice: tuple[str, ...]
    estimated: tuple[str, ...]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def plan(
    model: str | PretrainedConfig | nn.Module,
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
    """Memory and FLOPs of a run, from shapes alone: no weights are loaded, and no accelerator is needed.

    The model is built without memory, the adapter put in, and the training step run on tensors without data, once for
    each prefix depth: the model's own code, torch's own autograd, counted to the byte.

    Args:
        model: a name on the Hub, a folder, the path of a config.json, a configuration, or a module (with its adapters
            in it, or none yet; it is left as it was).
        adapter: for ``peft.get_peft_model``; None if the module has its adapters.
        task: one of ``"text-classification"``, ``"regression"``, ``"causal-lm"``, ``"seq2seq-lm"``,
            ``"image-classification"``; not for a module with ``inputs``.
        batch_size: samples of one micro-batch.
        max_length: tokens of its longest sample.
        inputs: of a module's forward pass, in the place of those that follow from the task; shapes and dtypes matter.
        dtype: of the weights; ``"auto"`` as the configuration says.
        mixed_precision: bfloat16 autocast, as of ``TrainingArguments.bf16``.
        quantization: ``"nf4"`` or ``"int8"``: weights of the blocks' linear layers as bitsandbytes keeps them. An
            estimate.
        optim: as of ``TrainingArguments``.
        checkpointing: activation checkpointing is on: all blocks above the prefix recompute.
        padding: batches hold padding, so that attention has a mask.
        accumulate: over several micro-batches, so that gradients are there from the start.
        autocast_adapter_dtype: PEFT's own switch: float32 adapters in a model of half precision.
        target: where the run will be, ``"cuda"`` or ``"cpu"``: their attention kernels keep different tensors.
        device_memory: of the device: bytes, a text such as ``"24GiB"``, or a name in ``GPUS``. Of CUDA memory
            1 GiB is left for the context, workspaces and fragments.
        hub: ``revision``, ``cache_dir``, ``token`` and ``trust_remote_code`` for the configuration.

    Raises:
        ConfigError: a setting is unknown or out of range.
        ModelError: there is no such model, or none can be built, or it has no adapters by block.
    """
    rows = batch_size if inputs is None else _rows_of(inputs)
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
    _one_of("task", task, PLANNED_TASKS)
    _one_of("target", target, ("cpu", "cuda"))
    _one_of("quantization", quantization, (None, *QUANTISED))
    _one_of("optim", optim, optimizer_names())
    limit = usable_memory(device_memory, target)
    weights = _dtype(dtype)
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else configuration(model, **hub)

    def module_on(device: str) -> nn.Module:
        module = model if isinstance(model, nn.Module) else build(config, task, weights, device)  # type: ignore[arg-type]
        return module if adapter is None else adapted(module, adapter, autocast_adapter_dtype)

    def batch(rows: int, module: nn.Module) -> dict[str, Any]:
        if inputs is not None:
            return {name: _with_rows(value, rows, _rows_of(inputs)) for name, value in inputs.items()}
        own = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return example_inputs(config, task, rows, max_length, padded=padding, dtype=own)  # type: ignore[arg-type]

    options = (batch, optim, mixed_precision, quantization, accumulate)
    traced = 1 if inputs is None else rows  # whoever gives inputs may give tensors that cannot be cut into samples
    try:
        with Stage(module_on("meta"), *options, target=target, fake=True, rows=traced) as stage:
            return _drawn_up(stage, rows, checkpointing, limit, settings, given=inputs is not None)
    except AdafreezeError:
        raise
    except Exception as error:  # the model's own code, on tensors without data
        warn(
            f"{failing_module(error)} cannot be built or run without data "
            f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')}).",
            cause="It reads values of its tensors, or uses an operator whose shapes torch does not know.",
            fix="One real step at each depth is measured instead, on the CPU and with random weights: that takes the "
            "memory of the model.",
        )
    try:
        with Stage(module_on("cpu"), *options, target="cpu", fake=False, rows=traced) as stage:
            return _drawn_up(stage, rows, checkpointing, limit, settings, given=inputs is not None)
    except AdafreezeError:
        raise
    except Exception as error:
        raise ModelError(
            f"A training step of the model fails: {failing_module(error)}: {type(error).__name__}: "
            f"{next(iter(str(error).splitlines()), '')}",
            cause="It was called with "
            + ", ".join(inputs if inputs is not None else batch(1, nn.Linear(1, 1)))
            + ". A field may be missing from the configuration.",
            fix="Correct --task or the configuration, or call adafreeze.plan(model, inputs=batch) with a real batch.",
        ) from error


def _drawn_up(
    stage: Stage, rows: int, checkpointing: bool, limit: int | None, settings: Mapping[str, Any], *, given: bool
) -> Plan:
    plain, checkpointed = stage.step(rows), stage.step(rows, recompute=True)
    causes = tuple(stage.causes(rows))
    micro_batches = {}

    def fit(name: str, known: PlannedStep, recompute: bool) -> None:
        if limit is None:
            return
        peaks = {rows: known.peak}

        def peak(count: int) -> int:
            if count not in peaks:
                peaks[count] = stage.step(count, recompute=recompute).peak
            return peaks[count]

        try:
            micro_batches[name] = largest_that_fits(peak, rows, known.peak - known.saved - known.transient, limit)
        except Exception as error:
            if not given:
                raise
            warn(
                f"How many samples fit is not known: the model does not take another number than {rows} "
                f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')}).",
                cause="Some tensors of inputs= do not hold the same number of entries for each sample.",
                fix="Plan with a batch of the size that is to be used.",
            )

    recompute = checkpointing or stage.was_checkpointed
    fit("plain", plain, False)
    fit("checkpointed", checkpointed, True)
    steps = [checkpointed if recompute else plain]
    at_start = _at_start(stage)
    for names in _choices(stage, at_start):
        if not stage.freezer.frozen.issuperset(names):
            stage.freeze(names)
            steps.append(stage.step(rows, recompute=recompute))
        if names == frozenset(at_start):
            fit("safe", steps[-1], recompute)
    estimated = []
    if stage.quantization is not None:
        estimated.append(f"weights in {stage.quantization}, by their bytes an element")
    if stage.target != settings["target"]:
        estimated.append("attention and dropout, as measured on the CPU")
    if stage.mixed_precision and settings["target"] == "cuda":
        estimated.append("mixed precision, by what autocast casts on the CPU")
    return Plan(
        model=stage.name,
        blocks=sum(map(len, stage.stacks)),
        steps=tuple(steps),
        plain=plain,
        checkpointed=checkpointed,
        limit=limit,
        micro_batches=micro_batches,
        causes=causes,
        advice=tuple(_advice(checkpointed, rows, limit, stage.quantization)),
        estimated=tuple(estimated),
        settings=settings,
    )


def _at_start(stage: Stage) -> list[str]:
    """Units that SafeConfig() freezes before step 0."""
    if stage.freezer.backend.moves_ranks:
        return []
    lowest = bottom_up(PolicyInput(0, 1.0, {}, stage.chains, freeze_share=AT_START))
    return [name for name in lowest if name in stage.paying]


def _choices(stage: Stage, at_start: list[str]) -> list[frozenset[str]]:
    """Units to freeze: ``at_start``, those of a half and of three quarters of the blocks, and all that may freeze."""
    blocks = sum(map(len, stage.chains))
    choices = [at_start, *(stage.lowest(round(share * blocks)) for share in (0.5, 0.75, 1))]
    return sorted(set(map(frozenset, choices)), key=len)


def _advice(leanest: PlannedStep, rows: int, limit: int | None, quantization: str | None) -> Iterator[str]:
    """What to change where not even full recompute fits."""
    if limit is None or leanest.peak <= limit:
        return
    if rows > 1:
        yield "--per_device_train_batch_size 1 --gradient_accumulation_steps " + str(rows)
    yield "a smaller --max_seq_length"
    if quantization is None and leanest.weights > 0.4 * limit:
        yield "--quantization nf4 (QLoRA)"
    if leanest.weights > limit:
        yield f"a smaller model: the weights alone take {readable(leanest.weights)}"


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    _one_of("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    return None if dtype == "auto" else getattr(torch, dtype)


def _one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    if value not in known:
        close = difflib.get_close_matches(str(value), [str(one) for one in known], n=1)
        raise ConfigError(
            f"--{name} is {value!r}.",
            cause=f"It must be one of {', '.join(str(one) for one in known if one is not None)}.",
            fix=f"--{name} {close[0] if close else next(str(one) for one in known if one is not None)}",
        )


def _rows_of(inputs: Mapping[str, Any]) -> int:
    return rows_of(inputs) or next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)


def _with_rows(value: Any, rows: int, before: int) -> Any:
    """A batch's tensor for another number of rows: of a tensor that holds several entries a row, as many a row."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) % before:
        return value
    length = len(value) // before * rows
    if value.is_meta:
        return torch.empty((length, *value.shape[1:]), dtype=value.dtype, device="cpu")
    return value.cpu()[torch.arange(length) % len(value)]  # a model that needs data gets those
