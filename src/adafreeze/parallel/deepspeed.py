"""DeepSpeed: what ZeRO steps is no longer the model's own parameters, so what froze is put back after every step.

ZeRO copies each param group into one flat tensor. A parameter that freezes gives zeros there instead of a gradient, and
momentum and decay go on moving it. Its place in the flat tensor is known, and what stood there before the step is
written there after it: to the last bit, whatever the optimizer, its groups and its schedule are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..model import Unit
from .base import Parallel

__all__ = ["DeepSpeedZero", "engine_of", "is_deepspeed"]

# DeepSpeed's optimizers, by their exact class: subclasses (ZenFlow, SuperOffload) step elsewhere. For each: what it
# steps, and the parameters of the model in it; both lists run over the param groups, or in ZeRO-3 over parts of them.
_LAYOUTS = {
    "DeepSpeedZeroOptimizer": ("single_partition_of_fp32_groups", "round_robin_bit16_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp32_partitioned_groups_flat", "fp16_groups"),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "bf16_groups"),
    "FP16_Optimizer": ("fp32_groups_flat", "fp16_groups"),
    "FP16_UnfusedOptimizer": ("fp32_groups", "fp16_groups"),
}
# Ways to step past the hooks of the optimizer inside.
_BY_ITSELF = ("zenflow", "fused_adam_legacy", "fused_lamb_legacy")
# Trainer saves PEFT models with exclude_frozen_parameters=True: base weights are meant, frozen adapters would go too.
_CHECKPOINTING = ("save_checkpoint", "load_checkpoint", "module_state_dict", "_zero3_consolidated_16bit_state_dict")


def is_deepspeed(model: nn.Module, optimizer: Any) -> bool:
    """Whether DeepSpeed trains ``model``: the engine, or the module inside it."""
    return engine_of(model) is not None or _wrapper_in(optimizer) is not None


def engine_of(model: nn.Module) -> Any | None:
    """The DeepSpeed engine that ``model`` is, or that calls it: Trainer hands over the module inside, alone."""
    kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    if kind is None or isinstance(model, kind):
        return model if kind is not None else None
    for hook in model._forward_pre_hooks.values():
        for cell in getattr(hook, "__closure__", None) or ():
            with suppress(ValueError):  # an empty cell
                if isinstance(cell.cell_contents, kind) and cell.cell_contents.module is model:
                    return cell.cell_contents
    return None


class DeepSpeedZero(Parallel):
    """Holds frozen units still under DeepSpeed, whatever a scheduler, a checkpoint or the optimizer says.

    DeepSpeed goes on computing the step of what froze, and holds its moments: they are not freed. While it saves or
    loads, frozen units look trainable, or their weights would be left out.

    Args:
        engine: DeepSpeed's, as ``deepspeed.initialize`` returns it or ``engine_of`` finds it.
        optimizer: of the run, to be named where there is no engine.
        units: by name.

    Attributes:
        stage: of ZeRO, 0 to 3.

    Raises:
        RunError: this DeepSpeed keeps its parameters in another way.
    """

    def __init__(self, engine: Any | None, optimizer: Any, units: Mapping[str, Unit]) -> None:
        if engine is None:
            raise RunError(
                f"DeepSpeed trains, by its {type(_wrapper_in(optimizer) or optimizer).__name__}, another model.",
                cause="The model that was handed over is neither a DeepSpeed engine nor the module inside one.",
                fix="Safe(model_engine, ...), with model_engine, *_ = deepspeed.initialize(...)",
            )
        self.engine, self.units = engine, units
        self.stage = int(_attribute(engine, "zero_optimization_stage")())
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        self.collective = self.stage == 3
        if self.stage == 3:
            self.no_cache = "under ZeRO-3 a forward pass is a collective, and ranks do not miss the same samples"
        self.no_budget = "a step of DeepSpeed, with its buffers, cannot be rehearsed"
        self.frozen: frozenset[str] = frozenset()
        self._still: dict[int, list[tuple[int, int]]] = {}
        self._before: list[tuple[Tensor, Tensor]] = []
        self._wrapper = _wrapper_in(_attribute(engine, "optimizer"))
        self._undo: list[Callable[[], None]] = []
        if self._wrapper is not None:
            self._parts()
            self.clears_gradients = True
            self.hidden = {"gradients": f"{self.name} takes gradients away as soon as they are there"}
            # ZeRO-3 with part of the optimizer offloaded has two of them.
            for inner in (_attribute(self._wrapper, "optimizer"), getattr(self._wrapper, "backup_optimizer", None)):
                if inner is not None:
                    self._hook(inner)
        if self.stage == 3:
            self.hidden = {**self.hidden, "weights": "ZeRO-3 keeps every weight in pieces, one on each rank"}
        for name in _CHECKPOINTING:
            self._wrap(name)

    def after_freeze(self, frozen: Iterable[str]) -> None:
        """From now on the units ``frozen``, and no others, stand still in every step."""
        self.frozen = frozenset(frozen)
        stopped = {id(parameter) for parameter in self._frozen_parameters()}
        still: dict[int, list[tuple[int, int]]] = {}
        for group, (tensors, parameters) in enumerate(self._parts()):
            for parameter, tensor, start, length in self._places(group, tensors, parameters):
                if id(parameter) in stopped:
                    still.setdefault(id(tensor), []).append((start, length))
        self._still = {tensor: _joined(places) for tensor, places in still.items()}

    def release(self) -> None:
        """Take all hooks off; what was frozen moves again."""
        self.frozen, self._still = frozenset(), {}
        while self._undo:
            self._undo.pop()()

    def _parts(self) -> list[tuple[list[Tensor], list[nn.Parameter]]]:
        """What DeepSpeed steps, each with the parameters of the model in it; nothing where it steps those."""
        if self._wrapper is None:
            return []
        kind = type(self._wrapper).__name__
        layout = _LAYOUTS.get(kind)
        if layout is None or any(getattr(self._wrapper, name, False) for name in _BY_ITSELF):
            raise _unknown(f"its optimizer is a {kind}" + ("" if layout is None else " that steps by itself"))
        stepped, held = (_attribute(self._wrapper, name) for name in layout)
        return [
            ([part] if isinstance(part, Tensor) else list(part), list(parameters))
            for part, parameters in zip(stepped, held, strict=True)
        ]

    def _places(
        self, group: int, tensors: list[Tensor], parameters: list[nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
        """Where the parameters of one part lie on this rank: each in which tensor, its start and its length there."""
        kind, begin = type(self._wrapper).__name__, 0
        if kind == "FP16_UnfusedOptimizer":  # one for each
            yield from ((p, tensor, 0, p.numel()) for p, tensor in zip(parameters, tensors, strict=True))
            return
        (tensor,) = tensors
        if kind == "DeepSpeedZeroOptimizer":
            begins = _attribute(self._wrapper, "round_robin_bit16_offsets")[group]
            ranks = _attribute(self._wrapper, "real_dp_process_group")[group]
            first = torch.distributed.get_rank(ranks) * tensor.numel()
            for parameter, begin in zip(parameters, begins, strict=True):
                start, end = max(begin, first), min(begin + parameter.numel(), first + tensor.numel())
                if start < end:
                    yield parameter, tensor, start - first, end - start
        elif kind == "BF16_Optimizer":
            for parameter in parameters:
                fragment = _attribute(parameter, "_hp_mapping")
                if fragment is not None:  # some of it lies on this rank
                    address = _attribute(fragment, "get_hp_fragment_address")()
                    yield parameter, tensor, address.start, address.numel
        else:
            for parameter in parameters:
                length = _attribute(parameter, "partition_numel")() if self.stage == 3 else parameter.numel()
                yield parameter, tensor, begin, length
                begin += length

    def _frozen_parameters(self) -> list[nn.Parameter]:
        owners: dict[int, set[str]] = {}
        every = [(name, p) for name, u in self.units.items() for p in (*u.parameters(), *u.shared_parameters())]
        for name, parameter in every:
            owners.setdefault(id(parameter), set()).add(name)
        return [parameter for _, parameter in every if owners[id(parameter)] <= self.frozen]

    def _hook(self, optimizer: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            raise _unknown(f"the optimizer inside, a {type(optimizer).__name__}, takes no step hooks")
        self._undo.append(optimizer.register_step_pre_hook(self._before_step).remove)
        self._undo.append(optimizer.register_step_post_hook(self._after_step).remove)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = [
            (place, place.clone())
            for group in optimizer.param_groups
            for tensor in group["params"]
            for start, length in self._still.get(id(tensor), ())
            for place in [tensor.detach().view(-1).narrow(0, start, length)]
        ]

    def _after_step(self, *_: Any) -> None:
        for place, before in self._before:
            place.copy_(before)
        self._before = []

    def _wrap(self, name: str) -> None:
        original = _attribute(self.engine, name)

        @wraps(original)
        def as_if_trainable(*args: Any, **kwargs: Any) -> Any:
            with self._looking_trainable():
                return original(*args, **kwargs)

        setattr(self.engine, name, as_if_trainable)
        self._undo.append(lambda: self.engine.__dict__.pop(name, None))

    @contextmanager
    def _looking_trainable(self) -> Iterator[None]:
        parameters = [parameter for parameter in self._frozen_parameters() if not parameter.requires_grad]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)


def _joined(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Starts and lengths in order, neighbours made one."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(places):
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((start, length))
    return joined


def _wrapper_in(optimizer: Any) -> Any | None:
    """What DeepSpeed put around the real optimizer; None where that steps the model's own parameters (ZeRO-0)."""
    while optimizer is not None:
        of_deepspeed = any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(optimizer).__mro__)
        if of_deepspeed and not isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        raise _unknown(f"its {type(holder).__name__} has no {name}") from None


def _unknown(what: str) -> RunError:
    version = getattr(sys.modules.get("deepspeed"), "__version__", "")
    return RunError(
        f"adafreeze does not know this DeepSpeed {version}: {what}.",
        cause="To hold a frozen unit still it must know which tensors DeepSpeed steps.",
        fix="pip install deepspeed==0.19.8, without ZenFlow and SuperOffload; or use FSDP2 or DDP.",
    )
