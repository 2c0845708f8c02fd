"""A model without weights, built from its configuration, with an adapter, and example inputs; for plan and doctor."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from .adapters import add_adapter
from .data import first_line
from .pretrained import Source, load
from .table import TASKS

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

__all__ = ["PLANNED_TASKS", "adapted", "build", "configuration", "example_inputs"]

# --task of plan and doctor: the class of transformers and PEFT's task type. There is no training of seq2seq-lm.
PLANNED_TASKS = {name: (task.auto_class, task.peft_task_type) for name, task in TASKS.items()}
PLANNED_TASKS["seq2seq-lm"] = ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")


def configuration(model: str | os.PathLike[str] | PretrainedConfig, **options: Any) -> PretrainedConfig:
    """A configuration by Hub name, folder, or path of a config.json; ``options`` are fields of ``Source``.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model
    model = os.fspath(model)
    path = Path(model).expanduser()
    if path.suffix == ".json":
        if path.name != "config.json" or not path.is_file():
            raise ModelError(
                f"There is no configuration {model}; a path must be a file config.json or its folder.",
                fix="--model_name_or_path path/to/config.json",
            )
        model = str(path.parent)
    return load("AutoConfig", Source(model, **options))


def build(config: PretrainedConfig, task: str, dtype: torch.dtype | None = None, device: str = "meta") -> nn.Module:
    """The model of ``config`` on ``device``; on ``meta`` it takes no memory.

    Raises:
        ModelError: transformers has no model of this type for the task, or the configuration is incomplete.
        Exception: the model reads values while it is built, which ``meta`` does not have.
    """
    import transformers

    kind = getattr(transformers, PLANNED_TASKS[task][0])
    config = copy.deepcopy(config)
    if task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device(device):
            return kind.from_config(config, dtype=dtype)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, KeyError) as error:
        if device == "meta" and "meta" in str(error):
            raise
        if "Unrecognized configuration class" in str(error):
            raise ModelError(
                f"A {config.model_type} model does not do {task}: transformers has no {kind.__name__} for it.",
                fix=f"--task, one of {', '.join(PLANNED_TASKS)}",
            ) from error
        raise ModelError(
            f"This configuration does not make a {config.model_type} model: {type(error).__name__}: "
            f"{first_line(error)}.",
            fix="Compare it with the config.json of a published model of this type.",
        ) from error


def adapted(model: nn.Module, adapter: PeftConfig, autocast_adapter_dtype: bool = True) -> nn.Module:
    """``get_peft_model`` for a model that may be on ``meta``.

    Raises:
        ConfigError: PEFT rejects the adapter.
    """
    adapter = copy.deepcopy(adapter)
    if isinstance(getattr(adapter, "init_lora_weights", None), str):
        adapter.init_lora_weights = True  # type: ignore[attr-defined]  # PiSSA and others read the weights
    on_meta = next(model.parameters()).is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)  # transformers deprecates an attribute that PEFT reads
        options = {"low_cpu_mem_usage": on_meta, "autocast_adapter_dtype": autocast_adapter_dtype}
        made = add_adapter(model, adapter, **options).train()  # type: ignore[arg-type]
    if on_meta and not autocast_adapter_dtype:  # off meta, PEFT does this when it moves the adapter to the weights
        dtype = next(p.dtype for p in made.parameters() if not p.requires_grad and p.is_floating_point())
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return made


def example_inputs(
    config: PretrainedConfig, task: str, rows: int, length: int, *, padded: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The inputs and labels of a micro-batch.

    Raises:
        ConfigError: the length is not positive, or more than the model reads.
        ModelError: the configuration of an image model has no image size.
    """
    if rows < 1 or length < 1:
        raise ConfigError(
            f"A micro-batch of {rows} samples of {length} tokens is empty; both must be at least 1.",
            fix="--per_device_train_batch_size 8 --max_seq_length 512",
        )
    labels = torch.zeros(rows, dtype=torch.long)
    if task == "image-classification":
        size: Any = getattr(config, "image_size", None)
        if size is None:
            raise ModelError(
                f"The configuration of this {config.model_type} model has no image_size.",
                fix="Add image_size to its config.json, or plan another model.",
            )
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.zeros(rows, getattr(config, "num_channels", 3), height, width, dtype=dtype)
        return {"pixel_values": pixels, "labels": labels}
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(
            f"--max_seq_length is {length}, but the model reads {positions} tokens.",
            fix=f"--max_seq_length {positions}",
        )
    ids = torch.ones(rows, length, dtype=torch.long)
    inputs = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -1] = 0 if length > 1 else 1  # some attention paths detect a mask of ones
    if task == "question-answering":
        return inputs | {"start_positions": labels, "end_positions": labels.clone()}
    return inputs | {"labels": {"regression": labels.float(), "text-classification": labels}.get(task, ids.clone())}
