"""What a run starts from: task, rows, and the pre-trained model with its tokenizer or image processor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from ..errors import ConfigError, ModelError, warn
from ..tasks import GLUE, GLUE_DATASET, TASKS, Source, Task, glue_task, load_splits
from ..tasks.data import load_validation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from .arguments import Arguments, DataArguments

__all__ = ["load_base", "load_rows", "make_task"]

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


def _rows_of(data: DataArguments) -> dict[str, Any]:
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


def load_rows(task: Task, arguments: Arguments) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Rows to train on, to evaluate on, and MNLI's rows of other genres; ``task`` is fitted to the first.

    Raises:
        DataError: they cannot be read or do not fit the task.
    """
    data, model = arguments.data, arguments.model
    place = _rows_of(data)
    options: dict[str, Any] = {
        "skip_bad_rows": data.skip_bad_rows,
        "cache_dir": model.cache_dir,
        "token": model.token,
        "trust_remote_code": model.trust_remote_code,
    }
    train_rows, eval_rows = load_splits(
        task,
        **place,
        **options,
        train_split=data.train_split,
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
        seed=arguments.training.seed,
    )
    mismatched = None
    if data.task_name == "mnli":
        mismatched = load_validation(
            task,
            "validation_mismatched",
            path=data.validation_mismatched_file,
            dataset_name=place["dataset_name"],
            dataset_config_name=place["dataset_config_name"],
            max_samples=data.max_eval_samples,
            **options,
        )
    return train_rows, eval_rows, mismatched


def load_base(task: Task, arguments: Arguments) -> tuple[PreTrainedModel, Any]:
    """The pre-trained model with a seeded new head, and its tokenizer or image processor.

    Raises:
        ModelError: they cannot be loaded, or do not belong together.
    """
    given = arguments.model
    source = Source(
        name=given.model_name_or_path,
        tokenizer=given.tokenizer_name,
        revision=given.model_revision,
        cache_dir=given.cache_dir,
        token=given.token,
        trust_remote_code=given.trust_remote_code,
        dtype=given.dtype,
        ignore_mismatched_sizes=given.ignore_mismatched_sizes,
    )
    safe = arguments.safe
    if safe is not None and safe.offload in ("cpu", "disk") and safe.share_at_start and not safe.dry_run:
        source = dataclasses.replace(source, offload=safe.offload)
    processor = task.load_processor(source)
    set_seed(arguments.training.seed)  # for the new head, and the adapter that the caller adds
    model = task.load_model(source)
    if task.max_length is not None:  # None: no tokens
        _fit_length(task, model, processor, arguments.data)
    return model, processor


def _fit_length(task: Task, model: Any, tokenizer: Any, data: DataArguments) -> None:
    """Cut rows to what the model can read; torch's error would only be "index out of range"."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {embeddings} embeddings.",
            fix="Leave out --tokenizer_name, or give the tokenizer that the model was trained with.",
        )
    assert task.max_length is not None
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or task.max_length)
    for flag in ("max_seq_length", "block_size"):
        length = getattr(data, flag)
        if length is not None and length > limit:
            warn(
                f"The model reads {limit} tokens: rows are cut to {limit} tokens, not {length}.",
                fix=f"--{flag} {limit}",
            )
    task.max_length = min(task.max_length, limit)
