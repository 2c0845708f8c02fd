"""Modules that do something else in evaluation mode than without dropout, which adafreeze must not set off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..errors import note
from .patches import held_attribute

__all__ = ["as_in_training", "mode_does_more"]

_AVX512 = "support_avx512bf16_for_cpu"
_QUANTIZED = {"bitsandbytes", "gptqmodel", "awq"}


def mode_does_more(module: nn.Module) -> bool:
    """Whether the training flag of ``module`` decides about more than dropout, so that it is to be left as it is.

    - Quantized layers choose their kernel by it. On the CPU, an 8-bit layer of bitsandbytes multiplies in 8 bits in
      evaluation mode, and dequantized in training mode: half a percent apart. GPTQ's and AWQ's have kernels for
      evaluation that repack the weights, or have no backward pass.
    - RWKV divides weights in the first pass in evaluation mode, and multiplies them in the next one in training mode.
    """
    return type(module).__module__.partition(".")[0] in _QUANTIZED or hasattr(module, "_rescale_layers")


@contextmanager
def as_in_training(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Until the exit, switch off what libraries do in evaluation mode at the cost of training or of adapters.

    - On a CPU with AVX512-BF16, a call in evaluation mode repacks a 4-bit weight of bitsandbytes for good, for a kernel
      without a backward pass: later training steps lose all gradients below that layer, with a warning of torch only
      (bitsandbytes 0.50). Scores and evaluations are such calls. Layers that are repacked already are put back.
    - The fast path of nn.TransformerEncoderLayer hands weights to one kernel, and so bypasses PEFT's layers.

    Args:
        model: of the run.
        blocks: that may be frozen.
    """
    with ExitStack() as undo:
        packing = [m for m in model.modules() if m.__dict__.get(_AVX512) and _on_cpu(m)]
        for layer in packing:
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                layer.state_dict()  # saving is what unpacks
            undo.enter_context(held_attribute(layer, _AVX512, False))
        if packing:
            note(
                "Evaluations do not repack the 4-bit weights for this CPU, as bitsandbytes does: later steps would "
                "lose gradients."
            )
        fast = any(_has_fast_path(module) for block in blocks for module in block.modules())
        if fast and torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
            undo.callback(torch.backends.mha.set_fastpath_enabled, True)
            note("torch's fast path of nn.MultiheadAttention is off in this run: it bypasses adapters.")
        yield


def _on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters(recurse=False))


def _has_fast_path(module: nn.Module) -> bool:
    return isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention))
