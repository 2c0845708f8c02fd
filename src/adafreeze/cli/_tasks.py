"""From the data arguments of ``adafreeze train`` to the task that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..tasks import CausalLM, Regression, TextClassification

if TYPE_CHECKING:
    from ..tasks import Task
    from ._arguments import DataArguments

__all__ = ["TASKS", "make_task"]


def make_task(data: DataArguments) -> Task:
    """The task that the data arguments describe.

    Raises:
        ConfigError: the columns do not go with the task.
    """
    if data.max_seq_length is not None and data.max_seq_length < 2:
        raise ConfigError(
            f"--max_seq_length is {data.max_seq_length}.",
            cause="A row needs at least two tokens.",
            fix="--max_seq_length 128",
        )
    return TASKS[data.task](data)


def _causal_lm(data: DataArguments) -> Task:
    columns = data.text_column or []
    prompts = bool(data.prompt_column) + bool(data.completion_column)
    if prompts == 1 or (prompts and columns) or len(columns) > 1:
        raise ConfigError(
            "The columns do not go with --task causal-lm.",
            cause="It needs one --text_column, or both --prompt_column and --completion_column.",
            fix="--prompt_column prompt --completion_column completion",
        )
    return CausalLM(
        text_column=columns[0] if columns else None,
        prompt_column=data.prompt_column,
        completion_column=data.completion_column,
        prompt_separator=data.prompt_separator,
        max_length=data.max_seq_length or 512,
        pad_to_max_length=data.pad_to_max_length,
    )


def _text(data: DataArguments) -> Task:
    columns = tuple(data.text_column or ())
    if len(columns) > 2 or data.prompt_column or data.completion_column:
        raise ConfigError(
            f"The columns do not go with --task {data.task}.",
            cause="It reads one --text_column, or two for pairs.",
            fix="--text_column sentence1 sentence2",
        )
    kind = TextClassification if data.task == "text-classification" else Regression
    return kind(
        text_columns=columns,
        label_column=data.label_column,
        max_length=data.max_seq_length or 128,
        pad_to_max_length=data.pad_to_max_length,
    )


# What is typed after --task, and what makes it of the arguments.
TASKS: dict[str, Callable[[DataArguments], Task]] = {
    "text-classification": _text,
    "regression": _text,
    "causal-lm": _causal_lm,
}
