"""Stage: a model set up so that its training step can be rehearsed at any prefix depth."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..costs.memory import bytes_of
from ..freeze import Freezer, Prefix
from ..model import Stack, find_stacks, find_units, trace_flow
from ..model.backends import find_backend
from ..model.flow import chains_of
from ..model.obstacles import find_obstacles, remedies, units_below
from ..model.patches import patched_forward
from ..model.units import some, units_along
from .checkpointing import Checkpointing
from .optimizer import optimizer_bytes
from .planned import PlannedStep
from .rehearsal import Rehearsal, faked, rehearse

__all__ = ["QUANTISED", "Stage"]

# Bytes an element of a quantised weight, scales included: nf4 with double quantisation, and int8 with a scale a row.
QUANTISED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


# Of a stack of like blocks so many live ones say what each further one costs, and that it is the same.
FEW = (3, 4, 5)


class Stage:
    """A model set up so that its step can be rehearsed at any prefix depth; on leaving it is as it was before.

    Args:
        module: with adapters in its blocks.
        batch: makes inputs of so many samples for it.
        optimizer: by name.
        mixed_precision: bfloat16 autocast.
        quantization: None, or a name in QUANTISED.
        accumulate: gradients are there from the start.
        target: ``"cpu"`` or ``"cuda"``.
        rows: of the batch on which is looked what stands below each stack.
        fake: False to run the steps for real, on the CPU.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Callable[[int, nn.Module], dict[str, Any]],
        optimizer: str,
        mixed_precision: bool,
        quantization: str | None,
        accumulate: bool,
        *,
        target: str,
        fake: bool,
        rows: int = 1,
    ) -> None:
        self.module, self.batch, self.optimizer, self.target = module, batch, optimizer, target
        self.mixed_precision, self.quantization, self.accumulate = mixed_precision, quantization, accumulate
        self.fake, self._traced_rows = fake, rows
        self._few: dict[tuple[int, int, bool, int], Rehearsal] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Stage:
        try:
            self._set_up()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def _set_up(self) -> None:
        module = self.module
        self._undo.callback(module.train, module.training)
        module.train()
        mode = self._undo.enter_context(faked(module)) if self.fake else nullcontext()
        self.stacks = find_stacks(module)
        backend = find_backend(module)
        self.units = find_units(module, self.stacks, backend)
        tensors: list[bool] = []
        first = self.stacks[0].blocks[0]
        watch = first.register_forward_hook(lambda _, __, output: tensors.append(torch.is_tensor(output)))
        with mode:
            inputs = self._inputs(self._traced_rows)
            inputs = tree_map_only(Tensor, torch.empty_like, inputs) if self.fake else inputs
            self.flows = trace_flow(module, self.stacks, inputs)
        watch.remove()
        self.chains = units_along(chains_of(self.flows), self.stacks, self.units)
        self.obstacles = find_obstacles(module, self.stacks, self.units, self.flows)
        self.paying = units_below(self.units, self.obstacles)
        self.freezer = Freezer(self.units, backend)
        self.prefix = Prefix(module, self.stacks, self.flows)
        self.recompute = Checkpointing(module, self.stacks)
        self.was_checkpointed = any(getattr(b, "gradient_checkpointing", False) for b in self.recompute.blocks.values())
        self._undo.callback(self.freezer.restore)
        self._undo.callback(self.recompute.restore)
        self._undo.callback(self.prefix.restore)
        if not self.was_checkpointed:
            self.recompute.install()
        self.alike = self.fake and len(self.stacks) == 1 and all(tensors) and _alike(self.stacks[0])
        self.adapters = bytes_of(p for p in module.parameters() if p.requires_grad)
        self.shrunk, self.dequantised = self._quantised()

    @property
    def name(self) -> str:
        """The model's class."""
        return type(unwrapped(self.module)).__name__

    def _inputs(self, rows: int) -> dict[str, Any]:
        return self.batch(rows, self.module)

    def step(self, rows: int, *, recompute: bool = False) -> PlannedStep:
        """One step on ``rows`` samples at the depth as it is; with activation checkpointing on, or off."""
        return self._priced(self._rehearse(rows, recompute))

    def lowest(self, depth: int) -> list[str]:
        """Names of the units in the lowest blocks, ``depth`` in all chains together, whose freezing can pay.

        In every chain the topmost block with adapters is left out: it is the last that a run freezes.
        """
        blocks = sum(map(len, self.chains))
        names: list[str] = []
        for chain in self.chains:
            top = max((index for index, units in enumerate(chain) if units), default=0)
            count = min(round(depth / blocks * len(chain)), top)
            names += [name for units in chain[:count] for name in units if name in self.paying]
        return names

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze these units, beside what is frozen."""
        self.freezer.freeze(name for name in names if name not in self.freezer.frozen)
        self.prefix.update()

    def _rehearse(self, rows: int, recompute: bool = False) -> Rehearsal:
        """One step; of a high stack of like blocks with a few of them only, as each further one costs the same."""
        trained = bytes_of(parameter for parameter in self.module.parameters() if parameter.requires_grad)
        depth = sum(self.prefix.depths.values())
        live = sum(map(len, self.stacks)) - depth
        step = None
        if self.alike and live > max(FEW):
            step = self._extended(rows, recompute, depth, live)
        if step is None:
            step = self._run(rows, recompute)
        return dataclasses.replace(step, gradients=trained)

    def _extended(self, rows: int, recompute: bool, depth: int, live: int) -> Rehearsal | None:
        """From FEW live blocks to all; None where they do not lie on a line: another moment holds the most then."""
        kept = min(depth, 2)
        for count in FEW:
            if (kept, rows, recompute, count) not in self._few:
                self._few[kept, rows, recompute, count] = self._run(rows, recompute, live=count)
        points = [self._few[kept, rows, recompute, count] for count in FEW]
        costs = {}
        for name in ("saved", "peak", "forward_flops", "backward_flops"):
            first, second, last = (getattr(point, name) for point in points)
            if second - first != last - second:
                return None
            costs[name] = last + (live - max(FEW)) * (last - second)
        of_one = max(flops for _, flops in points[0].parts)
        costs["forward_flops"] += (depth - kept) * of_one
        return dataclasses.replace(points[0], **costs, parts=tuple((0, of_one) for _ in points[0].parts))

    def _run(self, rows: int, recompute: bool, live: int | None = None) -> Rehearsal:
        """With all blocks; or with the lowest and the highest of the prefix, and ``live`` above it."""

        def forward(**inputs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision):
                return self.prefix.rehearse(**inputs)

        with ExitStack() as undo:
            undo.enter_context(self._checkpointing(recompute))
            for block in self._omitted(live) if live is not None else ():
                undo.enter_context(patched_forward(block, _handed_on))
            return rehearse(
                self.module,
                self._inputs(rows),
                forward=forward,
                target=self.target,
                gradients=self.accumulate,
                parts=[block for stack in self.stacks for block in stack.blocks],
                fake=self.fake,
            )

    @contextmanager
    def _checkpointing(self, on: bool) -> Iterator[None]:
        """As Trainer switches it on, or as it is on already; a model that has none recomputes its blocks in our way."""
        self.recompute.chosen = frozenset()
        self.prefix.restore()
        try:
            with _put_back(self.module), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its name has changed
                if not on:
                    for module in self.module.modules():
                        if "gradient_checkpointing" in vars(module):
                            module.gradient_checkpointing = False  # type: ignore[assignment]
                elif not self.was_checkpointed:
                    try:
                        self.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
                    except (AttributeError, ValueError):
                        self.recompute.chosen = frozenset(self.recompute.blocks)
                self.prefix.update()  # behind it, as in a run
                yield
                self.prefix.restore()
        finally:
            self.prefix.update()

    def _omitted(self, live: int) -> list[nn.Module]:
        (stack,) = self.stacks
        depth = self.prefix.depths[stack.path]
        below = stack.blocks[1 : max(1, depth - 1)]
        above = stack.blocks[depth + 1 : len(stack) - live + 1]
        return [*below, *above]

    def _priced(self, step: Rehearsal) -> PlannedStep:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        state, temporary = optimizer_bytes(self.optimizer, trained)
        weights = step.resident - self.adapters - self.shrunk
        passes = max(step.peak, step.resident + step.gradients + temporary)
        peak = passes + state - self.shrunk + self.dequantised
        depths = [(stack, self.prefix.depths[stack.path]) for stack in self.stacks]
        in_prefix = [index < depth for stack, depth in depths for index in range(len(stack))]
        skipped = sum(flops for (_, flops), inside in zip(step.parts, in_prefix, strict=True) if inside)
        return PlannedStep(
            prefix=sum(in_prefix),
            weights=weights,
            adapters=self.adapters,
            gradients=step.gradients,
            optimizer=state,
            saved=step.saved,
            transient=peak - weights - self.adapters - state - step.saved,
            peak=peak,
            forward_flops=step.forward_flops,
            backward_flops=step.backward_flops,
            cached_flops=step.flops - skipped,
        )

    def _quantised(self) -> tuple[int, int]:
        """Bytes that quantised weights save, and those of the largest when it is used."""
        if self.quantization is None:
            return 0, 0
        layers = {
            id(module): module.weight
            for stack in self.stacks
            for block in stack.blocks
            for module in block.modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        }
        saved = sum(int(w.numel() * (w.element_size() - QUANTISED[self.quantization])) for w in layers.values())
        return saved, max((w.numel() * w.element_size() for w in layers.values()), default=0)

    def causes(self, rows: int) -> Iterator[str]:
        """What makes the step hold more than it would have to, with the remedy; to be asked before anything freezes."""
        module = self.module
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        frozen = {p.dtype for p in module.parameters() if not p.requires_grad and p.is_floating_point()}
        if any(p.dtype == torch.float32 for p in trained.values()) and frozen & {torch.bfloat16, torch.float16}:
            half = "bfloat16" if torch.bfloat16 in frozen else "float16"
            yield (
                f"The adapters are float32 on a {half} base, as PEFT makes them: each adapted layer keeps its input in "
                "float32 too. get_peft_model(..., autocast_adapter_dtype=False) keeps it once (bf16 adapters train "
                "less precisely)."
            )
        if with_dropout := self._without_adapter_dropout(rows):
            more = self._rehearse(rows).saved / with_dropout - 1
            yield (
                f"Adapter dropout keeps a dropped copy of the input of every target: {more:+.0%} saved bytes. "
                "LoraConfig(lora_dropout=0.0); blocks that freeze lose it by themselves."
            )
        if len(self.paying) < len(self.units):
            names = some([obstacle.short for obstacle in self.obstacles])
            yield (
                f"{len(self.units) - len(self.paying)} of {len(self.units)} units cannot join a frozen prefix, and do "
                f"not freeze: {names} trains in or below their blocks. "
                f"{remedies(self.obstacles, self.freezer.backend)}."
            )
        if getattr(unwrapped(module), "_require_grads_hook", None) or getattr(
            unwrapped(module), "_require_grads_hooks", None
        ):
            yield (
                "enable_input_require_grads() makes the embeddings' output require grad: a plain run then keeps frozen "
                "blocks' activations too. adafreeze's prefix does not."
            )

    def _without_adapter_dropout(self, rows: int) -> int:
        """Saved bytes of the plain step without adapter dropout; 0 if there is none."""
        backend = self.freezer.backend
        slots = [
            (parent, key, parent.get_submodule(key))
            for unit in self.units.values()
            for site in unit.sites
            for parent, key in backend.dropouts(site)
            if getattr(parent.get_submodule(key), "p", 0) > 0
        ]
        if not slots:
            return 0
        self._few.clear()
        try:
            for parent, key, _ in slots:
                parent.set_submodule(key, nn.Identity())
            return self._rehearse(rows).saved
        finally:
            self._few.clear()
            for parent, key, dropout in slots:
                parent.set_submodule(key, dropout)


def _alike(stack: Stack) -> bool:
    """Whether all blocks are of one make: their modules, shapes, and the numbers and words they are set up with."""

    def make(block: nn.Module) -> list[Any]:
        settings: list[Any] = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()]
        for name, module in block.named_modules():
            plain = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, (int, float, str, bool, type(None))) and key not in ("layer_idx", "layer_id")
            }
            settings.append((name, type(module), plain))
        return settings

    return all(make(block) == make(stack.blocks[0]) for block in stack.blocks[1:])


# What transformers sets on modules when it switches checkpointing on.
_SET_BY_CHECKPOINTING = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Let checkpointing be switched on or off within, and leave all modules as they were."""
    before = [
        (module, {name: vars(module)[name] for name in _SET_BY_CHECKPOINTING if name in vars(module)}, dict(hooks))
        for module in model.modules()
        for hooks in (module._forward_hooks,)
    ]
    try:
        yield
    finally:
        for module, values, hooks in before:
            for name in _SET_BY_CHECKPOINTING:
                vars(module).pop(name, None)
            vars(module).update(values)
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def _handed_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers."""
    base = getattr(module, "get_base_model", None)
    return base() if base is not None else module
