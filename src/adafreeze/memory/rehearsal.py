"""A training step on tensors that hold no data: what it would cost, without running it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..costs.flops import flops_of
from ..costs.memory import SavedBytes, StorageTracker, bytes_of, uncounted
from ..errors import ModelError
from ..model.flow import tensors_in
from ..model.random_state import keep_random_state

__all__ = ["Rehearsal", "failing_module", "faked", "largest_that_fits", "rehearse"]

# The CUDA allocator hands out multiples of this.
CUDA_ROUNDING = 512


@dataclass(frozen=True)
class Rehearsal:
    """What one training step costs: bytes, and FLOPs (multiply and add are two).

    Attributes:
        resident: parameters and buffers, each storage once.
        gradients: of all parameters that train.
        inputs: of the micro-batch.
        saved: what autograd keeps of the forward pass (inputs that it keeps count here too).
        peak: the most that the forward and the backward pass hold at once, all of the above included.
        forward_flops: of the forward pass.
        backward_flops: of the backward pass, activations that it recomputes included.
        parts: of the modules that were asked for, in the forward pass: bytes saved, and FLOPs.
    """

    resident: int
    gradients: int
    inputs: int
    saved: int
    peak: int
    forward_flops: int
    backward_flops: int
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def flops(self) -> int:
        """Of both passes."""
        return self.forward_flops + self.backward_flops


def rehearse(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    forward: Callable[..., Any] | None = None,
    target: str = "cpu",
    gradients: bool = True,
    parts: Sequence[nn.Module] = (),
    fake: bool = True,
) -> Rehearsal:
    """Count one forward and backward pass of ``model``.

    The model's own code runs, with autograd, on FakeTensors: shapes without data. An 8B model takes seconds and no
    memory, ``model`` may be on ``meta``, and if it is real its weights, gradients and random state stay as they are;
    whoever counts around this sees none of it.
    What the model returns beside the loss is given up before the backward pass, as Trainer does it.

    Args:
        model: in training mode; parameters that require grad train.
        inputs: keyword arguments of the forward pass; only shapes and dtypes of their tensors matter.
        forward: called in the place of the model.
        target: where the step would run, ``"cpu"`` or ``"cuda"``: attention keeps other tensors there, and storages
            are rounded up to 512 bytes.
        gradients: gradients are there already, as from the second micro-batch of an accumulated step on; they take
            their bytes from the start.
        parts: modules whose share of the forward pass is asked for.
        fake: False runs the step for real, for a model that fails on FakeTensors; its gradients are cleared.

    Raises:
        ModelError: nothing that the model returns has a gradient.
        Exception: whatever the model raises on FakeTensors.
    """
    with ExitStack() as undo:
        if fake:
            undo.enter_context(uncounted())
        mode = undo.enter_context(faked(model) if fake else nullcontext(None))
        undo.enter_context(torch.enable_grad())
        undo.enter_context(keep_random_state())
        if mode is not None:
            undo.enter_context(mode)
            inputs = tree_map_only(Tensor, _empty_like, dict(inputs))
        undo.enter_context(_operators_of(target))
        resident = (*model.parameters(), *model.buffers())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in trained]
        try:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter) if gradients else None
            return _counted(model, inputs, forward or model, resident, trained, parts, target)
        finally:
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient


def _counted(
    model: nn.Module,
    inputs: Mapping[str, Any],
    forward: Callable[..., Any],
    resident: tuple[Tensor, ...],
    trained: list[nn.Parameter],
    parts: Sequence[nn.Module],
    target: str,
) -> Rehearsal:
    given = [value for value in inputs.values() if isinstance(value, Tensor)]
    with _Counter(CUDA_ROUNDING if target == "cuda" else 1) as counter:
        counter.hold(*resident, *given, *(p.grad for p in trained if p.grad is not None))
        with SavedBytes(model) as saved, _shares(parts, lambda: (saved.total, counter.flops)) as shares:
            loss = _loss_of(forward(**inputs))
        forward_flops = counter.flops
        loss.backward()
        del loss
    return Rehearsal(
        resident=bytes_of(resident),
        gradients=bytes_of(p.grad for p in trained if p.grad is not None),
        inputs=bytes_of(given),
        saved=saved.total,
        peak=counter.peak,
        forward_flops=forward_flops,
        backward_flops=counter.flops - forward_flops,
        parts=tuple(shares),
    )


class _Counter(StorageTracker):
    """Storages and FLOPs in one mode, since each takes its time at every operator."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.made(result)
        self.flops += flops_of(func, args, kwargs, result)
        return result


