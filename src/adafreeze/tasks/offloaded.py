"""Loads a model that is larger than its device: what a run freezes from the start never comes to it."""

from __future__ import annotations

import copy
import difflib
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ..errors import ConfigError, ModelError
from ..model import find_stacks
from ..model.blocks import lookup_tables
from ..model.offloaded import take_over
from ..model.restore import keep_random_state, logging_from
from .pretrained import Source, load

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["from_pretrained", "load_offloaded"]


def from_pretrained(
    name: str | os.PathLike[str],
    auto_class: str = "AutoModelForCausalLM",
    *,
    offload: str = "disk",
    device: torch.device | str | None = None,
    dtype: Any = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """``from_pretrained`` for a model that does not fit into the device's memory as a whole:

        model = adafreeze.from_pretrained("meta-llama/Llama-3.1-8B")
        model = get_peft_model(model, LoraConfig(...))
        SafeCallback(SafeConfig(freeze_at_start=0.5, fill="before", offload="disk"))

    Blocks and input embeddings stay in their safetensors files, or in host memory. A run computes what the blocks that
    are frozen from the start make of the training samples, one block on the device at a time; then the other blocks
    come to the device and train. Whatever else reads a weight gets it for as long as it needs it.

    Args:
        name: a folder, or a name on the Hub.
        auto_class: of transformers, such as ``"AutoModelForSequenceClassification"``.
        offload: ``"disk"`` or ``"cpu"``.
        device: of the rest; default: the accelerator, or the CPU.
        dtype: of the weights; "auto": as saved.
        revision: as for transformers, like the next three.
        cache_dir: folder of downloads.
        token: for the Hub.
        trust_remote_code: run code that comes with the model.
        options: more arguments of transformers' ``from_pretrained``, such as ``num_labels``.

    Raises:
        ConfigError: ``offload`` is another place, ``auto_class`` is none, or an option does not go with it.
        ModelError: the model cannot be loaded, is quantized, lacks weights of its blocks, or has no stack of blocks.
    """
    if offload not in ("disk", "cpu"):
        raise ConfigError(f"offload is {offload!r}, but must be 'disk' or 'cpu'.", fix='offload="disk"')
    if "device_map" in options:
        raise ConfigError(
            "device_map is given, but here it follows from the model: all blocks stay away.",
            fix="Leave it out; device=... says where the rest goes.",
        )
    if "output_loading_info" in options:
        raise ConfigError(
            "output_loading_info is given, but the model alone is returned.", fix="Leave out output_loading_info."
        )
    if not auto_class.startswith("Auto") or not hasattr(transformers, auto_class):
        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        close = difflib.get_close_matches(auto_class, known, 1)
        raise ConfigError(
            f"auto_class is {auto_class!r}, but must be a class AutoModel... of transformers.",
            fix=f'auto_class="{close[0] if close else "AutoModelForCausalLM"}"',
        )
    source = Source(
        os.fspath(name),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        trust_remote_code=trust_remote_code,
        offload=offload,
    )
    return load_offloaded(auto_class, source, device=device, dtype=dtype, **options)


def load_offloaded(
    auto_class: str, source: Source, *, device: torch.device | str | None = None, **options: Any
) -> PreTrainedModel:
    """Load all but blocks and input embeddings onto ``device``; arguments and errors as of ``from_pretrained``."""
    device = torch.device(device) if device is not None else _accelerator()
    loading = {"dtype", "ignore_mismatched_sizes"}
    config = load("AutoConfig", source, **{name: value for name, value in options.items() if name not in loading})
    if options.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{source.name} is to be quantized as it is loaded, which needs its weights on the device.",
            fix='Load it with from_pretrained of transformers; SafeConfig(offload="cpu") moves frozen blocks later.',
        )
    places = _device_map(config, auto_class, source, device)
    try:
        # They warn of what is on disk, as was asked for, and of buffers that are in no file.
        with logging_from("accelerate.big_modeling", logging.ERROR), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys")
            model: PreTrainedModel = load(auto_class, source, device_map=places, **options)
    except ModelError as error:
        if "offload_folder" not in str(error):
            raise
        raise ModelError(
            f"{source.name} has no safetensors file for all of its weights, so they cannot stay on disk.",
            fix='offload="cpu"; or model.save_pretrained(FOLDER) once, and load that.',
        ) from error
    take_over(model)
    model.__dict__.pop("hf_device_map", None)  # for Trainer, it is a model on one device
    return model


def _device_map(config: PretrainedConfig, auto_class: str, source: Source, device: torch.device) -> dict[str, Any]:
    """The place of every module: "disk" or "cpu" for blocks and input embeddings that no head uses, or ``device``."""
    with torch.device("meta"), keep_random_state():
        model = getattr(transformers, auto_class).from_config(copy.deepcopy(config))
    away = {stack.block_name(index) for stack in find_stacks(model) for index in range(len(stack))}
    away |= lookup_tables(model).keys()

    def partition(module: nn.Module, name: str) -> dict[str, Any]:
        """Names as few modules as possible."""
        if name in away:
            return {name: source.offload}
        if not any(one.startswith(f"{name}." if name else "") for one in away):
            return {name: device}
        prefix = f"{name}." if name else ""
        found = {f"{prefix}{own}": device for own in (*module._parameters, *module._buffers)}
        for child, inner in module.named_children():
            found |= partition(inner, f"{prefix}{child}")
        return found

    return partition(model, "")


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())
