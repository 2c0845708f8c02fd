"""From the data arguments of ``adafreeze train`` to the task that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..tasks import (
    GLUE,
    GLUE_DATASET,
    CausalLM,
    ImageClassification,
    QuestionAnswering,
    Regression,
    TextClassification,
    TextGeneration,
    glue_task,
)

if TYPE_CHECKING:
    from ..tasks import Task
    from .arguments import DataArguments

__all__ = ["TASKS", "make_task", "rows_of"]


def make_task(data: DataArguments) -> Task:
    """The task that the data arguments describe.

    Raises:
        ConfigError: there is none, or the columns do not go with it.
    """
    if data.max_seq_length is not None and data.max_seq_length < 2:
        raise ConfigError(
            f"--max_seq_length is {data.max_seq_length}.",
            cause="A row needs at least two tokens.",
            fix="--max_seq_length 128",
        )
    if (data.task is None) == (data.task_name is None):
        raise ConfigError(
            "Exactly one of --task and --task_name is needed.",
            cause="Neither is given." if data.task is None else "Both are given, and --task_name says the task too.",
            fix="--task text-classification",
        )
    chosen = data.task_name or data.task
    for flag, owners in _OWN.items():
        if getattr(data, flag) is not None and chosen not in owners:
            raise ConfigError(
                f"--{flag} has no effect on {chosen}.",
                cause=f"It is for {', '.join(owners)}.",
                fix=f"Leave out --{flag}.",
            )
    return _glue(data) if data.task is None else TASKS[data.task](data)


def rows_of(data: DataArguments) -> dict[str, Any]:
    """Where the rows come from, as ``adafreeze.tasks.load_splits`` wants it: for GLUE the Hub, if not said."""
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


def _glue(data: DataArguments) -> Task:
    assert data.task_name is not None
    return glue_task(data.task_name, **_text_options(data))


def _causal_lm(data: DataArguments) -> Task:
    columns = data.text_column or []
    prompts = bool(data.prompt_column) + bool(data.completion_column)
    if prompts == 1 or bool(columns) + bool(prompts) + bool(data.messages_column) > 1 or len(columns) > 1:
        raise ConfigError(
            "The columns do not go with --task causal-lm.",
            cause="It needs one --text_column, or both --prompt_column and --completion_column, or --messages_column.",
            fix="--prompt_column prompt --completion_column completion",
        )
    if data.block_size is not None and (data.block_size < 2 or data.max_seq_length or prompts or data.messages_column):
        raise ConfigError(
            f"--block_size {data.block_size} cannot be used here.",
            cause="It joins plain text and cuts it into rows of so many tokens, at least two: there is no "
            "--max_seq_length then, and prompts and conversations must stay whole.",
            fix="--text_column text --block_size 512",
        )
    return CausalLM(
        text_column=columns[0] if columns else None,
        messages_column=data.messages_column,
        group_texts=data.block_size is not None,
        **_prompt_options(data),
    )


def _text_generation(data: DataArguments) -> Task:
    if not (data.prompt_column and data.completion_column):
        raise ConfigError(
            "The columns do not go with --task text-generation.",
            cause="It needs both --prompt_column and --completion_column.",
            fix="--prompt_column mr --completion_column ref",
        )
    given = {"max_new_tokens": data.generation_max_new_tokens, "num_beams": data.generation_num_beams}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if value < 1:
            raise ConfigError(
                f"--generation_{name} is {value}.", cause="It must be at least 1.", fix=f"--generation_{name} 1"
            )
    return TextGeneration(**_prompt_options(data), **options)


def _prompt_options(data: DataArguments) -> dict[str, Any]:
    return {
        "prompt_column": data.prompt_column,
        "completion_column": data.completion_column,
        "prompt_separator": data.prompt_separator,
        "max_length": data.block_size or data.max_seq_length or 512,
        "pad_to_max_length": data.pad_to_max_length,
    }


def _text(data: DataArguments) -> Task:
    kind = TextClassification if data.task == "text-classification" else Regression
    return kind(**_text_options(data))


def _text_options(data: DataArguments) -> dict[str, Any]:
    columns = tuple(data.text_column or ())
    if len(columns) > 2 or data.prompt_column or data.completion_column:
        raise ConfigError(
            f"The columns do not go with --task {data.task or TextClassification.name}.",
            cause="It reads one --text_column, or two for pairs.",
            fix="--text_column sentence1 sentence2",
        )
    return {
        "text_columns": columns,
        "label_column": data.label_column,
        "max_length": data.max_seq_length or 128,
        "pad_to_max_length": data.pad_to_max_length,
    }


def _question_answering(data: DataArguments) -> Task:
    for flag, least in (("doc_stride", 0), ("n_best_size", 1), ("max_answer_length", 1)):
        value = getattr(data, flag)
        if value is not None and value < least:
            raise ConfigError(
                f"--{flag} is {value}.", cause=f"It must be at least {least}.", fix=f"Leave out --{flag}, or raise it."
            )
    given = {
        "question_column": data.question_column,
        "context_column": data.context_column,
        "answers_column": data.answers_column,
        "max_length": data.max_seq_length,
        "doc_stride": data.doc_stride,
        "n_best": data.n_best_size,
        "max_answer_length": data.max_answer_length,
        "null_threshold": data.null_score_diff_threshold,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return QuestionAnswering(**options, pad_to_max_length=data.pad_to_max_length)


def _image_classification(data: DataArguments) -> Task:
    for kind in ("train", "validation"):
        if getattr(data, f"{kind}_file") and getattr(data, f"{kind}_dir"):
            raise ConfigError(
                f"Both --{kind}_file and --{kind}_dir are given.",
                cause="The images must come from one place.",
                fix=f"Leave out --{kind}_file.",
            )
    return ImageClassification(image_column=data.image_column, label_column=data.label_column)


# What is typed after --task, and what makes it of the arguments.
TASKS: dict[str, Callable[[DataArguments], Task]] = {
    "text-classification": _text,
    "regression": _text,
    "causal-lm": _causal_lm,
    "text-generation": _text_generation,
    "question-answering": _question_answering,
    "image-classification": _image_classification,
}

# Flags that some tasks read: with others they would be ignored in silence.
_TEXT = ("text-classification", "regression", "causal-lm", *GLUE)
_OF_QUESTIONS = ("question_column", "context_column", "answers_column", "doc_stride", "n_best_size")
_OWN: dict[str, tuple[str, ...]] = {
    "validation_mismatched_file": ("mnli",),
    "text_column": _TEXT,
    **dict.fromkeys(("prompt_column", "completion_column"), (*_TEXT, "text-generation")),
    **dict.fromkeys(("messages_column", "block_size"), ("causal-lm",)),
    **dict.fromkeys(("generation_max_new_tokens", "generation_num_beams"), ("text-generation",)),
    **dict.fromkeys((*_OF_QUESTIONS, "max_answer_length", "null_score_diff_threshold"), ("question-answering",)),
    **dict.fromkeys(("train_dir", "validation_dir", "image_column"), ("image-classification",)),
    "max_seq_length": (*(name for name in TASKS if name != "image-classification"), *GLUE),
}