@contextmanager
def _shares(parts: Sequence[nn.Module], totals: Callable[[], tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """What ``totals`` rise by while each of ``parts`` runs."""
    found, started = [(0, 0)] * len(parts), [(0, 0)] * len(parts)

    def enter(index: int) -> None:
        started[index] = totals()

    def leave(index: int) -> None:
        found[index] = tuple(now - then for now, then in zip(totals(), started[index], strict=True))  # type: ignore

    with ExitStack() as undo:
        for index, part in enumerate(parts):
            handles = (
                part.register_forward_pre_hook(lambda *_, i=index: enter(i)),
                part.register_forward_hook(lambda *_, i=index: leave(i)),
            )
            for handle in handles:
                undo.callback(handle.remove)
        yield found


@contextmanager
def faked(model: nn.Module) -> Iterator[Any]:
    """Put FakeTensors in the place of all parameters and buffers of ``model``; gives the FakeTensorMode, not entered.

    Shared parameters stay shared, flags stay as they are. At the end the model is what it was.
    """
    mode = _shapes_mode()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    made: dict[int, Tensor] = {}
    slots = [
        (slots, name, tensor)
        for module in model.modules()
        for slots in (module._parameters, module._buffers)
        for name, tensor in slots.items()
        if tensor is not None
    ]
    try:
        log.setLevel(logging.CRITICAL)  # what fails is raised; torch would print its traceback as well
        for place, name, tensor in slots:
            if id(tensor) not in made:
                with mode:
                    fake = _empty_like(tensor)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            place[name] = made[id(tensor)]  # type: ignore[assignment, index]
        yield mode
    finally:
        log.setLevel(level)
        for place, name, tensor in slots:
            place[name] = tensor  # type: ignore[assignment, index]


def _shapes_mode() -> Any:
    """A FakeTensorMode in which no tensor is all ones.

    transformers 4 asks that of the mask that it is given (``torch.all(mask == 1)``), and does without it then. Whoever
    gives one means padding.
    """
    from torch._subclasses import FakeTensorMode

    operators = torch.ops.aten

    class ShapesMode(FakeTensorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is operators._local_scalar_dense.default and hasattr(args[0], "of_all"):
                return False
            result: Any = super().__torch_dispatch__(func, types, args, kwargs)
            if func is operators.all.default:
                result.of_all = True
            return result

    return ShapesMode(allow_non_fake_inputs=True)


def _empty_like(tensor: Tensor) -> Tensor:
    """As a dense tensor on the CPU: a build of torch without CUDA takes no fake tensors of it."""
    return torch.empty_strided(tensor.shape, _strides(tensor), dtype=tensor.dtype, device="cpu")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    # Of an expanded or overlapping tensor nobody keeps more than its elements.
    return torch.empty(tensor.shape, device="meta").stride() if 0 in tensor.stride() else tensor.stride()


@contextmanager
def _operators_of(target: str) -> Iterator[None]:
    """While this is entered, attention and dropout take the operators that they take on ``target``."""
    # In their place, and not by a function mode: torch leaves those for the time of a backward pass.
    functions = nn.functional
    before = functions.scaled_dot_product_attention, functions.dropout
    if target == "cuda":
        functions.scaled_dot_product_attention, functions.dropout = _cuda_attention, _cuda_dropout
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.dropout = before


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    # One byte an element is kept as mask; on the CPU it is as wide as the input.
    return torch.ops.aten.native_dropout(input, p, True)[0] if training and p > 0 else input


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    operators = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return operators._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # becomes a bias, its rows padded to sixteen
            width = -(-attn_mask.shape[-1] // 16) * 16
            padded = query.new_zeros((*attn_mask.shape[:-1], width))
            attn_mask = padded.masked_fill(padded == 0, 0.0)[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return operators._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _loss_of(output: Any) -> Tensor:
    """The loss that the model returns; else one made of its logits, else of all that it returns with a gradient.

    Raises:
        ModelError: nothing that it returns has a gradient.
    """
    if not isinstance(output, (Tensor, Mapping, tuple, list)):
        output = dict(vars(output))
    loss = output.get("loss") if isinstance(output, Mapping) else None
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if loss is None and isinstance(first, Tensor) and first.ndim == 0:
        loss = first
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum()
    if isinstance(logits, Tensor) and logits.requires_grad and loss is None:
        # The loss is taken outside the model (label smoothing): as cross entropy takes it, in float32.
        return nn.functional.log_softmax(logits.float(), -1).sum()
    with_gradient = [tensor.float().sum() for tensor in tensors_in(output) if tensor.requires_grad]
    if loss is not None or not with_gradient:
        raise ModelError(
            "The loss has no gradient." if loss is not None else "Nothing that the model returns has a gradient.",
            cause="No parameter that trains takes part in the forward pass, or the model detaches its output.",
            fix="Put adapters into layers that the forward pass runs, and call the model with what it trains on.",
        )
    return torch.stack(with_gradient).sum()


def largest_that_fits(peak: Callable[[int], int], rows: int, held: int, limit: int, most: int = 4096) -> int:
    """The largest micro-batch, of up to ``most`` samples, of which ``peak`` says at most ``limit`` bytes; 0 if none.

    What a step holds beside ``held`` grows by as much with each sample, or nearly: ``peak`` of ``rows`` says where to
    look, and what it says there, where to look next.
    """
    if held >= limit:
        return 0

    def expected(count: int) -> int:
        return min(most, int((limit - held) / max(1.0, (peak(count) - held) / count)))

    found = expected(rows)
    while found > 0 and peak(found) > limit:
        found = min(found - 1, expected(found))
    while found > 0 and (more := expected(found)) > found and peak(more) <= limit:
        found = more
    return found


def failing_module(error: BaseException) -> str:
    """The module in whose forward pass ``error`` was raised: class of the innermost one on the traceback."""
    found, frame = "the model", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = type(owner).__name__
        frame = frame.tb_next
    return found
