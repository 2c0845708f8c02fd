"""From the data arguments of ``adafreeze train`` to the task and its rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..tasks import GLUE, GLUE_DATASET, TASKS, Task, glue_task

if TYPE_CHECKING:
    from .arguments import DataArguments

__all__ = ["make_task", "rows_of"]

# Flags that are not fields of a task, by the tasks that use them.
_IMAGES = ["image-classification"]
_OF_ROWS = {"train_dir": _IMAGES, "validation_dir": _IMAGES, "validation_mismatched_file": ["mnli"]}


def make_task(data: DataArguments) -> Task:
    """The task that the data arguments describe.

    Raises:
        ConfigError: there is none, or flags do not go with it.
    """
    if (data.task is None) == (data.task_name is None):
        raise ConfigError(
            "Exactly one of --task and --task_name is needed; got " + ("neither." if data.task is None else "both."),
            fix="--task text-classification",
        )
    kind = TASKS[data.task] if data.task is not None else type(glue_task(str(data.task_name)))
    options: dict[str, Any] = {}
    for flag in (entry.name for entry in dataclasses.fields(data)):
        value = getattr(data, flag)
        owners = _OF_ROWS.get(flag) or [name for name, task in TASKS.items() if _field(flag) in _fields(task)]
        if value is None or not owners:
            continue
        if flag in ("max_seq_length", "block_size") and value < 2:
            raise ConfigError(f"--{flag} is {value}; a row needs at least two tokens.", fix=f"--{flag} 128")
        if _field(flag) in _fields(kind):
            options[_field(flag)] = value
        elif getattr(type(data), flag) is None and (data.task_name or data.task) not in owners:
            raise ConfigError(
                f"--{flag} has no effect on {data.task_name or data.task}. It is for {', '.join(owners)}.",
                fix=f"Leave out --{flag}.",
            )
    return glue_task(data.task_name, **options) if data.task_name is not None else kind(**options)


def _field(flag: str) -> str:
    return "max_length" if flag == "max_seq_length" else flag


def _fields(task: type[Task]) -> set[str]:
    return {entry.name for entry in dataclasses.fields(task) if entry.init}  # type: ignore[arg-type]


def rows_of(data: DataArguments) -> dict[str, Any]:
    """Where the rows are, as arguments of ``adafreeze.tasks.load_splits``; GLUE's default is the Hub.

    Raises:
        ConfigError: a file and a folder are given.
    """
    for kind in ("train", "validation"):
        if getattr(data, f"{kind}_file") and getattr(data, f"{kind}_dir"):
            raise ConfigError(f"Both --{kind}_file and --{kind}_dir are given.", fix=f"Leave out --{kind}_file.")
    found = {
        "dataset_name": data.dataset_name,
        "dataset_config_name": data.dataset_config_name,
        "train_file": data.train_file or data.train_dir,
        "validation_file": data.validation_file or data.validation_dir,
        "validation_split": data.validation_split,
    }
    if data.task_name is not None and data.train_file is None:
        if data.dataset_name is None:
            found |= {"dataset_name": GLUE_DATASET, "dataset_config_name": data.task_name}
        found["validation_split"] = data.validation_split or GLUE[data.task_name].validation
    return found
