"""DeepSpeed ZeRO: frozen weights are put back after every step.

ZeRO steps flat copies of each param group, not the model's own parameters. A frozen parameter has zeros for a gradient
there, and momentum and decay still move it. So its part of the flat tensor is saved before each step and written back
after it, which is exact for every optimizer and schedule.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..model import Unit
from ..model.patches import patched
from ..model.restore import temporarily
from ..model.units import frozen_parameters
from .base import Parallel

__all__ = ["DeepSpeedZero", "engine_of"]

# DeepSpeed's optimizers by exact class: subclasses (ZenFlow, SuperOffload) step elsewhere. For each the attribute with
# the tensors it steps, and the one with the model's parameters in them, both by param group (in ZeRO-3, parts of it).
_LAYOUTS = {
    "DeepSpeedZeroOptimizer": ("single_partition_of_fp32_groups", "round_robin_bit16_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp32_partitioned_groups_flat", "fp16_groups"),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "bf16_groups"),
    "FP16_Optimizer": ("fp32_groups_flat", "fp16_groups"),
    "FP16_UnfusedOptimizer": ("fp32_groups", "fp16_groups"),
}
# With these the inner optimizer's step hooks do not run.
_BY_ITSELF = ("zenflow", "fused_adam_legacy", "fused_lamb_legacy")
# Trainer saves PEFT models with exclude_frozen_parameters=True, which would exclude frozen adapters too.
_CHECKPOINTING = ("save_checkpoint", "load_checkpoint", "module_state_dict", "_zero3_consolidated_16bit_state_dict")


def engine_of(model: nn.Module) -> Any | None:
    """The DeepSpeed engine that ``model`` is, or that calls it: Trainer passes only the module inside.

    DeepSpeed (seen with 0.19.8) gives the module no reference to its engine, but the engine's hooks on the module have
    it in a closure cell.
    """
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
    """Puts frozen weights back after each step of DeepSpeed.

    DeepSpeed still computes the step of frozen parameters, and their moments are not freed. While it saves or loads,
    frozen units look trainable, so that their weights are included.

    Args:
        engine: as ``deepspeed.initialize`` returns it or ``engine_of`` finds it.
        units: by name.

    Attributes:
        stage: of ZeRO, 0 to 3.

    Raises:
        RunError: this version of DeepSpeed has other optimizers.
    """

    def __init__(self, engine: Any, units: Mapping[str, Unit]) -> None:
        self.engine, self.units = engine, units
        self.stage = int(_attribute(engine, "zero_optimization_stage")())
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        self.collective = self.stage == 3
        if self.stage == 3:
            self.no_cache = "under ZeRO-3 a forward pass is a collective, and ranks do not miss the same samples"
            self.no_offload = "ZeRO-3 spreads the weights over the ranks already, and offload_param moves them"
        self.no_budget = "a step of DeepSpeed, with its buffers, cannot be rehearsed"
        self.frozen: frozenset[str] = frozenset()
        self._still: dict[int, list[tuple[int, int]]] = {}
        self._before: list[tuple[Tensor, Tensor]] = []
        self._wrapper = _wrapper_in(_attribute(engine, "optimizer"))
        self._undo = ExitStack()
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

    @classmethod
    def find(cls, model: nn.Module, optimizer: Any, units: Mapping[str, Unit]) -> DeepSpeedZero | None:
        """If ``model`` is a DeepSpeed engine or the module inside one.

        Raises:
            RunError: it is neither, and the optimizer is DeepSpeed's.
        """
        engine, wrapper = engine_of(model), _wrapper_in(optimizer)
        if engine is None and wrapper is not None:
            raise RunError(
                f"The optimizer is DeepSpeed's {type(wrapper).__name__}, but the model is neither its engine nor the "
                "module inside one.",
                fix="Safe(model_engine, ...), with model_engine, *_ = deepspeed.initialize(...)",
            )
        return None if engine is None else cls(engine, units)

    def after_freeze(self, frozen: Iterable[str]) -> None:
        """From now on, put the weights of the units ``frozen``, and no others, back after every step."""
        self.frozen = frozenset(frozen)
        stopped = {id(parameter) for parameter in frozen_parameters(self.units, self.frozen)}
        still: dict[int, list[tuple[int, int]]] = {}
        for group, (tensors, parameters) in enumerate(self._parts()):
            for parameter, tensor, start, length in self._places(group, tensors, parameters):
                if id(parameter) in stopped:
                    still.setdefault(id(tensor), []).append((start, length))
        self._still = {tensor: _joined(places) for tensor, places in still.items()}

    def release(self) -> None:
        """Remove all hooks, so that every weight moves again."""
        self.frozen, self._still = frozenset(), {}
        self._undo.close()

    def _parts(self) -> list[tuple[list[Tensor], list[nn.Parameter]]]:
        """(stepped tensors, the model's parameters in them); empty if DeepSpeed steps the model's own parameters."""
        if self._wrapper is None:
            return []
        kind = type(self._wrapper).__name__
        layout = _LAYOUTS.get(kind)
        if layout is None or any(getattr(self._wrapper, name, False) for name in _BY_ITSELF):
            raise _unknown(f"its optimizer is a {kind}" + ("" if layout is None else " that steps by itself"))
        stepped, inside = (_attribute(self._wrapper, name) for name in layout)
        return [
            ([part] if isinstance(part, Tensor) else list(part), list(parameters))
            for part, parameters in zip(stepped, inside, strict=True)
        ]

    def _places(
        self, group: int, tensors: list[Tensor], parameters: list[nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
        """(parameter, tensor, start, length) of the parameters of one part on this rank."""
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
                if fragment is not None:  # part of it is on this rank
                    address = _attribute(fragment, "get_hp_fragment_address")()
                    yield parameter, tensor, address.start, address.numel
        else:
            for parameter in parameters:
                length = _attribute(parameter, "partition_numel")() if self.stage == 3 else parameter.numel()
                yield parameter, tensor, begin, length
                begin += length

    def _hook(self, optimizer: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            raise _unknown(f"the optimizer inside, a {type(optimizer).__name__}, takes no step hooks")
        self._undo.callback(optimizer.register_step_pre_hook(self._before_step).remove)
        self._undo.callback(optimizer.register_step_post_hook(self._after_step).remove)

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
            parameters = frozen_parameters(self.units, self.frozen)
            with temporarily((parameter, "requires_grad", True) for parameter in parameters):
                return original(*args, **kwargs)

        self._undo.enter_context(patched(self.engine, name, as_if_trainable))


def _joined(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted (start, length), with neighbors merged."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(places):
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((start, length))
    return joined


def _wrapper_in(optimizer: Any) -> Any | None:
    """DeepSpeed's wrapper of the real optimizer; None for ZeRO-0."""
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
        f"adafreeze cannot tell which tensors DeepSpeed {version} steps: {what}.",
        fix="pip install deepspeed==0.19.8, without ZenFlow and SuperOffload; or use FSDP2 or DDP.",
    )
