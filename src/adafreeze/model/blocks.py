"""Stacks of blocks: how to find them, and how to run a model from block k."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ModelError
from .modes import mode_does_more
from .patches import patched_forward
from .restore import temporarily

__all__ = [
    "Stack", "StopForward", "base_model", "configs_of", "find_stacks", "hidden_states", "is_quiet", "lookup_tables",
    "modules_outside",
    "starting_at", "unwrap", "without_cache",
]  # fmt: skip

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)

# PEFT wraps the user's model twice.
_WRAPPER_PREFIX = "base_model.model."


class StopForward(Exception):
    """Raised to end a forward pass early."""


@dataclass(frozen=True)
class Stack:
    """The ordered blocks of one encoder or decoder.

    Attributes:
        path: the name of its ModuleList in the user's model, such as ``"bert.encoder.layer"``.
        blocks: bottom to top.
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

    A stack is an outermost ``nn.ModuleList`` or ``nn.Sequential`` of transformers' ``GradientCheckpointingLayer``; or
    of at least two modules of one class that look like transformer blocks (a norm and two matrices each), if it
    contains an adapter or the model has none yet. Without either, any list of modules of one class with adapters.

    Raises:
        ModelError: there is no stack, its layers share their weights, or ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise _no_module(model)
    _refuse_shared_layers(model)
    adapters = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]

    def adapted(entries: list[nn.Module]) -> bool:
        parts = (part for entry in entries for part in entry.modules())
        return not adapters or any(isinstance(part, BaseTunerLayer) for part in parts)

    # Those of transformers count even without adapters: an adapted decoder may read such an encoder.
    lists = _outermost_lists(model, _of_transformers)
    own = list(lists)
    lists |= _outermost_lists(model, lambda entries: _alike(entries, _is_block), apart_from=own)
    kept = {name: entries for name, entries in lists.items() if name in own or adapted(entries)}
    if not any(map(adapted, kept.values())):
        kept = {name: entries for name, entries in _outermost_lists(model, _alike).items() if adapted(entries)} or lists
    if kept:
        return [Stack(user_name(name), tuple(kept[name])) for name, _ in model.named_modules() if name in kept]
    around = f" around its adapter {user_name(adapters[0])}" if adapters else ""
    raise ModelError(
        f"No stack of transformer blocks was found in {users_class(model)}: no nn.ModuleList or nn.Sequential{around}.",
        fix="Use a transformers model, or keep your blocks in one nn.ModuleList.",
    )


def _of_transformers(entries: list[nn.Module]) -> bool:
    return all(isinstance(entry, GradientCheckpointingLayer) for entry in entries)


def _alike(entries: list[nn.Module], each: Callable[[nn.Module], bool] = lambda _: True) -> bool:
    """Whether these are at least two modules of one class, each with weights and a forward pass."""
    one_class = len({type(entry) for entry in entries}) == 1
    return len(entries) > 1 and one_class and all(_runs(entry) and each(entry) for entry in entries)


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward pass (an nn.ModuleList has none) and weights."""
    return type(module).forward is not nn.Module.forward and any(True for _ in module.parameters())


def _is_block(module: nn.Module) -> bool:
    """Whether it has a norm and two matrices, unlike a convolution or one of several heads."""
    normalizes = any("norm" in type(part).__name__.lower() for part in module.modules())
    return normalizes and sum(parameter.ndim == 2 for parameter in module.parameters()) > 1


def _outermost_lists(
    model: nn.Module, is_stack: Callable[[list[nn.Module]], bool], apart_from: Sequence[str] = ()
) -> dict[str, list[nn.Module]]:
    """Entries of each matching list by its name, except lists inside or around one of ``apart_from``."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in (*found, *apart_from))
        if inside or any(path == name or path.startswith(f"{name}.") for path in apart_from):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and is_stack(list(module)):
            found[name] = list(module)
    return found


