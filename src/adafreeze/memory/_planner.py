"""StepPlanner: rehearses a model's training step at any depth of the frozen prefix."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..costs.memory import bytes_of
from ..decide.policy import PolicyInput, choose
from ..freeze import Freezer, Prefix
from ..measure.draw import LARGER
from ..model import Stack, find_stacks, find_units, trace_flow
from ..model.backends import find_backend
from ..model.batch import Call
from ..model.flow import chains_of
from ..model.obstacles import find_obstacles, remedies, units_below
from ..model.patches import patched_forward, replaced_child
from ..model.units import some, units_along
from .checkpointing import Checkpointing
from .lean import lean_forward, lean_layers
from .offload import block_weights, input_tables, leaving_blocks
from .optimizer import optimizer_bytes
from .rehearsal import Rehearsal, faked, rehearse, rehearse_forward

__all__ = ["PEFT", "QUANTIZED", "PlannedStep", "StepPlanner", "Way"]

# Bytes per element of a quantized weight, scales included: nf4 with double quantization, int8 with one scale per row.
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}

# In a stack of identical blocks, only these numbers of live blocks are rehearsed, and the cost is extrapolated.
FEW = (3, 4, 5)


@dataclass(frozen=True)
class PlannedStep:
    """Bytes of one training step, and FLOPs of one micro-batch, at one depth of the frozen prefix.

    ``weights + adapters + optimizer + saved + transient = peak``

    Attributes:
        prefix: blocks in the prefix.
        weights: parameters outside the adapters, and buffers.
        adapters: parameters that train before anything freezes.
        gradients: of all live parameters.
        optimizer: state for all live parameters.
        saved: what autograd keeps of the forward pass.
        transient: the rest of the peak, including gradients.
        peak: of the whole step.
        forward_flops: of the forward pass.
        backward_flops: of the backward pass, recomputed activations included.
        cached_flops: of both passes once the prefix cache has all samples.
        offloaded: bytes that are not on the device: not among ``weights``.
        filling: where weights are offloaded, the peak of filling the cache before step 0 (of a model that was loaded
            with ``adafreeze.from_pretrained``), or of a later pass that the cache does not know; else 0.
    """

    prefix: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    saved: int
    transient: int
    peak: int
    forward_flops: int
    backward_flops: int
    cached_flops: int
    offloaded: int = 0
    filling: int = 0

    @property
    def job(self) -> int:
        """The peak of the whole run: of a step, or of filling the cache."""
        return max(self.peak, self.filling)

    @property
    def flops(self) -> int:
        """Of both passes, without the prefix cache."""
        return self.forward_flops + self.backward_flops


class Way(NamedTuple):
    """How the blocks above the prefix train: ``checkpointing`` is None, ``"selective"`` or ``"full"``.

    With ``offload`` the prefix's weights are not on the device.
    """

    lean: bool
    checkpointing: str | None
    offload: bool = False


PEFT = Way(lean=False, checkpointing=None)


@dataclass(eq=False)
class StepPlanner:
    """Context manager that rehearses the training step of a model; on exit the model is as it was before.

    Args:
        module: has adapters in its blocks.
        batch: makes the inputs for a number of samples.
        optimizer: name, as in ``TrainingArguments.optim``.
        mixed_precision: bfloat16 autocast.
        quantization: None or a key of QUANTIZED.
        accumulate: gradients exist before the forward pass.
        target: ``"cpu"`` or ``"cuda"``.
        fake: False runs real steps on the CPU.
        rows: samples in the batch that shows which parameters feed each stack.
    """

    module: nn.Module
    batch: Callable[[int, nn.Module], dict[str, Any]]
    optimizer: str = "adamw_torch"
    mixed_precision: bool = False
    quantization: str | None = None
    accumulate: bool = False
    target: str = "cpu"
    fake: bool = True
    rows: int = 1

    def __enter__(self) -> StepPlanner:
        with ExitStack() as undo:
            self._set_up(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def _set_up(self, undo: ExitStack) -> None:
        module = self.module
        undo.callback(module.train, module.training)
        module.train()
        mode = undo.enter_context(faked(module)) if self.fake else nullcontext()
        backend = find_backend(module)
        self.stacks = find_stacks(module)
        self.units = find_units(module, self.stacks, backend)
        tensors: list[bool] = []
        note_output = (
            self.stacks[0]
            .blocks[0]
            .register_forward_hook(lambda _, __, output: tensors.append(isinstance(output, Tensor)))
        )
        with note_output, mode:
            inputs = self.batch(self.rows, module)
            inputs = tree_map_only(Tensor, torch.empty_like, inputs) if self.fake else inputs
            self.flows = trace_flow(module, self.stacks, inputs)
        self.chains = units_along(chains_of(self.flows), self.stacks, self.units)
        self.obstacles = find_obstacles(module, self.stacks, self.units, self.flows)
        self.paying = units_below(self.units, self.obstacles)
        self.freezer = Freezer(self.units, backend)
        self.prefix = Prefix(module, self.stacks, self.flows)
        self.was_checkpointed = any(vars(part).get("gradient_checkpointing") for part in module.modules())
        undo.callback(self.freezer.restore)
        undo.callback(self.prefix.restore)
        self._alike = self.fake and len(self.stacks) == 1 and all(tensors) and all_alike(self.stacks[0])
        # By frozen blocks or units, rows, way, and live blocks or None for the whole model.
        self._known: dict[tuple[int, int, Way, int | None], Rehearsal] = {}
        self._can_be_lean = bool(lean_layers(module.modules()))
        self.adapters = bytes_of(self._trained())
        self._adapters = {id(parameter) for parameter in self._trained()}
        self._filled: dict[tuple[int, int], int] = {}
        self.quantized, self.dequantized = self._quantized_bytes()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of all stacks."""
        return [block for stack in self.stacks for block in stack.blocks]

    def lowest(self, share: float) -> list[str]:
        """Units in this share of the blocks of each chain, from the bottom, that can join a frozen prefix.

        Leaves out the topmost adapted block of each chain, which a run freezes last.
        """
        names = choose("bottom_up", PolicyInput(0, 1.0, {}, self.chains, freeze_share=share))
        return [name for name in names if name in self.paying]

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze these units too."""
        self.freezer.freeze(name for name in names if name not in self.freezer.frozen)
        self.prefix.update()

    def step(self, rows: int, way: Way = PEFT) -> PlannedStep:
        """A step on ``rows`` samples at the present depth."""
        step = self._rehearse(rows, way._replace(offload=False))
        state, temporary = optimizer_bytes(self.optimizer, self._trained())
        offloaded, streamed = self._offloaded() if way.offload else (0, 0)
        weights = step.resident - self.adapters - self.quantized - offloaded
        passes = max(step.peak, step.resident + step.gradients + temporary)
        peak = passes + state - self.quantized + self.dequantized - offloaded
        filling = 0
        if offloaded:
            blocks = (block for stack in self.stacks for block in stack.blocks[self.prefix.depths[stack.path] :])
            live = sum(self._stored(p) for block in blocks for p in block.parameters())
            # Before step 0 in large batches, while the live blocks have not come yet; then a pass of unknown samples.
            filling = max(self._filling_ahead(rows) - live, state + self._filling(rows))
            filling += weights + self.adapters + streamed
        in_prefix = [i < self.prefix.depths[stack.path] for stack in self.stacks for i in range(len(stack))]
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
            offloaded=offloaded,
            filling=filling,
        )

    def _offloaded(self) -> tuple[int, int]:
        """Bytes that leave the device at the present depth, and bytes of a block that is brought back for a pass."""
        if not any(self.prefix.depths.values()):
            return 0, 0
        own = block_weights(self.module, [block for _, block in leaving_blocks(self.prefix)], self._adapters)
        sizes = [sum(map(self._stored, weights)) for weights in own.values()]
        tables = sum(table.nbytes for table in input_tables(self.module, self.stacks))
        ahead = 2 if self.target == "cuda" else 1  # the next block comes while one runs
        return sum(sizes) + tables, ahead * max(sizes, default=0)

    def _stored(self, weight: nn.Parameter) -> int:
        """Bytes of a weight, without the scales of a quantized one, which stay."""
        if self.quantization is None or id(weight) not in self._quantizable:
            return weight.nbytes
        return int(weight.numel() * (0.5 if self.quantization == "nf4" else 0.0))

    def _filling_ahead(self, rows: int) -> int:
        try:
            return self._filling(LARGER * rows)
        except Exception:  # given inputs that work with this number of samples only
            return LARGER * self._filling(rows)

    def _filling(self, rows: int) -> int:
        """Bytes of a pass through the prefix without a graph, weights apart."""
        depth = sum(self.prefix.depths.values())
        key = (min(depth, 3) if self._alike else depth, rows)  # of like blocks, the first two and the last show all
        if key not in self._filled:
            self._filled[key] = self._fill(rows)
        return self._filled[key]

    def _fill(self, rows: int) -> int:
        ends = {(path, 0) for path, depth in self.prefix.depths.items() if depth}
        with ExitStack() as undo:
            if self._alike:  # all blocks of a stack take the same
                (stack,) = self.stacks
                for block in stack.blocks[2 : self.prefix.depths[stack.path] - 1]:
                    undo.enter_context(patched_forward(block, _identity))
            return rehearse_forward(
                self.module,
                self.batch(rows, self.module),
                lambda inputs: self.prefix.compute(Call.of(self.module, (), inputs), inputs, {}, ends),
                target=self.target,
                fake=self.fake,
            )

    def _rehearse(self, rows: int, way: Way = PEFT) -> Rehearsal:
        if not self._can_be_lean:
            way = way._replace(lean=False)
        depth = sum(self.prefix.depths.values())
        live = len(self.blocks) - depth
        step = self._extrapolated(rows, way, depth, live) if self._alike and live > max(FEW) else None
        if step is None:
            key = (len(self.freezer.frozen), rows, way, None)
            if key not in self._known:
                self._known[key] = self._run(rows, way)
            step = self._known[key]
        return dataclasses.replace(step, gradients=bytes_of(self._trained()))

    def _extrapolated(self, rows: int, way: Way, depth: int, live: int) -> Rehearsal | None:
        """From FEW live blocks to ``live``; None if the peak moves to another moment, so costs are not linear."""
        kept = min(depth, 2)
        points = []
        for count in FEW:
            key = (kept, rows, way, count)
            if key not in self._known:
                self._known[key] = self._run(rows, way, live=count)
            points.append(self._known[key])
        costs = {}
        for name in ("saved", "peak", "forward_flops", "backward_flops"):
            first, second, last = (getattr(point, name) for point in points)
            if second - first != last - second:
                return None
            costs[name] = last + (live - max(FEW)) * (last - second)
        of_one = max(flops for _, flops in points[0].parts)
        costs["forward_flops"] += (depth - kept) * of_one
        return dataclasses.replace(points[0], **costs, parts=tuple((0, of_one) for _ in points[0].parts))

    def _run(self, rows: int, way: Way, live: int | None = None) -> Rehearsal:
        """Rehearse with all blocks, or with the first and last of the prefix and ``live`` blocks above it."""

        def forward(**inputs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision):
                return self.prefix.rehearse(**inputs)

        with ExitStack() as undo:
            undo.enter_context(self._checkpointing(way.checkpointing))
            for layer in lean_layers(self.module.modules()) if way.lean else ():
                undo.enter_context(lean_forward(layer))
            if live is not None:
                (stack,) = self.stacks
                depth = self.prefix.depths[stack.path]
                below = stack.blocks[1 : max(1, depth - 1)]
                above = stack.blocks[depth + 1 : len(stack) - live + 1]
                for block in (*below, *above):
                    undo.enter_context(patched_forward(block, _identity))
            return rehearse(
                self.module,
                self.batch(rows, self.module),
                forward=forward,
                target=self.target,
                gradients=self.accumulate,
                parts=self.blocks,
                fake=self.fake,
            )

    @contextmanager
    def _checkpointing(self, kind: str | None) -> Iterator[None]:
        """Full checkpointing as transformers switches it on, or ours if the model does not support it; or ours."""
        # Not always ours: transformers' saves other inputs, and the plan is exact to the byte.
        modules = list(self.module.modules())
        self.prefix.restore()
        before = [(module, dict(vars(module)), dict(module._forward_hooks)) for module in modules]
        own = Checkpointing(self.module, self.stacks)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                if kind != "full":
                    for module in modules:
                        if "gradient_checkpointing" in vars(module):
                            module.gradient_checkpointing = False  # type: ignore[assignment]
                if kind == "selective":
                    own.recomputed = own.all_selective
                    own.install()
                elif kind == "full" and not self.was_checkpointed:
                    try:
                        self.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
                    except (AttributeError, ValueError):
                        own.recomputed = own.all_full
                        own.install()
                self.prefix.update()  # after checkpointing, as in a run
                yield
        finally:
            self.prefix.restore()
            own.restore()
            for module, values, hooks in before:
                vars(module).clear()
                vars(module).update(values)
                module._forward_hooks.clear()
                module._forward_hooks.update(hooks)
            self.prefix.update()

    def _quantized_bytes(self) -> tuple[int, int]:
        """Bytes that quantization saves, and bytes of the largest weight once dequantized."""
        if self.quantization is None:
            return 0, 0
        layers = {m for block in self.blocks for m in block.modules() if isinstance(m, nn.Linear)}
        weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
        self._quantizable = set(map(id, weights))
        saved = sum(int(w.numel() * (w.element_size() - QUANTIZED[self.quantization])) for w in weights)
        return saved, max((w.nbytes for w in weights), default=0)

    def causes(self, rows: int) -> Iterator[str]:
        """What costs avoidable memory in lean layers, too, each with its fix; to be called before anything freezes."""
        is_lean = self._rehearse(rows, Way(True, None)).saved < self._rehearse(rows).saved
        frozen = {p.dtype for p in self.module.parameters() if not p.requires_grad}
        half = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in frozen), None)
        if half is not None and not is_lean and any(p.dtype == torch.float32 for p in self._trained()):
            yield (
                f"The adapters are float32 on a {str(half).removeprefix('torch.')} base, the default of PEFT: each "
                "adapted layer also keeps its input in float32. get_peft_model(..., autocast_adapter_dtype=False) "
                "keeps one copy (bf16 adapters train less precisely)."
            )
        if not is_lean and (without := self._saved_without_adapter_dropout(rows)):
            yield (
                "Adapter dropout keeps a dropped copy of the input of every target: "
                f"{self._rehearse(rows).saved / without - 1:+.0%} saved bytes. LoraConfig(lora_dropout=0.0) avoids it; "
                "frozen blocks have no adapter dropout."
            )
        if len(self.paying) < len(self.units):
            names = some([obstacle.short for obstacle in self.obstacles])
            yield (
                f"{len(self.units) - len(self.paying)} of {len(self.units)} units cannot join a frozen prefix and "
                f"never freeze, because {names} trains in or below their blocks. "
                f"{remedies(self.obstacles, self.freezer.backend)}."
            )
        hooks = ("_require_grads_hook", "_require_grads_hooks")  # of transformers 4 and 5
        if any(vars(module).get(name) for module in self.module.modules() for name in hooks):
            yield (
                "enable_input_require_grads() makes the output of the embeddings require grad: a plain run then keeps "
                "activations of frozen blocks too. The prefix of adafreeze does not."
            )

    def _saved_without_adapter_dropout(self, rows: int) -> int:
        """Saved bytes of a step without adapter dropout; 0 if there is none."""
        slots = [
            slot
            for unit in self.units.values()
            for site in unit.sites
            for slot in self.freezer.backend.dropouts(site)
            if getattr(slot[0].get_submodule(slot[1]), "p", 0) > 0
        ]
        if not slots:
            return 0
        with ExitStack() as undo:
            for parent, key in slots:
                undo.enter_context(replaced_child(parent, key, nn.Identity()))
            self._known.clear()
            undo.callback(self._known.clear)
            return self._rehearse(rows).saved


def all_alike(stack: Stack) -> bool:
    """Whether all blocks have the same modules, shapes and settings."""

    def settings(block: nn.Module) -> list[Any]:
        found: list[Any] = [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]
        for name, module in block.named_modules():
            plain = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, (int, float, str, bool, type(None))) and key not in ("layer_idx", "layer_id")
            }
            found.append((name, type(module), plain))
        return found

    return all(settings(block) == settings(stack.blocks[0]) for block in stack.blocks[1:])


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
