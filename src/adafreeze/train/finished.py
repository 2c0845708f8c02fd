"""Finished runs of train and compare: check that they are comparable, and rebuild their training loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

from ..analysis import Loss, adapter_parameters
from ..errors import ConfigError, ModelError, RunError
from ..journal import read_history
from .arguments import Arguments, parse
from .inputs import load_base, load_rows, make_task
from .output import CONFIG_FILE, JOURNAL_FILE

__all__ = ["FinishedRun", "comparable_runs", "group_by_seed", "training_loss"]

WEIGHTS_FILE = "adapter_model.safetensors"

# Settings that differ between seeds of one run, and those that change neither data, model nor adapter.
_OF_ONE_RUN = {"seed", "data_seed", "output_dir", "run_name", "logging_dir"}
_NO_MATTER = {"cache_dir", "token", "trust_remote_code", "max_eval_samples", "validation_file", "validation_dir"}


@dataclass(frozen=True)
class FinishedRun:
    """A run with its adapter."""

    folder: Path
    name: str  # the end of its path, long enough to be unique among the runs
    arguments: Arguments
    method: str
    frozen: int  # units at its end

    def inputs(self) -> dict[str, Any]:
        """What must be equal in a comparison: model, data, adapter, and the shapes of its weights."""
        given = self.arguments
        flags = asdict(given.model) | asdict(given.data) | asdict(given.adapter)
        with safe_open(self.folder / WEIGHTS_FILE, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        return {name: value for name, value in flags.items() if name not in _NO_MATTER} | shapes

    def kind(self) -> str:
        """Equal for runs that differ only by their seed."""
        settings = {name: value for name, value in self.arguments.resolved.items() if name not in _OF_ONE_RUN}
        return json.dumps([self.method, settings], sort_keys=True, default=str)


def comparable_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs in these folders.

    Raises:
        ConfigError: a folder is given twice.
        RunError: a run is missing or unfinished, or they differ in model, data or adapter.
    """
    twice = next((folder for i, folder in enumerate(folders) if folder in folders[:i]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice.", fix="Name it once.")
    first, *others = runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    ours = first.inputs()
    for other in others:
        theirs = other.inputs()
        for name in {**ours, **theirs}:
            one, two = ours.get(name, "not there"), theirs.get(name, "not there")
            if one != two:
                raise RunError(
                    f"{first.name} and {other.name} cannot be compared: {name} is {one} and {two}.",
                    fix=f"adafreeze analyze {first.folder}, and {other.folder} in a second call",
                )
    return runs


def _read(folder: Path, name: str) -> FinishedRun:
    config = folder / CONFIG_FILE
    if not (config.is_file() and (folder / JOURNAL_FILE).is_file()):
        raise RunError(
            f"There is no run in {folder}: {CONFIG_FILE} or {JOURNAL_FILE} is missing.",
            fix="Name the --output_dir of a run of `adafreeze train`.",
        )
    history = read_history(folder)
    if not history.done or not (folder / WEIGHTS_FILE).is_file():
        raise RunError(
            f"The run in {folder} is not finished: its journal has no end, or {WEIGHTS_FILE} is missing.",
            fix=f"adafreeze train --config {config} --output_dir {folder} --resume_from_checkpoint last",
        )
    arguments = parse(["--config", str(config), "--output_dir", str(folder)])
    return FinishedRun(folder, name, arguments, history.method or "", history.done.get("frozen_units", 0))


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as short as possible but all different."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def training_loss(
    run: FinishedRun, *, samples: int, batch_size: int, seed: int, head: bool, dtype: torch.dtype
) -> Loss:
    """The mean loss of a run over some of its training samples, as a function of its adapter parameters.

    Args:
        run: with its weights.
        samples: number of training samples; runs with the same data and ``seed`` get the same ones.
        batch_size: samples of a batch.
        seed: draws the samples.
        head: include the head that was trained with the adapters.
        dtype: of weights and computation.

    Raises:
        AdafreezeError: its model or data cannot be loaded.
    """
    data = replace(run.arguments.data, validation_file=None, validation_dir=None, validation_mismatched_file=None)
    arguments = replace(run.arguments, data=data)
    task, device = make_task(data), arguments.training.device
    rows, *_ = load_rows(task, arguments)
    try:
        base, processor = load_base(task, arguments)
    except ModelError as error:
        raise ModelError(
            f"The base model of {run.name} cannot be loaded. {error.fact}",
            fix=f"Put it back, or correct model_name_or_path in {run.folder / CONFIG_FILE}.",
        ) from error
    model = PeftModel.from_pretrained(base, str(run.folder)).to(device, dtype)
    prepared = task.prepare(rows, processor)
    generator = torch.Generator().manual_seed(seed)
    drawn = [prepared[i] for i in torch.randperm(len(prepared), generator=generator)[:samples].tolist()]
    drawn.sort(key=lambda row: len(row.get("input_ids", ())))  # little padding
    collate = task.collator(processor)
    batches = [
        {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in collate(drawn[start : start + batch_size]).items()
        }
        for start in range(0, len(drawn), batch_size)
    ]
    return Loss(model, batches, adapter_parameters(model, head=head))


def group_by_seed(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Names of runs by group: seeds of one method form a group, any other run is its own."""
    kinds: dict[str, list[FinishedRun]] = {}
    for run in runs:
        kinds.setdefault(run.kind(), []).append(run)
    methods = [members[0].method for members in kinds.values() if len(members) > 1]
    groups = {}
    for members in kinds.values():
        method, name = members[0].method, members[0].name
        if len(members) > 1:
            name = f"{method if methods.count(method) == 1 else name}, {len(members)} seeds"
        groups[name] = [run.name for run in members]
    return groups
