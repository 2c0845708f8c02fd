"""DeepSpeed: what ZeRO steps is no longer the model's own parameters, so a freeze must be told to its optimizer.

ZeRO copies each param group into one flat tensor. A parameter that freezes gives zeros there instead of a gradient, and
momentum and decay go on moving it. Where every unit has a param group of its own, a learning rate of 0 holds it still.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RunError
from ...model import Unit, find_stacks, find_units
from ...model.backends import PeftBackend
from .base import Parallel

__all__ = ["DeepSpeedZero", "engine_of", "is_deepspeed", "param_groups"]

# DeepSpeed's optimizers, by their exact class: subclasses (ZenFlow, SuperOffload) step elsewhere. For each: what it
# steps, and the parameters of the model in it; both lists run over the param groups, or in ZeRO-3 over parts of them.
_LAYOUTS = {
    "DeepSpeedZeroOptimizer": ("single_partition_of_fp32_groups", "bit16_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp32_partitioned_groups_flat", "fp16_groups"),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "bf16_groups"),
    "FP16_Optimizer": ("fp32_groups_flat", "fp16_groups"),
    "FP16_UnfusedOptimizer": ("fp32_groups", "fp16_groups"),
}
# Trainer saves PEFT models with exclude_frozen_parameters=True: base weights are meant, frozen adapters would go too.
_CHECKPOINTING = ("save_checkpoint", "load_checkpoint", "module_state_dict", "_zero3_consolidated_16bit_state_dict")
_FIX = (
    "model_engine, *_ = deepspeed.initialize(model=model, config=config, "
    "optimizer=torch.optim.AdamW(adafreeze.param_groups(model), lr=2e-4)); in Trainer, which drops optimizers=: "
    'Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": adafreeze.param_groups(model), "lr": 2e-4})) '
    'and no "optimizer" in the DeepSpeed config'
)


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, lr: float | None = None, granularity: str = "block"
) -> list[dict[str, Any]]:
    """Param groups in which units can freeze under DeepSpeed; to be made before ``deepspeed.initialize``.

    One group for each unit, bottom to top, with its name under ``"adafreeze_unit"``; one for each set of units that
    share parameters, which stands still once all of them are frozen; the last holds what else trains.

    Args:
        model: with PEFT adapters in its blocks.
        weight_decay: of every group.
        lr: of every group; that of the optimizer if None.
        granularity: as in :class:`~adafreeze.SafeConfig`.

    Raises:
        ModelError: the model has no adapters by block.
    """
    units = find_units(model, find_stacks(model), PeftBackend(model), granularity)
    owners = _owners(units)
    sets: dict[frozenset[str], list[nn.Parameter]] = {frozenset([name]): [] for name in units}
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if id(parameter) in owners:
            sets.setdefault(owners[id(parameter)], []).append(parameter)
        elif parameter.requires_grad:
            others.append(parameter)
    common = {"weight_decay": weight_decay} | ({} if lr is None else {"lr": lr})
    groups: list[dict[str, Any]] = []
    for names, parameters in sets.items():
        if parameters:
            unit = {"adafreeze_unit": next(iter(names))} if len(names) == 1 else {}
            groups.append({"params": parameters, **common, **unit})
    return [*groups, {"params": others, **common}] if others else groups


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

    Just for the step of a frozen group its learning rate and weight decay are 0; between the steps they are as the
    scheduler set them, so schedulers, logs and checkpoints see nothing of it. The first step after a freeze is compared
    before and after. While DeepSpeed saves or loads, frozen units look trainable, or their weights would be left out.

    Args:
        engine: DeepSpeed's, as ``deepspeed.initialize`` returns it or :func:`engine_of` finds it.
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
        self._still: dict[int, Tensor] = {}
        self._unproven: dict[int, Tensor | None] = {}
        self._swapped: list[tuple[dict[str, Any], str, Any]] = []
        self._wrapper = _wrapper_in(_attribute(engine, "optimizer"))
        self._undo: list[Callable[[], None]] = []
        if self._wrapper is not None:
            self._parts()
            # ZeRO-3 with part of the optimizer offloaded has two of them.
            for inner in (_attribute(self._wrapper, "optimizer"), getattr(self._wrapper, "backup_optimizer", None)):
                if inner is not None:
                    self._hook(inner)
        for name in _CHECKPOINTING:
            self._wrap(name)

    def check(self) -> None:
        """See that what DeepSpeed steps as one belongs to one unit.

        Raises:
            RunError: a param group mixes units, or a unit with something else.
        """
        owners, mixed = _owners(self.units), []
        for _, parameters in self._parts():
            kinds = {owners.get(id(parameter), frozenset()) for parameter in parameters}
            if len(kinds) > 1:
                mixed.append(sorted(frozenset().union(*kinds)) + ([] if all(kinds) else ["other parameters"]))
        if mixed:
            names = ", ".join(mixed[0][:3]) + (f" and {len(mixed[0]) - 3} more" if len(mixed[0]) > 3 else "")
            raise RunError(
                f"{len(mixed)} of the optimizer's param groups hold more than one unit: {names}.",
                cause=f"{self.name} makes one flat tensor of each group and goes on moving what froze in it, by "
                "momentum and weight decay; it can only be held still as a whole.",
                fix=_FIX,
            )

    def after_freeze(self, frozen: Iterable[str]) -> None:
        """From now on the units ``frozen``, and no others, stand still in every step."""
        self.frozen = frozenset(frozen)
        stopped = {id(parameter) for parameter in self._frozen_parameters()}
        before = self._still
        self._still = {
            id(tensor): tensor
            for tensors, parameters in self._parts()
            if parameters and all(id(parameter) in stopped for parameter in parameters)
            for tensor in tensors
        }
        self._unproven = {key: None for key in self._still if key not in before or key in self._unproven}

    def release(self) -> None:
        """Take all hooks off; what was frozen moves again."""
        self.frozen, self._still, self._unproven = frozenset(), {}, {}
        while self._undo:
            self._undo.pop()()

    def _parts(self) -> list[tuple[list[Tensor], list[nn.Parameter]]]:
        """What DeepSpeed steps, each with the parameters of the model in it; nothing where it steps those."""
        if self._wrapper is None:
            return []
        layout = _LAYOUTS.get(type(self._wrapper).__name__)
        if layout is None:
            raise _unknown(f"its optimizer is a {type(self._wrapper).__name__}")
        stepped, held = (_attribute(self._wrapper, name) for name in layout)
        return [
            ([part] if isinstance(part, Tensor) else list(part), list(parameters))
            for part, parameters in zip(stepped, held, strict=True)
        ]

    def _frozen_parameters(self) -> list[nn.Parameter]:
        owners = _owners(self.units)
        every = (p for unit in self.units.values() for p in (*unit.parameters(), *unit.shared_parameters()))
        return [parameter for parameter in every if owners[id(parameter)] <= self.frozen]

    def _hook(self, optimizer: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            raise _unknown(f"the optimizer inside, a {type(optimizer).__name__}, takes no step hooks")
        self._undo.append(optimizer.register_step_pre_hook(self._before_step).remove)
        self._undo.append(optimizer.register_step_post_hook(self._after_step).remove)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._swap_back()  # a step that failed leaves its zeros
        for group in optimizer.param_groups:
            parameters = group["params"]
            if not parameters or any(id(parameter) not in self._still for parameter in parameters):
                continue
            for key in ("lr", "weight_decay"):
                if key in group:
                    self._swapped.append((group, key, group[key]))
                    group[key] = torch.zeros_like(group[key]) if isinstance(group[key], Tensor) else 0.0
            for parameter in parameters:
                if id(parameter) in self._unproven:
                    self._unproven[id(parameter)] = parameter.detach().clone()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._swap_back()
        copies = {which: copy for which, copy in self._unproven.items() if copy is not None}
        for which, copy in copies.items():
            del self._unproven[which]
            if not torch.allclose(self._still[which], copy, rtol=0, atol=0, equal_nan=True):
                raise RunError(
                    f"A frozen unit moved under {self.name}.",
                    cause=f"{type(optimizer).__name__} moves weights at lr=0 and weight_decay=0.",
                    fix="Use an optimizer whose step is proportional to lr, such as torch.optim.AdamW.",
                )

    def _swap_back(self) -> None:
        while self._swapped:
            group, key, value = self._swapped.pop()
            group[key] = value

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


def _owners(units: Mapping[str, Unit]) -> dict[int, frozenset[str]]:
    """Names of the units that each parameter belongs to, by its id."""
    owners: dict[int, frozenset[str]] = {}
    for name, unit in units.items():
        for parameter in (*unit.parameters(), *unit.shared_parameters()):
            owners[id(parameter)] = owners.get(id(parameter), frozenset()) | {name}
    return owners


def _wrapper_in(optimizer: Any) -> Any | None:
    """What DeepSpeed put around the real optimizer; None where that steps the model's own parameters (ZeRO-0)."""
    while optimizer is not None:
        of_deepspeed = type(optimizer).__module__.partition(".")[0] == "deepspeed"
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
