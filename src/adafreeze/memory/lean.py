"""Lean LoRA layers: they save only what their gradients need, and compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSet
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..costs.memory import bytes_of
from ..errors import ModelError, RunError
from ..freeze.prefix import autocast_now
from ..model.patches import patched, patched_forward

__all__ = ["lean", "lean_forward", "lean_layers"]

# torch 2.6 has no function that looks at all of them.
_GLOBAL_HOOKS = [f"_global_{when}_hooks" for when in ("forward", "forward_pre", "backward", "backward_pre")]

# Forwards that are lean, over which others may be patched.
_forwards: MutableSet[Any] = WeakSet()

# By x: its version, and its copy in a narrower data type. A strong reference would keep the copy alive with x, although
# checkpointing has dropped it.
_narrowed: MutableMapping[Tensor, tuple[int, TensorWeakRef]] = WeakTensorKeyDictionary()


# Eight bytes of 0 or 1 are one number: times GATHER, its highest byte has bit i from byte i. A byte times REPEAT is
# eight copies of it, of which SELECT leaves bit i in byte i.
GATHER, REPEAT, SELECT = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - 2**64


class _Branch(torch.autograd.Function):
    """y = s · (B · A · D(x)), which saves x as it came instead of what is computed from it.

    With n tokens, d inputs, o outputs and rank r: x is (n, d), A (r, d), B (o, r). PEFT's layer saves x in the
    adapter's data type (again for each of q, k and v), the dropped x, and the dropout's noise. Here x is saved by
    reference, or ``narrow`` if the products take fewer bytes per number: either way once for all layers that get the
    same x. Of the noise, one bit per element is saved. The backward pass computes A·D(x) again, which takes r of every
    d + o FLOPs of the layer. Operations, their order and data types are those of PEFT's forward and autograd's
    backward, so results are the same to the bit where kernels are deterministic. The backward pass is made of
    differentiable operators on what is saved, so it can be differentiated in turn, unless ``narrow`` is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        narrow: Tensor | None,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        noise: Tensor | None,
        options: _Options,
    ) -> Tensor:
        ctx.options, ctx.given = options, x.dtype
        kept = x if narrow is None else narrow
        ctx.is_narrow, ctx.version = narrow is not None, kept._version
        ctx.save_for_backward(kept, a, b, None if noise is None else _packed(noise != 0))
        with _as_given(x.device):
            hidden = F.linear(options.dropped(kept, noise), a.to(options.computes))
            bias = None if bias is None else bias.to(options.computes)
            return F.linear(hidden, b.to(options.computes), bias) * options.scaling

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, a, b, bits = _saved(ctx)
        options: _Options = ctx.options
        needs_x, _, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad
        with _as_given(kept.device):
            noise = None if bits is None else options.noise(_unpacked(bits, kept.shape))
            dropped = options.dropped(kept, noise).reshape(-1, kept.shape[-1])
            low_a, low_b = a.to(options.computes), b.to(options.computes)
            outer = (gradient * options.scaling).reshape(-1, len(b))
            inner = outer.mm(low_b) if needs_x or needs_a else None
            found: list[Tensor | None] = [None] * 7
            if needs_b:
                found[3] = outer.t().mm(F.linear(dropped, low_a)).to(b.dtype)
            if needs_bias:
                found[4] = outer.sum(0).to(b.dtype)
            if inner is not None and needs_a:
                found[2] = inner.t().mm(dropped).to(a.dtype)
            if inner is not None and needs_x:
                of_x = inner.mm(low_a).view(kept.shape).to(options.casts)
                found[0] = (of_x if noise is None else of_x * noise).to(ctx.given)
            return tuple(found)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What the forward pass saved, unchanged.

    Raises:
        RunError: it was changed in place, or is to be differentiated and cannot be.
    """
    fix = "SafeConfig(lean=False), or leave out adafreeze.lean(model)."
    if torch.is_grad_enabled() and ctx.is_narrow:
        raise RunError(
            "Under autocast, a lean LoRA layer keeps a narrow copy of its input, through which its gradients cannot be "
            "differentiated again (create_graph=True).",
            fix=fix,
        )
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        problem: Exception | None = error
    else:
        # With hooks on saved tensors (activation checkpointing, save_on_cpu) torch itself does not look.
        if saved[0]._version <= ctx.version:
            return saved
        problem = None
    raise RunError(
        "After its forward pass, something changed in place what a lean LoRA layer keeps: its input, of which PEFT's "
        "layer might have kept a copy, or A or B.",
        fix=fix,
    ) from problem


class _Options:
    """What a branch computes with.

    Args:
        scaling: s.
        casts: data type to which the layer casts x.
        computes: that of the products: of autocast, or the same.
        probability: of the dropout.
    """

    def __init__(self, scaling: float, casts: torch.dtype, computes: torch.dtype, probability: float) -> None:
        self.scaling, self.casts, self.computes, self.probability = scaling, casts, computes, probability

    def dropped(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """D(x), in the data type of the products."""
        if noise is None and x.dtype == self.computes:  # a cast to wider numbers and back changes nothing
            return x
        x = x.to(self.casts)
        return (x if noise is None else x * noise).to(self.computes)

    def noise(self, kept: Tensor) -> Tensor:
        """The factors of the dropout: 0 or 1 / (1 − p)."""
        return kept.to(self.casts).div_(1 - self.probability)


def _computes(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The data type of a product of factors in ``dtype``: autocast leaves float64 alone."""
    return dtype if dtype == torch.float64 else autocast_now(device) or dtype


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _as_given(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the data types of their factors."""
    return torch.autocast(device.type, enabled=False) if autocast_now(device) else nullcontext()


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of x in ``dtype``: the same for every layer that gets this x, for as long as the graph of one holds it."""
    version, held = _narrowed.get(x, (-1, None))
    copy = held() if held is not None and version == x._version else None
    if copy is None or copy.dtype != dtype:
        copy = x.detach().to(dtype)
        _narrowed[x] = x._version, TensorWeakRef(copy)
    return copy


def _packed(mask: Tensor) -> Tensor:
    """Eight booleans per byte, the last byte filled up with zeros."""
    flat = mask.flatten()
    eights = F.pad(flat, (0, -flat.numel() % 8)).view(torch.uint8).view(torch.int64)
    return ((eights * GATHER >> 56) & 255).to(torch.uint8)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The booleans, of this shape."""
    eights = (bits.to(torch.int64) * REPEAT & SELECT).view(torch.uint8)
    return (eights[: shape.numel()] != 0).view(shape)


def _forward(layer: Any) -> Callable[..., Any]:
    original, quantized, cloned = layer.forward, _is_quantized(layer), type(layer).__name__ == "Linear4bit"

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = _fitting(layer, x) if torch.is_grad_enabled() and not args and not kwargs else None
        if name is None:
            return original(x, *args, **kwargs)
        a: Any = layer.lora_A[name]
        b, dropout = layer.lora_B[name], layer.lora_dropout[name]
        result: Tensor = layer.base_layer(x)
        # PEFT's quantized layers do not cast x under autocast (of CUDA: so they ask), and cast the branch, not the sum.
        ambient = quantized and torch.is_autocast_enabled()
        casts: torch.dtype = x.dtype if ambient else a.weight.dtype
        computes, probability = _computes(x.device, casts), _probability(dropout)
        # The same random numbers as F.dropout(x): it multiplies by such factors.
        noise = F.dropout(torch.ones_like(x, dtype=casts), probability) if probability else None
        options = _Options(layer.scaling[name], casts, computes, probability)
        narrow = _narrow(x, computes) if noise is None and computes.itemsize < x.dtype.itemsize else None
        branch = _Branch.apply(x, narrow, a.weight, b.weight, b.bias, noise, options)
        if quantized:
            return (result.clone() if cloned else result) + (branch if ambient else branch.to(result.dtype))
        return (result + branch).to(result.dtype)

    _forwards.add(forward)
    return forward


def _fitting(layer: Any, x: Tensor) -> str | None:
    """The name of the adapter whose branch can be lean in this call; None if PEFT's forward is to run."""
    if torch.compiler.is_compiling():
        return None  # what a compiled graph saves is chosen by its partitioner, which recomputes casts by itself
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged:
        return None
    name = names[0]
    if name in layer.lora_variant or not isinstance(x, Tensor) or x.is_nested or x.ndim < 2 or not x.numel():
        return None
    if not x.is_floating_point() or type(layer.scaling[name]) not in (float, int):
        return None
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not all(_is_plain(one, nn.Linear) for one in (a, b)) or a.bias is not None:
        return None
    if not (_is_plain(dropout, nn.Identity) or (_is_plain(dropout, nn.Dropout) and not dropout.inplace)):
        return None
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p >= 1:
        return None
    weights = (a.weight, b.weight)
    if not a.weight.requires_grad or a.weight.dtype != b.weight.dtype:
        return None  # the gradient of B alone does not need x
    if x.dtype != a.weight.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return None  # peft.helpers.disable_input_dtype_casting
    if any(weight.ndim != 2 or hasattr(weight, "placements") for weight in weights):
        return None  # a shard, of ZeRO-3 or a DTensor
    casts, drops = a.weight.dtype, _probability(dropout) > 0
    computes = _computes(x.device, casts)
    if casts != x.dtype and casts.itemsize <= x.dtype.itemsize:
        return None  # x is rounded before the products
    if x.dtype == casts == computes and not drops:
        return None  # PEFT saves x by reference, too
    if computes.itemsize < x.dtype.itemsize and (x.is_leaf if x.requires_grad else drops):
        return None  # gradients of a leaf are summed in autocast's data type, and the dropped x would be narrower
    if torch._C._functorch.peek_interpreter_stack() is not None or any(map(vars(torch_module).get, _GLOBAL_HOOKS)):
        return None
    if forward_ad._current_level >= 0:
        return None
    if x.is_inference() or bytes_of([x]) > x.nbytes:
        return None  # cannot be saved, or is a small part of a tensor that it would keep alive
    return name


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is nothing but its class's own forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in module.__dict__ and not any(hooks)


def lean_forward(layer: nn.Module) -> patched:
    """``layer`` is lean within the block; such patches may come off in any order."""
    return patched_forward(layer, _forward(layer))


def lean_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The LoRA layers among ``modules`` with PEFT's own forward, on a plain or quantized linear layer."""
    return [module for module in modules if _is_own(module) and _is_unpatched(module)]


def _is_unpatched(module: nn.Module) -> bool:
    """But for lean forwards."""
    forward = module.__dict__.get("forward")
    return forward is None or forward in _forwards


def _is_own(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer with a formula that is known here."""
    kind = type(module)
    # Unsloth gives PEFT's classes a forward that rounds differently.
    of_peft = all(str(getattr(one, "__module__", "")).startswith("peft.") for one in (kind, kind.forward))
    return of_peft and isinstance(module, LoraLayer) and (kind.forward is Linear.forward or _is_quantized(module))


def _is_quantized(module: nn.Module) -> bool:
    """Whether it is PEFT's layer for bitsandbytes in 4 or 8 bits; by name, since the class imports bitsandbytes."""
    return type(module).__module__ == "peft.tuners.lora.bnb" and type(module).__name__ in ("Linear4bit", "Linear8bitLt")


@contextmanager
def lean(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Within the block, LoRA layers of ``model`` save only what their gradients need; yields these layers.

    Raises:
        ModelError: there are none.
    """
    layers = lean_layers(model.modules())
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no LoRA layer with PEFT's own forward.",
            fix='get_peft_model(model, LoraConfig(target_modules="all-linear"))',
        )
    with ExitStack() as undo:
        for layer in layers:
            undo.enter_context(lean_forward(layer))
        yield layers
