"""Rehearses a training step on fake tensors: counts its bytes and FLOPs without running it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..costs.flops import flops_of
from ..costs.memory import SavedBytes, StorageTracker, bytes_of, uncounted
from ..errors import ModelError
from ..model.batch import loss_in
from ..model.flow import tensors_in
from ..model.offloaded import Offloaded
from ..model.restore import keep_random_state, logging_from, temporarily

__all__ = ["Rehearsal", "failing_module", "faked", "largest_that_fits", "rehearse", "rehearse_forward"]

# The CUDA allocator rounds each storage up to a multiple of this.
CUDA_ROUNDING = 512


@dataclass(frozen=True)
class Rehearsal:
    """Bytes and FLOPs of one training step (a multiply and an add are two FLOPs).

    Attributes:
        resident: parameters and buffers, each storage once.
        gradients: of all parameters that train.
        inputs: of the micro-batch.
        saved: what autograd keeps of the forward pass, saved inputs included.
        peak: of the forward and backward pass, all of the above included.
        forward_flops: of the forward pass.
        backward_flops: of the backward pass, recomputed activations included.
        parts: for each module in ``parts``, its share of the forward pass: saved bytes and FLOPs.
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

    Runs the model's own code with autograd on FakeTensors, which have shapes but no data: an 8B model takes seconds
    and no memory. ``model`` may be on ``meta``; weights, gradients and random state of a real one do not change, and
    counters around the call see nothing. Only the loss survives the forward pass, as in Trainer.

    Args:
        model: in training mode; parameters that require grad train.
        inputs: keyword arguments; only shapes and dtypes of the tensors matter.
        forward: replaces the call of the model.
        target: ``"cpu"`` or ``"cuda"``, whose attention and dropout save different tensors; on CUDA, storages are
            rounded up to 512 bytes.
        gradients: gradients exist before the forward pass, as from the second micro-batch of an accumulated step on.
        parts: modules whose share of the forward pass is wanted.
        fake: False runs the real step, for a model that fails on FakeTensors.

    Raises:
        ModelError: the loss has no gradient, or nothing that the model returns has one.
        Exception: raised by the model's own code on FakeTensors.
    """
    # In their places there will be fakes of them all.
    here = [not isinstance(one, Offloaded) for one in (*model.parameters(), *model.buffers())]
    with ExitStack() as undo:
        inputs = undo.enter_context(_stage(model, inputs, target, fake=fake))
        undo.enter_context(torch.enable_grad())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            undo.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = torch.zeros_like(parameter) if gradients else None
        resident = list(compress((*model.parameters(), *model.buffers()), here))
        given = [value for value in inputs.values() if isinstance(value, Tensor)]
        with _Counter(CUDA_ROUNDING if target == "cuda" else 1) as counter:
            counter.hold(*resident, *given, *(p.grad for p in trained if p.grad is not None))
            with SavedBytes(model) as saved, _shares(parts, lambda: (saved.total, counter.flops)) as shares:
                loss = _loss_of((forward or model)(**inputs))
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


def rehearse_forward(
    model: nn.Module,
    inputs: Mapping[str, Any],
    forward: Callable[[Mapping[str, Any]], Any],
    *,
    target: str = "cpu",
    fake: bool = True,
) -> int:
    """The peak bytes of a forward pass without a graph, weights apart; arguments as of ``rehearse``."""
    with _stage(model, inputs, target, fake=fake) as staged, torch.no_grad():
        with StorageTracker(CUDA_ROUNDING if target == "cuda" else 1) as counter:
            counter.hold(*model.parameters(), *model.buffers())
            weights = counter.now
            counter.hold(*(value for value in staged.values() if isinstance(value, Tensor)))
            forward(staged)
        return counter.peak - weights


@contextmanager
def _stage(model: nn.Module, inputs: Mapping[str, Any], target: str, *, fake: bool) -> Iterator[Mapping[str, Any]]:
    """What a rehearsal runs in: fake tensors, unless it is real, and kernels of the target. Yields the inputs."""
    with ExitStack() as undo:
        if fake:
            undo.enter_context(uncounted())
            mode = undo.enter_context(faked(model))
        undo.enter_context(keep_random_state())
        if fake:
            undo.enter_context(mode)
            inputs = tree_map_only(Tensor, _empty_like, dict(inputs))
        undo.enter_context(_kernels_of(target))
        yield inputs


class _Counter(StorageTracker):
    """Counts storages and FLOPs in one dispatch mode: each mode slows down every operator."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.made(result)
        self.flops += flops_of(func, args, kwargs, result)
        return result


def _kernels_of(target: str) -> AbstractContextManager[None]:
    """On CUDA, functions that save and hold what its kernels do."""
    # Replaced, since torch disables function modes during a backward pass.
    functions = {"scaled_dot_product_attention": _cuda_attention, "dropout": _cuda_dropout} if target == "cuda" else {}
    return temporarily((nn.functional, *function) for function in functions.items())


