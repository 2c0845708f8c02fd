"""FLOPs of whatever runs within a block, attention on the CPU included."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["CountFlops"]


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


class CountFlops:
    """Counts floating-point operations (multiply and add are two) of all matrix products within the block::

        with CountFlops() as count:
            model(**batch).loss.backward()
        count.total

    torch's own counter takes the CPU's fused attention for zero; here it counts as on CUDA.
    """

    def __init__(self) -> None:
        aten = torch.ops.aten
        self._mode = FlopCounterMode(
            display=False,
            custom_mapping={
                aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            },
        )

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return int(self._mode.get_total_flops())

    def __enter__(self) -> CountFlops:
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)
