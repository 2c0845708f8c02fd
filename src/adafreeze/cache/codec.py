"""How states are stored: as they are, or in fewer bits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CODECS", "Codec"]


class Codec:
    """Stores states unchanged.

    Attributes:
        rounds: decoded states are not the encoded ones.
        tolerance: relative difference of outputs that its rounding may cause.
    """

    rounds = False
    tolerance = 0.0

    def encode(self, states: Tensor) -> Tensor:
        """What is stored of states (..., features)."""
        return states

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The states again."""
        return stored

    def round(self, states: Tensor) -> Tensor:
        """The states as they come back; rounding again changes nothing."""
        return self.decode(self.encode(states), states.dtype) if self.rounds else states


class _Cast(Codec):
    """In bfloat16: half the bytes of float32."""

    rounds, tolerance = True, 0.05

    def encode(self, states: Tensor) -> Tensor:
        return states.to(torch.bfloat16) if states.is_floating_point() else states

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)


class _PerToken(Codec):
    """In eight bits with a scale per token, x ≈ s q with s = max |x| / max q: features + 4 bytes for each token.

    The float32 scale is in the first four bytes of a token's row.

    Args:
        dtype: of q.
    """

    rounds, tolerance = True, 0.2

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._largest = float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)

    def encode(self, states: Tensor) -> Tensor:
        if not states.is_floating_point() or not states.ndim:
            return states
        values = states.float()
        scale = values.abs().amax(-1, keepdim=True) / self._largest
        scaled = values / scale.clamp_min(torch.finfo(torch.float32).tiny)
        if not self._dtype.is_floating_point:
            scaled = scaled.round()
        scaled = scaled.clamp(-self._largest, self._largest).to(self._dtype)
        return torch.cat([scale.view(torch.uint8), scaled.contiguous().view(torch.uint8)], -1)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        if stored.dtype != torch.uint8 or not dtype.is_floating_point:
            return stored
        scale = stored[..., :4].contiguous().view(torch.float32)
        return (stored[..., 4:].contiguous().view(self._dtype).float() * scale).to(dtype)


# By SafeConfig.cache_dtype.
CODECS: dict[str | None, Codec] = {
    None: Codec(),
    "bfloat16": _Cast(),
    "float8_e4m3fn": _PerToken(torch.float8_e4m3fn),
    "int8": _PerToken(torch.int8),
}
