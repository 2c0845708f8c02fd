"""Linear CKA, plain and debiased, without building anything larger than the smaller Gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ProbeError

__all__ = ["CKAReference", "cka_flops", "linear_cka", "unit_rows"]


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row of ``x`` (tokens, features) to Euclidean length 1; a zero row stays zero.

    On decoders a few attention-sink tokens are hundreds of times longer than all others, and CKA sums squares:
    one of them decides the result. Before centring each token then has the same say. Isotropic scaling of the
    features, to which CKA is invariant anyway, is all that is lost where rows have one length (after a LayerNorm).
    """
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear centred kernel alignment of two representations of the same n tokens.

    Plain: ``‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F)`` on column-centred X, Y (Kornblith et al. 2019). Debiased: the same ratio
    of unbiased HSIC estimates (Song et al. 2012; Nguyen et al. 2021), which does not rise towards 1 as n falls
    below the number of features; it can be slightly negative.

    Args:
        x: (n, d1).
        y: (n, d2).
        debiased: use the unbiased estimator.

    Returns:
        1 for equal representations up to rotation and scale. NaN if an entry is not finite. Of a constant
        representation: 1 with another constant one, 0 with any other.

    Raises:
        ProbeError: different numbers of rows, or fewer than 2 (debiased: 4).

    >>> x = torch.eye(4)
    >>> round(linear_cka(x, 3 * x), 6)
    1.0
    """
    return CKAReference(x, debiased, normalize_rows=False).cka(y)


def cka_flops(n: int, d: int) -> int:
    """FLOPs of one comparison with a kept reference: two products, each 2·n·d·min(n, d)."""
    return 4 * n * d * min(n, d)


class CKAReference:
    """One side of a CKA, computed once: the pre-trained representation H(0) never changes.

    Keeps the centred rows in float32 (n·d·4 bytes, host memory), or in float64 where they came so, and their
    self-alignment.

    Args:
        before: (n, d).
        debiased: use the unbiased estimator.
        normalize_rows: apply :func:`unit_rows` to both sides first.

    Raises:
        ProbeError: fewer than 2 rows (debiased: 4).
    """

    def __init__(self, before: Tensor, debiased: bool = False, normalize_rows: bool = True) -> None:
        least = 4 if debiased else 2
        if len(before) < least:
            raise ProbeError(
                f"CKA was asked for on {len(before)} tokens.",
                cause=f"It compares tokens with each other and needs at least {least}.",
                fix="Give a probe with more samples, or raise SafeConfig(probe_tokens=...).",
            )
        self.debiased = debiased
        self.normalize_rows = normalize_rows
        kept = torch.float64 if before.dtype == torch.float64 else torch.float32
        x = self._centred(before)
        self._self_alignment = self._alignment(x, x)
        self._x = x.to("cpu", kept)

    @property
    def nbytes(self) -> int:
        """Host memory held, in bytes."""
        return self._x.nbytes

    def cka(self, after: Tensor) -> float:
        """CKA with ``after`` (n, any width); see :func:`linear_cka`."""
        if len(after) != len(self._x):
            raise ProbeError(
                f"CKA was asked for between {len(self._x)} and {len(after)} tokens.",
                cause="Both representations must be of the same tokens, row by row.",
                fix="Measure both on the same probe.",
            )
        y = self._centred(after)
        x = self._x.to(y)
        own = self._alignment(y, y)
        if not (math.isfinite(own) and math.isfinite(self._self_alignment)):
            return math.nan
        if own <= 0 or self._self_alignment <= 0:
            return 1.0 if own <= 0 and self._self_alignment <= 0 else 0.0
        return self._alignment(x, y) / math.sqrt(own * self._self_alignment)

    def score(self, after: Tensor) -> float:
        """Importance ``1 − CKA``, between 0 (nothing moved) and 1; NaN where an activation is not finite."""
        cka = self.cka(after)
        return cka if math.isnan(cka) else min(1.0, max(0.0, 1.0 - cka))

    def _centred(self, x: Tensor) -> Tensor:
        # float64 on the CPU costs little and leaves 1 - CKA exact to 1e-12; accelerators are slow at it.
        x = x.detach().to(torch.float64 if x.device.type == "cpu" else torch.float32)
        if self.normalize_rows:
            x = unit_rows(x)
        scale = x.abs().max()
        x = x - x.mean(0)
        # What rounding leaves of a constant representation is nothing.
        return torch.zeros_like(x) if x.abs().max() <= scale * torch.finfo(x.dtype).eps * 4 else x

    def _alignment(self, x: Tensor, y: Tensor) -> float:
        """‖YᵀX‖²_F = ⟨XXᵀ, YYᵀ⟩, or n(n−3) times its unbiased HSIC."""
        n = len(x)
        if n <= max(x.shape[1], y.shape[1]):
            same = x is y
            k = x @ x.T
            m = k if same else y @ y.T
            inner = (k * m).sum()
        else:
            inner = (y.T @ x).pow(2).sum()
        if not self.debiased:
            return float(inner)
        # Gram matrices without their diagonals, from features alone: with centred columns the row sums of XXᵀ are
        # zero, so those of the hollow Gram are minus its diagonal a. (HSIC₁ is invariant to centring.)
        a, b = x.pow(2).sum(1), y.pow(2).sum(1)
        products = (a * b).sum()
        trace = inner - products
        middle = a.sum() * b.sum() / ((n - 1) * (n - 2))
        return float(trace + middle - 2 * products / (n - 2))