@contextmanager
def _shares(parts: Sequence[nn.Module], totals: Callable[[], tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """How much ``totals`` rise while each of ``parts`` runs."""
    shares, before = [(0, 0)] * len(parts), [(0, 0)] * len(parts)

    def enter(index: int) -> None:
        before[index] = totals()

    def leave(index: int) -> None:
        (saved, flops), (saved_before, flops_before) = totals(), before[index]
        shares[index] = saved - saved_before, flops - flops_before

    with ExitStack() as undo:
        for index, part in enumerate(parts):
            undo.enter_context(part.register_forward_pre_hook(lambda *_, i=index: enter(i)))
            undo.enter_context(part.register_forward_hook(lambda *_, i=index: leave(i)))
        yield shares


@contextmanager
def faked(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Replace all parameters and buffers of ``model`` by FakeTensors; yields their mode, not entered.

    Shared parameters stay shared and keep ``requires_grad``. On exit the model is as it was before.
    """
    mode = _ShapesMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (slots, name, tensor)
        for module in model.modules()
        for slots in (module._parameters, module._buffers)
        for name, tensor in slots.items()
        if tensor is not None
    ]
    # torch logs the traceback of an error that it raises anyway.
    with logging_from("torch._subclasses.fake_tensor", logging.CRITICAL):
        try:
            for place, name, tensor in slots:
                if id(tensor) not in fakes:
                    with mode:
                        fake = _empty_like(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                place[name] = fakes[id(tensor)]
            yield mode
        finally:
            for place, name, tensor in slots:
                place[name] = tensor


class _ShapesMode(FakeTensorMode):
    """A FakeTensorMode in which ``torch.all`` is False.

    transformers 4 drops a mask of ones (``torch.all(mask == 1)``), but a given mask means that batches have padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and hasattr(args[0], "of_all"):
            return False
        result: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.all.default:
            result.of_all = True
        return result


def _empty_like(tensor: Tensor) -> Tensor:
    # On the CPU, since a build of torch without CUDA has no fake CUDA tensors. Autograd saves an expanded tensor dense.
    dense = 0 in tensor.stride()
    strides = torch.empty(tensor.shape, device="meta").stride() if dense else tensor.stride()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cpu")


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    # Its mask has one byte per element; on the CPU the mask has the dtype of the input.
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
        if attn_mask.dtype == torch.bool:  # becomes a bias whose rows are padded to multiples of 16
            width = -(-attn_mask.shape[-1] // 16) * 16
            padded = query.new_zeros((*attn_mask.shape[:-1], width))
            attn_mask = padded.masked_fill(padded == 0, 0.0)[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return operators._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _loss_of(output: Any) -> Tensor:
    """The loss in ``output``; without one, a loss of its logits, or else of all its tensors with a gradient."""
    loss = loss_in(output)
    if loss is None:
        output = output if isinstance(output, (Tensor, Mapping, tuple, list)) else vars(output)
        logits = output.get("logits") if isinstance(output, Mapping) else output
        if isinstance(logits, Tensor) and logits.requires_grad:
            # The loss is computed outside the model (label smoothing): like cross entropy, in float32.
            return nn.functional.log_softmax(logits.float(), -1).sum()
        sums = [tensor.float().sum() for tensor in tensors_in(output) if tensor.requires_grad]
        loss = torch.stack(sums).sum() if sums else None
    if loss is None or not loss.requires_grad:
        raise ModelError(
            f"{'Nothing that the model returns has a gradient' if loss is None else 'The loss has no gradient'}: no "
            "trainable parameter takes part in the forward pass, or the model detaches its output.",
            fix="Put adapters into layers that the forward pass runs, and pass the inputs that the model trains on.",
        )
    return loss


def largest_that_fits(
    peak: Callable[[int], int], rows: int, known: int, held: int, limit: int, most: int = 4096
) -> int:
    """The largest micro-batch, up to ``most``, whose ``peak`` is at most ``limit`` bytes; 0 if none.

    Memory beyond ``held`` grows almost linearly with the samples, so each peak predicts which size to try next,
    beginning with that of ``rows`` samples, which is ``known``.
    """
    if held >= limit:
        return 0
    peaks = {rows: known}

    def peak_of(count: int) -> int:
        if count not in peaks:
            peaks[count] = peak(count)
        return peaks[count]

    def expected(count: int) -> int:
        return min(most, int((limit - held) / max(1.0, (peak_of(count) - held) / count)))

    found = expected(rows)
    while found > 0 and peak_of(found) > limit:
        found = min(found - 1, expected(found))
    while found > 0 and (more := expected(found)) > found and peak_of(more) <= limit:
        found = more
    return found


def failing_module(error: BaseException) -> str:
    """Class of the innermost module on the traceback of ``error``."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [type(owner).__name__ for owner in owners if isinstance(owner, nn.Module)]
    return modules[-1] if modules else "the model"
