"""Layers of bitsandbytes on the CPU, which compute something else in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ..errors import note
from .patches import held_attribute

__all__ = ["gradients_pass", "mode_chooses_kernel"]

_AVX512 = "support_avx512bf16_for_cpu"


def mode_chooses_kernel(module: nn.Module) -> bool:
    """Whether the training flag of ``module`` decides how it computes its product.

    On the CPU, an 8-bit layer of bitsandbytes multiplies in 8 bits in evaluation mode, and dequantized in training
    mode: half a percent apart. A frozen block, which is kept in evaluation mode for its dropout, must compute what it
    does in plain training.
    """
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


@contextmanager
def gradients_pass(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, keep 4-bit layers of bitsandbytes in the layout that has a backward pass.

    On a CPU with AVX512-BF16, a call in evaluation mode repacks the weight for good, for a kernel without a backward
    pass: later training steps lose all gradients below that layer, with a warning of torch only (bitsandbytes 0.50).
    Scores and evaluations are such calls. Layers that are repacked already are put back.
    """
    layers = [m for m in modules if mode_chooses_kernel(m) and m.__dict__.get(_AVX512) and _on_cpu(m)]
    if layers:
        note(
            "Evaluations do not repack the 4-bit weights for this CPU, as bitsandbytes does: later steps would lose "
            "gradients."
        )
    with ExitStack() as undo:
        for layer in layers:
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                layer.state_dict()  # saving is what unpacks
            undo.enter_context(held_attribute(layer, _AVX512, False))
        yield


def _on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters(recurse=False))
