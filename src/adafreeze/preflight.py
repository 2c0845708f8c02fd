"""Preflight: what can be known to go wrong is said before step 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, ProbeError, RunError, warn
from .model import Flow, Probe, Stack, Unit, trace_flow
from .model.draw import keep_random_state

__all__ = ["check_run", "check_state", "check_units", "flows_of"]


def check_run(model: nn.Module, optimizer: Any, total_steps: int) -> None:
    """Refuse runs whose length is unknown, or where a freeze in mid-run would corrupt training.

    Raises:
        ConfigError: ``total_steps`` is not a positive whole number.
        RunError: several processes, DataParallel, DeepSpeed.
    """
    if not isinstance(total_steps, int) or total_steps < 1:
        raise ConfigError(
            f"total_steps is {total_steps!r}.",
            cause="Warm-up and ramp are shares of the run, so its length in optimizer steps must be known.",
            fix="Safe(..., total_steps=len(train_dataloader) // accumulation * epochs)",
        )
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    found = ""
    if processes > 1:
        found = f"The run has {processes} processes."
    elif isinstance(model, nn.DataParallel):
        found = "The model is wrapped in nn.DataParallel."
    elif "deepspeed" in type(getattr(optimizer, "optimizer", optimizer)).__module__:
        found = "The optimizer is DeepSpeed's."
    if found:
        raise RunError(
            found,
            cause="There a parameter that freezes in mid-run leaves the ranks apart or keeps moving, silently; "
            "this version freezes in one process on one device.",
            fix="Run on one device (CUDA_VISIBLE_DEVICES=0), or leave adafreeze out.",
        )


def check_units(names: tuple[str, ...], units: Mapping[str, Unit]) -> None:
    """Refuse names to freeze by hand that are no units.

    Raises:
        ConfigError: the first of them, with the names there are.
    """
    for name in names:
        if name not in units:
            raise ConfigError(
                f"SafeConfig.freeze names {name!r}, which is no unit of this model.",
                cause=f"Its units are {', '.join(list(units)[:3])}, ... ({len(units)} in all).",
                fix=f'SafeConfig(freeze=["{next(iter(units))}"])',
            )


def check_state(state: Mapping[str, Any], version: int, units: Mapping[str, Unit]) -> None:
    """Refuse a checkpoint's state that does not belong to this run.

    Raises:
        RunError: written by another version, or for a model with other units.
    """
    if state.get("version") != version:
        raise RunError(
            f"The adafreeze state has version {state.get('version')!r}; this version reads {version}.",
            cause="The checkpoint was written by another version of adafreeze.",
            fix="Resume with the version that wrote it, or start the run anew.",
        )
    strangers = [name for name in state["frozen"] if name not in units]
    if strangers:
        raise RunError(
            f"The checkpoint froze {strangers[0]!r}, which is no unit of this model.",
            cause="It was written for another model, adapter or granularity.",
            fix="Resume with the model and SafeConfig of the checkpoint.",
        )


def flows_of(model: nn.Module, stacks: list[Stack], units: Mapping[str, Unit], probe: Probe) -> dict[str, Flow]:
    """Trace one sample of the probe through the model; warn of what trains below the blocks.

    Raises:
        ProbeError: the model does not take the probe.
    """
    one = probe.first_sample(next(model.parameters()).device)
    try:
        with keep_random_state():
            flows = trace_flow(model, stacks, one)
    except Exception as error:
        raise ProbeError(
            f"The model does not take the probe: {type(error).__name__}: {error}",
            cause=f"It was called with {', '.join(one)} of one sample.",
            fix="Pass batches as the model gets them in training: probe=[batch, ...]",
        ) from error
    owned = {id(p) for unit in units.values() for p in (*unit.parameters(), *unit.shared_parameters())}
    for path, flow in flows.items():
        outside = {id(p) for p in flow.upstream if id(p) not in owned}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in outside]
        if names:
            warn(
                f"Trainable parameters stand below the blocks of {path}: {', '.join(names[:4])}.",
                cause="Their gradient passes through every block, so no prefix can be cut off; freezing saves "
                "hardly any memory or time.",
                fix='Leave embeddings out of modules_to_save, and set LoraConfig(bias="none").',
                stacklevel=5,
            )
    return flows
