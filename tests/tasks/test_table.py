from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass

import pytest

from adafreeze.errors import ConfigError
from adafreeze.tasks import GLUE, TASKS, Task, TextClassification
from adafreeze.train.arguments import DataArguments
from adafreeze.train.inputs import make_task


def test_the_flags_take_the_names_of_the_tables():
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(DataArguments)}
    assert set(choices["task"]) == set(TASKS) and set(choices["task_name"]) == set(GLUE)
    assert all(task.name == name for name, task in TASKS.items())


@dataclass
class Echo(Task):
    """A new task: its fields are its flags."""

    text_column: tuple[str, ...] = ()
    max_length: int = 7
    name: typing.ClassVar[str] = "echo"


def test_a_new_task_is_one_class_and_one_line_in_the_table(monkeypatch):
    monkeypatch.setitem(TASKS, "echo", Echo)
    assert make_task(DataArguments(task="echo")) == Echo()
    assert make_task(DataArguments(task="echo", text_column=["a"], max_seq_length=9)) == Echo(["a"], 9)
    with pytest.raises(ConfigError, match=r"--doc_stride has no effect on echo\. It is for question-answering"):
        make_task(DataArguments(task="echo", doc_stride=3))


def test_flags_of_a_glue_task_are_those_of_its_class():
    task = make_task(DataArguments(task_name="mrpc", max_seq_length=9))
    assert isinstance(task, TextClassification) and task.max_length == 9
    assert task.text_column == GLUE["mrpc"].columns and task.classes == GLUE["mrpc"].classes
    with pytest.raises(ConfigError, match=r"--prompt_column has no effect on mrpc"):
        make_task(DataArguments(task_name="mrpc", prompt_column="a"))
