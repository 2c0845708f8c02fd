"""Loads a model that is larger than its device: what a run freezes from the start never comes to it."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError
from ..model import find_stacks
from ..model.offloaded import take_over
from ..model.restore import keep_random_state
from .pretrained import Source, load

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["from_pretrained", "load_offloaded"]


def from_pretrained(
    name: str,
    auto_class: str = "AutoModelForCausalLM",
    *,
    freeze_at_start: float = 0.5,
    offload: str = "disk",
    device: torch.device | str | None = None,
    dtype: Any = "auto",
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """``from_pretrained`` for a model of which only the upper blocks fit into the device's memory:

        model = adafreeze.from_pretrained("meta-llama/Llama-3.1-8B", freeze_at_start=0.5)
        model = get_peft_model(model, LoraConfig(...))
        SafeCallback(SafeConfig(freeze_at_start=0.5, fill="before", offload="disk"))

    The lowest blocks and the input embeddings stay in their safetensors file, or in host memory. Their adapters, and
    all that is above, are on the device. A pass through these blocks brings their weights one block at a time.

    Args:
        name: a folder, or a name on the Hub.
        auto_class: of transformers.
        freeze_at_start: the share of the blocks that stay away, rounded down, as ``SafeConfig.freeze_at_start``.
        offload: ``"disk"`` or ``"cpu"``.
        device: of the rest; default: the accelerator, or the CPU.
        dtype: of the weights; "auto": as saved.
        revision: as for transformers, like the next three.
        cache_dir: folder of downloads.
        token: for the Hub.
        trust_remote_code: run code that comes with the model.
        options: more arguments of transformers' ``from_pretrained``, such as ``num_labels``.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: the model cannot be loaded, or has no stack of blocks.
    """
    if offload not in ("disk", "cpu"):
        raise ConfigError(f"offload is {offload!r}, but must be 'disk' or 'cpu'.", fix='offload="disk"')
    if not 0 <= freeze_at_start <= 1:
        raise ConfigError(
            f"freeze_at_start is {freeze_at_start!r}, but must be a number between 0 and 1.", fix="freeze_at_start=0.5"
        )
    source = Source(
        name,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        trust_remote_code=trust_remote_code,
        offloaded=freeze_at_start,
        offload=offload,
    )
    return load_offloaded(auto_class, source, device=device, dtype=dtype, **options)


def load_offloaded(
    auto_class: str, source: Source, *, device: torch.device | str | None = None, **options: Any
) -> PreTrainedModel:
    """Load what ``source.offloaded`` leaves onto ``device``; arguments and errors as of ``from_pretrained``."""
    device = torch.device(device) if device is not None else _accelerator()
    loading = {"dtype", "ignore_mismatched_sizes"}
    config = load("AutoConfig", source, **{name: value for name, value in options.items() if name not in loading})
    places = _device_map(config, auto_class, source, device)
    log = logging.getLogger("accelerate.big_modeling")
    level, log.level = log.level, logging.ERROR  # it warns of what is on disk, as was asked for
    try:
        model: PreTrainedModel = load(auto_class, source, device_map=places, **options)
    finally:
        log.setLevel(level)
    take_over(model)
    model.__dict__.pop("hf_device_map", None)  # for Trainer, it is a model on one device
    return model


def _device_map(config: PretrainedConfig, auto_class: str, source: Source, device: torch.device) -> dict[str, Any]:
    """The place of every module: "disk" or "cpu" for the lowest blocks and input embeddings, or ``device``."""
    import transformers

    with torch.device("meta"), keep_random_state():
        model = getattr(transformers, auto_class).from_config(copy.deepcopy(config))
    tied = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m._parameters.values()}
    stacks = find_stacks(model)
    away = {stack.block_name(index) for stack in stacks[:1] for index in range(int(source.offloaded * len(stack)))}
    away |= {
        name
        for name, module in model.named_modules()
        if away and isinstance(module, nn.Embedding) and id(module.weight) not in tied and not _in_blocks(name, stacks)
    }
    if not away:
        return {"": device}
    return _partition(model, "", away, source.offload, device)


def _partition(module: nn.Module, name: str, away: set[str], kind: str, device: torch.device) -> dict[str, Any]:
    """A device map that names as few modules as possible."""
    if name in away:
        return {name: kind}
    if not any(one.startswith(f"{name}." if name else "") for one in away):
        return {name: device}
    found: dict[str, Any] = {}
    for child, inner in module.named_children():
        found |= _partition(inner, f"{name}.{child}" if name else child, away, kind, device)
    own = [*module._parameters, *module._buffers]
    return found | {f"{name}.{key}" if name else key: device for key in own}


def _in_blocks(name: str, stacks: list[Any]) -> bool:
    return any(name.startswith(f"{stack.path}.") for stack in stacks)


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())
