"""What counts as equal: hidden states, outputs and fingerprints of two passes, up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..freeze.prefix import Prefix
from ..model.rows import Rows
from .codec import Codec

__all__ = ["Refused", "Rounding", "named_tensors", "real_positions", "sampled", "side_of"]

# Compare at most this many numbers of an output, and at least this many rows. A copy of all logits would be too large.
MOST_COMPARED, LEAST_ROWS = 2**16, 4

# Relative tolerances. Kernels for other shapes sum in another order: 1e-6 per block in float32, more above it, and 1e-2
# in the sixteen-bit types and under autocast to them.
OF_STATES, OF_OUTPUTS, COARSE = 2e-5, 1e-4, 5e-2
# What enters block 0 mostly comes from a table, so fingerprints differ little even in sixteen bits.
OF_FINGERPRINTS, OF_FINGERPRINTS_COARSE = 2e-4, 5e-3


class Refused(Exception):
    """Serving would change, or might change, what training computes; the text is the reason."""


class Rounding:
    """Equality up to rounding in the precision of the current pass, and of stored states."""

    def __init__(self, prefix: Prefix, codec: Codec) -> None:
        self._prefix = prefix
        self._codec = codec

    @property
    def _autocast(self) -> bool:
        return isinstance(self._prefix.autocast, torch.dtype)

    def same_states(self, a: Tensor, b: Tensor) -> bool:
        """Whether hidden states are equal, once they have been stored."""
        coarse = COARSE if self._autocast or self._codec.rounds else 0.0
        return _close(self._codec.round(a), self._codec.round(b), max(OF_STATES, coarse))

    def same_outputs(self, a: Tensor, b: Tensor) -> bool:
        """Whether outputs of the whole model are equal."""
        return _close(a, b, max(OF_OUTPUTS, self._codec.tolerance, COARSE if self._autocast else 0.0))

    def same_fingerprints(self, now: Tensor, before: Tensor) -> bool:
        """Whether fingerprints are equal; those before may be NaN, which is unknown and equal to all."""
        tolerance = OF_FINGERPRINTS_COARSE if self._autocast else OF_FINGERPRINTS
        size = torch.stack([before[:, 1].abs().sqrt(), before[:, 1].abs()], 1)
        return bool((((now - before).abs() <= tolerance * size + 1e-9) | before.isnan()).all())


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Compared position by position, so that a huge position does not hide another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not a.numel():
        return True
    if not a.is_floating_point():
        return False
    tolerance = max(tolerance, COARSE) if a.dtype.itemsize < 4 else tolerance
    a, b = (t.float().reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    least = 1e-3 * tolerance * float(a.norm(dim=1).mean()) + 1e-7
    return bool(((a - b).norm(dim=1) <= tolerance * a.norm(dim=1) + least).all())


def real_positions(rows: Rows, side: int, device: torch.device) -> Tensor:
    """(samples, positions) bool: which are not padding."""
    real = torch.zeros(rows.count, rows.width(side), dtype=torch.bool)
    for row, (first, last) in enumerate(rows.spans(side)):
        real[row, first:last] = True
    return real.to(device)


def named_tensors(output: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """All tensors of an output, each with its place in it."""
    if isinstance(output, Tensor):
        return [(name, output)]
    if isinstance(output, Mapping):
        # Keys and values for generation are returned unasked, and skipped blocks have none.
        items = [(str(key), item) for key, item in output.items() if key != "past_key_values"]
    elif isinstance(output, (tuple, list)):
        items = [(f"{name}[{n}]", item) for n, item in enumerate(output)]
    else:
        items = list(vars(output).items()) if dataclasses.is_dataclass(output) else []
    return [pair for key, item in items for pair in named_tensors(item, key)]


def side_of(name: str, output: Tensor, rows: Rows) -> int | None:
    """Whose positions the second dimension of an output is: 0 the encoder's, 1 the decoder's; None if no text's."""
    sides = (0,) if name.startswith("encoder_") or not rows.width(1) else (1, 0)  # the widths of both may be equal
    return next(
        (side for side in sides if rows.width(side) and output.shape[:2] == (rows.count, rows.width(side))), None
    )


def sampled(output: Any, rows: Rows) -> list[tuple[str, Tensor]]:
    """Evenly spaced rows of each tensor of an output, without padded positions."""
    found = []
    for name, tensor in named_tensors(output):
        tensor = tensor.detach()
        side = side_of(name, tensor, rows)
        if side is not None and rows.is_padded(side):
            tensor = tensor[real_positions(rows, side, tensor.device)]
        if tensor.ndim > 1:
            tensor = tensor.reshape(-1, tensor.shape[-1])
            most = max(LEAST_ROWS, MOST_COMPARED // max(1, tensor.shape[-1]))
            tensor = tensor[:: max(1, -(-len(tensor) // most))]
        found.append((name, tensor.clone()))
    return found
