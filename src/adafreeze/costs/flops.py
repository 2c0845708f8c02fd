"""FLOPs of whatever runs within a block, attention on the CPU included."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["CountFlops", "flops_of"]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


_FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class CountFlops(TorchDispatchMode):
    """Counts floating-point operations (multiply and add are two) of all matrix products within the block:

        with CountFlops() as count:
            model(**batch).loss.backward()
        count.total

    By torch's own formulas, and not by its FlopCounterMode: that one takes the CPU's fused attention for zero, and
    runs some operators (SiLU's backward) by a decomposition that rounds differently. Counting here changes nothing.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator as it is, and add what it costs."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._overloadpacket not in _FORMULAS:
            # Only there composite operators arrive whole, with products inside; nothing trains then.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self.total += flops_of(func, args, kwargs, result)
        return result


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of one operator that was called so and returned ``result``."""
    formula = _FORMULAS.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
