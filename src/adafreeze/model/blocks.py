"""Stacks and blocks: where they are, what a block hands on, and how to run a model from block k."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .patches import patched_forward

__all__ = [
    "Stack",
    "StopForward",
    "find_stacks",
    "hidden_states",
    "starting_at",
    "unwrap",
    "without_cache",
]

# PEFT wraps the user's model twice; its prefix says nothing to a reader of logs and journals.
_WRAPPER_PREFIXES = ("base_model.model.",)


class StopForward(Exception):
    """Raised inside a forward pass to leave it once everything of interest was seen."""


@dataclass(frozen=True)
class Stack:
    """The ordered blocks of one encoder or decoder.

    Attributes:
        path: the dotted name of its ModuleList in the user's model, e.g. ``"bert.encoder.layer"``.
        blocks: the blocks, bottom to top.
    """

    path: str
    blocks: tuple[nn.Module, ...]

    def block_name(self, index: int) -> str:
        """``"bert.encoder.layer.3"`` for block 3."""
        return f"{self.path}.{index}"

    def __len__(self) -> int:
        return len(self.blocks)


def find_stacks(model: nn.Module) -> list[Stack]:
    """Find the stacks of ``model`` in the order of its modules (an encoder before its decoder).

    A stack is an outermost ``nn.ModuleList`` whose entries are all transformers'
    ``GradientCheckpointingLayer``; in a model that has none, an outermost ModuleList of at least two entries of
    one class.

    Raises:
        ModelError: nothing in the model looks like a stack of blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def of_transformers(entries: list[nn.Module]) -> bool:
        return all(isinstance(entry, GradientCheckpointingLayer) for entry in entries)

    def of_one_class(entries: list[nn.Module]) -> bool:
        weights = any(True for _ in entries[0].parameters())
        return len(entries) > 1 and len({type(entry) for entry in entries}) == 1 and weights

    for is_stack in (of_transformers, of_one_class):
        stacks = list(_outermost_lists(model, is_stack))
        if stacks:
            return stacks
    raise ModelError(
        f"No stack of transformer blocks was found in {type(model).__name__}.",
        cause="adafreeze looks for an nn.ModuleList of transformer layers, and this model has none.",
        fix="Use a transformers model, or keep your blocks in one nn.ModuleList.",
    )


def _outermost_lists(model: nn.Module, is_stack: Callable[[list[nn.Module]], bool]) -> Iterator[Stack]:
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(path + ".") for path in found):
            continue
        if isinstance(module, nn.ModuleList) and len(module) and is_stack(list(module)):
            found.append(name)
            yield Stack(user_name(name), tuple(module))


def user_name(name: str) -> str:
    """The dotted name as in the model before PEFT wrapped it."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, a DeepSpeed engine or torch.compile."""
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", ())
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, engine)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple or a mapping."""
    if isinstance(output, Mapping):
        return hidden_states(next(iter(output.values())))
    return output if isinstance(output, Tensor) else output[0]


def without_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, filled: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments without the cache for generation that decoders hand to it in training too.

    Args:
        args: of the block.
        kwargs: of the block.
        filled: leave it out although it holds something.
    """

    def dropped(value: Any) -> bool:
        length = getattr(value, "get_seq_length", None)
        return length is not None and (filled or length() == 0)

    if not any(map(dropped, (*args, *kwargs.values()))):
        return args, kwargs
    kept = {name: None if dropped(value) else value for name, value in kwargs.items()}
    if "use_cache" in kept:
        kept["use_cache"] = False
    return tuple(None if dropped(value) else value for value in args), kept


@contextmanager
def starting_at(boundary: Mapping[int, Any], stacks: list[Stack], depths: Mapping[str, int]) -> Iterator[None]:
    """Skip the lowest ``depths[path]`` blocks of each stack: they return ``boundary[position of the stack]``.

    Every skipped block returns the recorded output of the last one, whole: a T5 block hands on a tuple with the
    position bias that block 0 made, and whoever calls the blocks unpacks what its own family returns.
    Embeddings, masks, rotary tables and head run untouched.
    """
    with ExitStack() as undo:
        for position, stack in enumerate(stacks):
            for block in stack.blocks[: depths.get(stack.path, 0)]:
                recorded = boundary[position]
                undo.enter_context(patched_forward(block, lambda *_, _recorded=recorded, **__: _recorded))
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without key-value cache, checkpointing or compiled code; every flag is put back as it was."""
    training = [(module, module.training) for module in model.modules()]
    checkpointing = [
        (module, module.gradient_checkpointing)
        for module in model.modules()
        if "gradient_checkpointing" in module.__dict__
    ]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for module, _ in training:
            module.training = False
        for module, _ in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        for config, _ in caching:
            config.use_cache = False
        with torch.compiler.set_stance("force_eager"):  # each look at a compiled block would compile it once more
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for module, value in checkpointing:
            module.gradient_checkpointing = value
        for config, value in caching:
            config.use_cache = value


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter."""
    return next(model.parameters()).device
