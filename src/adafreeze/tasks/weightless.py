"""A model without weights: built from its configuration alone, with an adapter, and inputs that have only a shape."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from .pretrained import Source, load_config

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

__all__ = ["PLANNED_TASKS", "adapted", "build", "configuration", "example_inputs"]

# What is asked for on the command line: transformers' class, and what PEFT calls the task.
PLANNED_TASKS = {
    "text-classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "regression": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "question-answering": ("AutoModelForQuestionAnswering", "QUESTION_ANS"),
    "causal-lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "text-generation": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "image-classification": ("AutoModelForImageClassification", None),
}


def configuration(model: str | PretrainedConfig, **options: Any) -> PretrainedConfig:
    """A configuration by hub name, folder, or path of a config.json.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    if not isinstance(model, str):
        return model
    path = Path(model).expanduser()
    name = str(path.parent) if path.name == "config.json" and path.is_file() else model
    if path.suffix == ".json" and not (path.name == "config.json" and path.is_file()):
        raise ModelError(
            f"There is no configuration {model}.",
            cause="A path must name a file config.json, or the folder that holds it.",
            fix="--model_name_or_path path/to/config.json",
        )
    return load_config(Source(name, **options))


def build(config: PretrainedConfig, task: str, dtype: torch.dtype | None = None, device: str = "meta") -> nn.Module:
    """The model that ``config`` describes, on ``device``; on ``meta`` without any memory.

    Raises:
        ModelError: transformers has no model of this type for the task, or the configuration is incomplete.
        Exception: of the model's own, where it reads values while it is built on ``meta``.
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
            raise  # it reads values while it is built, which only a real device has
        if "Unrecognized configuration class" not in str(error):
            raise _incomplete(config, error) from error
        raise ModelError(
            f"A {config.model_type} model does not do {task}.",
            cause=f"transformers has no {PLANNED_TASKS[task][0]} for it.",
            fix=f"--task, one of {', '.join(PLANNED_TASKS)}",
        ) from error


def _incomplete(config: PretrainedConfig, error: Exception) -> ModelError:
    reason = next(iter(str(error).splitlines()), "")
    return ModelError(
        f"No {config.model_type} model can be built from this configuration: {type(error).__name__}: {reason}.",
        cause="A field is missing, or two contradict each other.",
        fix="Compare it with the config.json of a published model of this type.",
    )


def adapted(model: nn.Module, adapter: PeftConfig, autocast_adapter_dtype: bool = True) -> nn.Module:
    """``get_peft_model``, for a model that may have no weights to start the adapter from.

    Raises:
        ConfigError: PEFT refuses the adapter.
    """
    from .adapters import add_adapter

    adapter = copy.deepcopy(adapter)
    if isinstance(getattr(adapter, "init_lora_weights", None), str):
        adapter.init_lora_weights = True  # type: ignore[attr-defined]  # PiSSA and its like read the weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT asks it
        on_meta = next(model.parameters()).is_meta
        made = add_adapter(
            model,  # type: ignore[arg-type]
            adapter,
            low_cpu_mem_usage=on_meta,
            autocast_adapter_dtype=autocast_adapter_dtype,
        ).train()
    if on_meta and not autocast_adapter_dtype:  # PEFT does so when it moves the adapter to the weights
        dtype = next(p.dtype for p in made.parameters() if not p.requires_grad and p.is_floating_point())
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return made


def example_inputs(
    config: PretrainedConfig, task: str, rows: int, length: int, *, padded: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs of a micro-batch, with labels; for a length that the model can read.

    Raises:
        ConfigError: the length is beyond what the model reads, or not positive.
        ModelError: the model's inputs are neither tokens nor pixels.
    """
    if rows < 1 or length < 1:
        raise ConfigError(
            f"A micro-batch of {rows} samples of {length} tokens is empty.",
            cause="Both must be at least 1.",
            fix="--per_device_train_batch_size 8 --max_seq_length 512",
        )
    if task == "image-classification":
        return _images(config, rows, dtype)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(
            f"--max_seq_length is {length}, and the model reads {positions} tokens.",
            cause="Its position embeddings end there.",
            fix=f"--max_seq_length {positions}",
        )
    ids = torch.ones(rows, length, dtype=torch.long)
    inputs = {"input_ids": ids}
    if padded:
        # Not all ones, which some attention paths notice.
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -1] = 0 if length > 1 else 1
    if task == "question-answering":
        return inputs | {name: torch.zeros(rows, dtype=torch.long) for name in ("start_positions", "end_positions")}
    labels = {"regression": torch.zeros(rows), "text-classification": torch.zeros(rows, dtype=torch.long)}
    return inputs | {"labels": labels.get(task, ids.clone())}


def _images(config: PretrainedConfig, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    size: Any = getattr(config, "image_size", None)
    if size is None:
        raise ModelError(
            f"The configuration of this {config.model_type} model does not say how large its images are.",
            cause="It has no image_size.",
            fix="Add image_size to its config.json, or plan another model.",
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.zeros(rows, getattr(config, "num_channels", 3), height, width, dtype=dtype)
    return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
