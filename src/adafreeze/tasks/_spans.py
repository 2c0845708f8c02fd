"""Spans of a context: cut into overlapping windows of tokens, and found again in what a model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Window", "best_span", "span_of"]


@dataclass(frozen=True)
class Window:
    """What a model says of one window of a context, over its tokens (n,).

    Args:
        starts: the first character of each token in the context; −1 for tokens that are not of the context.
        ends: the character behind its last.
        start_logits: that the answer begins with this token.
        end_logits: that it ends with it.
        null: the token that stands for "no answer here" (``[CLS]``).
    """

    starts: np.ndarray
    ends: np.ndarray
    start_logits: np.ndarray
    end_logits: np.ndarray
    null: int


def span_of(starts: Sequence[int], ends: Sequence[int], first: int, last: int) -> tuple[int, int] | None:
    """The first and last token of the characters [first, last); None where the window does not hold all of them.

    >>> span_of([-1, 0, 4, 9], [-1, 3, 8, 12], 4, 12), span_of([-1, 4, 9], [-1, 8, 12], 0, 8)
    ((2, 3), None)
    """
    inside = [index for index, start in enumerate(starts) if start >= 0]
    if not inside or starts[inside[0]] > first or ends[inside[-1]] < last:
        return None
    begin = max(index for index in inside if starts[index] <= first)
    end = min(index for index in inside if ends[index] >= last)
    return begin, end


def best_span(
    windows: Sequence[Window], *, n_best: int, max_tokens: int, null_threshold: float | None
) -> tuple[int, int] | None:
    """The characters [first, last) of the answer: the span with the largest start + end logit of all windows.

    Of each window the ``n_best`` best starts and ends are paired, as in transformers' run_qa; spans must be of the
    context, run forward, and have at most ``max_tokens`` tokens.

    With ``null_threshold`` the answer may be none: the score of that is the smallest start + end logit of the windows'
    null tokens, and None is returned where it exceeds the best span's by more than the threshold (SQuAD v2). None is
    also returned where no span is possible.
    """
    best, found = -np.inf, None
    for window in windows:
        outside = window.starts < 0
        starts = np.argsort(window.start_logits)[::-1][:n_best]
        ends = np.argsort(window.end_logits)[::-1][:n_best]
        scores: Any = window.start_logits[starts, None] + window.end_logits[None, ends]
        length = ends[None] - starts[:, None] + 1
        wrong = (length < 1) | (length > max_tokens) | outside[starts, None] | outside[None, ends]
        scores = np.where(wrong, -np.inf, scores)
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        if scores[row, column] > best:
            best = scores[row, column]
            found = int(window.starts[starts[row]]), int(window.ends[ends[column]])
    if null_threshold is not None and found is not None:
        null = min(window.start_logits[window.null] + window.end_logits[window.null] for window in windows)
        if null - best > null_threshold:
            return None
    return found
