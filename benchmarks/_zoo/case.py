"""A model with its rows, and how rows become a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
FIRST_WORD = 48  # ids below are special tokens
PAD, BOS, EOS, MASK = 0, 1, 2, 3
ROWS = 12
IMAGE, PATCH = 32, 8
LAYERS, HALF, WIDTH, HEADS = 6, 3, 32, 4
Row = dict[str, Any]


class NotRunnable(Exception):
    """The family cannot be built tiny or returns no loss; adafreeze was not tried."""


@dataclass
class Case:
    """A model and its rows.

    Attributes:
        model: without adapters, or with (``adapted``).
        rows: the samples.
        together: names whose tensors are concatenated along dimension 0, not stacked (image patches of Qwen-VL).
        targets: names of modules for LoRA; None: chosen by ``lora_targets``.
        adapt: adds the adapters, if not by LoRA on ``targets``.
        trainer: makes a trainer from the model, callbacks, and a list for the losses; None: transformers' Trainer.
    """

    model: nn.Module
    rows: Sequence[Row]
    together: tuple[str, ...] = ()
    targets: Any = None
    adapt: Callable[[Any], Any] | None = None
    trainer: Callable[[Any, list[Any], list[float]], Any] | None = None


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: transformers' ``model_type``, if it has one.
        head: the task of the head.
        build: makes a ``Case``; called once per arm, after seeding.
        needs: the optional package it needs.
    """

    name: str
    head: str
    build: Callable[[], Case] = field(compare=False)
    needs: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name} | {self.head}"


def first_line(error: BaseException) -> str:
    """``ValueError: first lines of the message``, without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(/[\w.\-]+){2,}", "...", " ".join(lines[:3]) if lines else "")
    return f"{type(error).__name__}: {text[:200]}"


_FILL = {"labels": -100, "input_ids": PAD, "decoder_input_ids": PAD}


def collate(rows: Sequence[Row], together: Sequence[str] = ()) -> dict[str, Any]:
    """One batch: each tensor padded to the largest in every dimension; those in ``together`` concatenated."""
    batch: dict[str, Any] = {}
    for name in rows[0]:
        if isinstance(rows[0][name], bool):  # a model option
            batch[name] = rows[0][name]
            continue
        values = [torch.as_tensor(row[name]) for row in rows]
        if name in together:
            batch[name] = torch.cat(values)
            continue
        shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        padded = values[0].new_full((len(values), *shape), _FILL.get(name, 0))
        for place, value in zip(padded, values, strict=True):
            place[tuple(slice(size) for size in value.shape)] = value
        batch[name] = padded
    return batch
