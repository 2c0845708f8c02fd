"""FLOPs of the code within a block, including attention on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["CountFlops", "flops_of"]

aten = torch.ops.aten
_FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
# Of packages that register their operators when they are imported. B has one row per output: A · Bᵀ.
_OF_PACKAGES: dict[str, Callable[..., int]] = {
    "bitsandbytes::gemm_4bit": lambda a, b, shape, *_, **__: 2 * a.numel() * shape[0],
    "bitsandbytes::gemv_4bit": lambda a, b, shape, *_, **__: 2 * a.numel() * shape[0],
    "bitsandbytes::int8_linear_matmul": lambda a, b, *_, **__: 2 * a.numel() * b.shape[0],
    "bitsandbytes::int8_scaled_mm": lambda a, b, *_, **__: 2 * a.numel() * b.shape[0],
    "bitsandbytes::int8_mixed_scaled_mm": lambda a, quantized, b, *_, **__: 2 * a.numel() * b.shape[0],
}


class CountFlops(TorchDispatchMode):
    """Counts floating-point operations (multiply and add are two) of all matrix products within the block:

        with CountFlops() as count:
            model(**batch).loss.backward()
        count.total

    Uses torch's formulas, but not its FlopCounterMode, which counts the CPU's fused attention as zero, and decomposes
    some operators (SiLU's backward) in a way that rounds differently. Counting here changes no result.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and add its FLOPs."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._overloadpacket not in _FORMULAS:
            # Only in inference mode composite operators arrive whole, with matrix products inside.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self.total += flops_of(func, args, kwargs, result)
        return result


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of one call of an operator that returned ``result``."""
    formula = _FORMULAS.get(func._overloadpacket) or _OF_PACKAGES.get(func._schema.name)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