def _refuse_shared_layers(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    layers, groups = getattr(config, "num_hidden_layers", None), getattr(config, "num_hidden_groups", None)
    if isinstance(layers, int) and isinstance(groups, int) and groups < layers:  # ALBERT
        blocks = groups * getattr(config, "inner_group_num", 1)
        raise ModelError(
            f"All {layers} layers of {users_class(model)} share the weights of {blocks} block{'s' * (blocks > 1)}, "
            "so no layer can freeze alone.",
            fix="Use a model whose layers have separate weights, or train without adafreeze.",
        )


def _no_module(model: Any) -> ModelError:
    """For an object around a model: a SetFitModel, a pipeline, a Trainer."""
    inner = next((name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)), None)
    return ModelError(
        f"The model is a {type(model).__name__}, not the nn.Module whose forward pass is trained.",
        fix=f"Safe(model.{inner}, ...)" if inner else "Safe(model, ...) with the nn.Module itself",
    )


def base_model(model: nn.Module) -> nn.Module:
    """The user's model inside PEFT's wrapper."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def users_class(model: nn.Module) -> str:
    """Name of the class of ``base_model(model)``."""
    return type(base_model(model)).__name__


def user_name(name: str) -> str:
    """A dotted name without PEFT's prefix."""
    return name.removeprefix(_WRAPPER_PREFIX)


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


def modules_outside(modules: Iterable[nn.Module], stacks: Sequence[Stack]) -> list[nn.Module]:
    """Those of ``modules`` that are in no block of ``stacks``."""
    inside = {id(module) for stack in stacks for block in stack.blocks for module in block.modules()}
    return [module for module in modules if id(module) not in inside]


def lookup_tables(model: nn.Module, *, tied: bool = False) -> dict[str, nn.Embedding]:
    """The embedding tables of ``model`` by name; unless ``tied``, only those whose weight no head has, too."""
    others = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    elsewhere = set() if tied else {id(p) for module in others for p in module._parameters.values()}
    tables = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    return {name: table for name, table in tables if id(table.weight) not in elsewhere}


def hidden_states(output: Any) -> Tensor:
    """The hidden states in a block's output: the tensor itself, or the first entry of a tuple or mapping."""
    if isinstance(output, Mapping):
        return hidden_states(next(iter(output.values())))
    return output if isinstance(output, Tensor) else output[0]


def without_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, filled: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Remove the key-value cache, which decoders pass even in training; a filled one only if ``filled``."""

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

    Every skipped block returns the whole recorded output of the last one: a T5 block returns a tuple with the position
    bias that block 0 computed. Embeddings, masks, rotary tables and head run as usual.
    """
    with ExitStack() as undo:
        for position, stack in enumerate(stacks):
            for block in stack.blocks[: depths.get(stack.path, 0)]:
                recorded = boundary[position]
                undo.enter_context(patched_forward(block, lambda *_, _recorded=recorded, **__: _recorded))
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without key-value cache, activation checkpointing or compiled code."""
    modules = list(model.modules())
    configs = configs_of(modules)
    changes = [
        *((module, "training", False) for module in modules if not mode_does_more(module)),
        *((m, "gradient_checkpointing", False) for m in modules if "gradient_checkpointing" in m.__dict__),
        *((config, "use_cache", False) for config in configs if hasattr(config, "use_cache")),
    ]
    # Eager, because each pass through a compiled block would compile it once more.
    token = _QUIET.set(True)
    try:
        with temporarily(changes), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _QUIET.reset(token)


def configs_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations of the models among ``modules``; a wrapper around one has none of its own."""
    found = (module.__dict__.get("config") for module in modules)
    return list({id(config): config for config in found if config is not None}.values())


def is_quiet() -> bool:
    """Whether passes are adafreeze's own (scores, flows, analysis), and not evaluations of the user's."""
    return _QUIET.get()


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter that is not offloaded (meta)."""
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))
