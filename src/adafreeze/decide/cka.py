"""Linear CKA, plain and debiased, without building anything larger than the smaller Gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ProbeError

__all__ = ["CKAReference", "cka_flops", "linear_cka", "unit_rows"]


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row of ``x`` (tokens, features) to Euclidean length 1; a zero row stays zero.

    On decoders a few attention-sink tokens are hundreds of times longer than all others, and CKA sums squares, so one
    of them would decide the result. If all rows have the same length already (after a LayerNorm), this changes nothing,
    since CKA is invariant to isotropic scaling.
    """
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear centered kernel alignment of two representations of the same n tokens.

    Plain: ``‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F)`` on column-centered X, Y (Kornblith et al. 2019). Debiased: the same ratio
    of unbiased HSIC estimates (Song et al. 2012; Nguyen et al. 2021), which does not rise towards 1 as n falls
    below the number of features; it can be slightly negative. With n no more than the larger width the work is done
    on n×n Gram matrices, otherwise on d×d products.

    Args:
        x: (n, d1).
        y: (n, d2).
        debiased: use the unbiased estimator.

    Returns:
        1 for equal representations up to rotation and scale. NaN if an entry is not finite. Of a constant
        representation: 1 with another constant one, 0 with any other. For the debiased estimate a representation
        without similarity between different tokens counts as constant: its unbiased HSIC is 0.

    Raises:
        ProbeError: different numbers of rows, or fewer than 2 (debiased: 4).

    >>> x = torch.eye(4)
    >>> round(linear_cka(x, 3 * x), 6)
    1.0
    """
    # CKA is symmetric; the wider side decides whether n×n is smaller.
    x, y = (x, y) if x.shape[1] >= y.shape[1] else (y, x)
    return CKAReference(x, debiased, normalize_rows=False).cka(y)


def cka_flops(n: int, d: int) -> int:
    """FLOPs of one ``.score``: the Gram matrix, 2·n²·d, if n ≤ d; otherwise YᵀY and YᵀX, each 2·n·d².

    >>> cka_flops(10, 20), cka_flops(20, 10)
    (4000, 8000)
    """
    return 2 * n * n * d if n <= d else 4 * n * d * d


class CKAReference:
    """One side of a CKA, computed once: the representation H(0) does not change.

    Stores its self-alignment and, in host memory, for n ≤ d the Gram matrix XXᵀ in float32 (float64 if H(0) is),
    otherwise H(0) itself: centering again is cheap, while storing the centered matrix would cost accuracy (float32) or
    twice the memory (bfloat16).

    Args:
        before: (n, d).
        debiased: use the unbiased estimator.
        normalize_rows: apply ``unit_rows`` to both sides first.

    Raises:
        ProbeError: fewer than 2 rows (debiased: 4).

    >>> reference = CKAReference(torch.eye(4, 2))
    >>> reference.nbytes, reference.score(torch.zeros(4, 2))
    (32, 1.0)
    """

    def __init__(self, before: Tensor, debiased: bool = False, normalize_rows: bool = True) -> None:
        least = 4 if debiased else 2
        if len(before) < least:
            raise ProbeError(
                f"CKA needs at least {least} tokens, but the probe gives {len(before)}.",
                fix="Pass a probe with more samples, or raise SafeConfig(probe_tokens=...).",
            )
        self.debiased = debiased
        self.normalize_rows = normalize_rows
        self._n, width = before.shape
        self._by_gram = self._n <= width
        if self._by_gram:
            kept = torch.float64 if before.dtype == torch.float64 else torch.float32
            self._kept = self._represent(before).to("cpu", kept)
        else:
            self._kept = before.detach().to("cpu", copy=True)
        # From the stored matrix, not the original: rounding then enters 1 − CKA only squared.
        x = self._side(before.device)
        self._self_alignment = self._alignment(x, x)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self._kept.nbytes

    def cka(self, after: Tensor) -> float:
        """CKA with ``after`` (n, any width); see ``linear_cka``."""
        if len(after) != self._n:
            raise ProbeError(
                f"CKA compares the same tokens, but got {self._n} and {len(after)}.",
                fix="Measure both on the same probe.",
            )
        y = self._represent(after)
        own = self._alignment(y, y)
        if not (math.isfinite(own) and math.isfinite(self._self_alignment)):
            return math.nan
        if own <= 0 or self._self_alignment <= 0:
            return 1.0 if own <= 0 and self._self_alignment <= 0 else 0.0
        return self._alignment(self._side(y.device), y) / math.sqrt(own * self._self_alignment)

    def score(self, after: Tensor) -> float:
        """Importance ``1 − CKA``, between 0 (nothing moved) and 1; NaN if an activation is not finite."""
        cka = self.cka(after)
        return cka if math.isnan(cka) else min(1.0, max(0.0, 1.0 - cka))

    def _side(self, device: torch.device) -> Tensor:
        kept = self._kept.to(device)
        return kept.to(_precision(device.type)) if self._by_gram else self._represent(kept)

    def _represent(self, x: Tensor) -> Tensor:
        """Centered rows (n, d), or their Gram matrix (n, n)."""
        x = x.detach().to(_precision(x.device.type))
        if self.normalize_rows:
            x = unit_rows(x)
        # CKA is scale-invariant but sums fourth powers, and 1e10⁴ overflows float32.
        largest = x.abs().max()
        x = x / torch.where(largest > 0, largest, 1)
        x = x - x.mean(0)
        if x.abs().max() <= 4 * torch.finfo(x.dtype).eps:  # a constant, up to rounding
            x = torch.zeros_like(x)
        if not self._by_gram:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return _u_centered(x @ x.T) if self.debiased else x @ x.T

    def _alignment(self, x: Tensor, y: Tensor) -> float:
        """‖YᵀX‖²_F = ⟨XXᵀ, YYᵀ⟩, or n(n−3) times its unbiased HSIC."""
        if self._by_gram:
            return float((x * y).sum())
        with torch.autocast(x.device.type, enabled=False):
            inner = (y.T @ x).pow(2).sum()
        if not self.debiased:
            return float(inner)
        # The Gram matrices without their diagonals a and b, from features alone: centered columns make the row sums
        # of XXᵀ zero, so those of the hollow matrix are −a. (The unbiased HSIC is invariant to centering.)
        n, a, b = self._n, x.pow(2).sum(1), y.pow(2).sum(1)
        products, sums = (a * b).sum(), a.sum() * b.sum() / ((n - 1) * (n - 2))
        hsic = inner - products + sums - 2 * products / (n - 2)
        return float(torch.where(hsic.abs() <= 16 * torch.finfo(x.dtype).eps * (inner + sums), 0, hsic))


def _precision(device: str) -> torch.dtype:
    # float64 on the CPU costs little and leaves 1 − CKA exact to 1e-12; accelerators are slow at it, or lack it.
    return torch.float64 if device == "cpu" else torch.float32


def _u_centered(gram: Tensor) -> Tensor:
    """Székely and Rizzo's U-centering: diagonal and row sums 0, so that n(n−3)·HSIC₁ is ⟨U(XXᵀ), U(YYᵀ)⟩."""
    n = len(gram)
    hollow = gram - torch.diag(gram.diag())
    rows = hollow.sum(1) / (n - 2)
    u = hollow - rows[:, None] - rows + rows.sum() / (n - 1)
    u = u - torch.diag(u.diag())
    nothing = u.abs().max() <= 16 * torch.finfo(u.dtype).eps * gram.abs().max()
    return torch.where(nothing, torch.zeros_like(u), u)
