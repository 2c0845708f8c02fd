"""SQuAD (Rajpurkar et al. 2016, 2018): answer spans, exact match and F1, and the file format.

Written here because transformers 5 has neither its SQuAD metrics nor run_qa's postprocessing.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

__all__ = ["answers_of", "best_span", "exact_match", "f1", "normalize", "read_nested", "score", "span_of"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def span_of(starts: Sequence[int], ends: Sequence[int], first: int, last: int) -> tuple[int, int] | None:
    """The first and last token of the characters [first, last); None if they are not all in the window.

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
    starts: np.ndarray, ends: np.ndarray, start_logits: np.ndarray, end_logits: np.ndarray, n_best: int, max_tokens: int
) -> tuple[float, tuple[int, int] | None]:
    """The largest start + end logit of a span in a window, and the characters [first, last) of the span.

    As in transformers' run_qa, the ``n_best`` starts and ends are paired; spans lie in the context, run forward, and
    have at most ``max_tokens`` tokens. Returns (−inf, None) if there is no such span. The arrays have shape (tokens,);
    ``starts`` has the first character of each token in the context (−1 for tokens outside the context), ``ends`` the
    character after its last.
    """
    firsts, lasts = np.argsort(start_logits)[::-1][:n_best], np.argsort(end_logits)[::-1][:n_best]
    length = lasts[None] - firsts[:, None] + 1
    outside = (starts < 0)[firsts, None] | (starts < 0)[None, lasts]
    scores: Any = start_logits[firsts, None] + end_logits[None, lasts]
    scores = np.where((length < 1) | (length > max_tokens) | outside, -np.inf, scores)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    if scores[row, column] == -np.inf:
        return -np.inf, None
    return float(scores[row, column]), (int(starts[firsts[row]]), int(ends[lasts[column]]))


def normalize(text: str) -> str:
    """Lower case without ASCII punctuation, then without the words a, an, the; one space between words.

    >>> normalize("The  Eiffel-Tower, Paris!")
    'eiffeltower paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(guess: str, gold: str) -> float:
    """1 if the normalized texts are equal, else 0."""
    return float(normalize(guess) == normalize(gold))


def f1(guess: str, gold: str) -> float:
    """2·P·R / (P + R) over the words of the normalized texts, counted with repetitions.

    If one of them has no words: 1 if neither has, else 0.

    >>> round(f1("in the old town", "the town"), 4)
    0.5
    """
    found, wanted = normalize(guess).split(), normalize(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def score(guesses: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` in percent: the maximum over the answers of a question, the mean over questions.

    As in SQuAD v2's own script, the guess ``""`` is right if no answer has words. If some questions have no answer,
    both kinds are also scored separately: ``HasAns_exact``, ``HasAns_f1``, ``NoAns_exact``, ``NoAns_f1``.
    """
    answers = [[gold for gold in given if normalize(gold)] for given in golds]
    pairs = list(zip(guesses, answers, strict=True))
    exact = [max(exact_match(guess, gold) for gold in given or [""]) for guess, given in pairs]
    partial = [max(f1(guess, gold) for gold in given or [""]) for guess, given in pairs]

    def mean(values: list[float], kept: Sequence[bool]) -> float:
        chosen = [value for value, keep in zip(values, kept, strict=True) if keep]
        return 100 * sum(chosen) / len(chosen)

    everything, answered = [True] * len(golds), [bool(given) for given in golds]
    found = {"exact_match": mean(exact, everything), "f1": mean(partial, everything)}
    if not all(answered):
        for name, kept in (("HasAns", answered), ("NoAns", [not given for given in answered])):
            if any(kept):
                found |= {f"{name}_exact": mean(exact, kept), f"{name}_f1": mean(partial, kept)}
    return found


def answers_of(value: Any) -> list[tuple[str, int]] | None:
    """(text, first character in the context) of each answer of a row; None if the row is in neither format.

    >>> answers_of({"text": ["a"], "answer_start": [3]}), answers_of([{"text": "a", "answer_start": 3}])
    ([('a', 3)], [('a', 3)])
    """
    try:
        if isinstance(value, list):
            pairs = [(item["text"], item["answer_start"]) for item in value]
        else:
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
    except (TypeError, KeyError, ValueError):
        return None
    return pairs if all(isinstance(text, str) and isinstance(start, int) for text, start in pairs) else None


def read_nested(path: Path) -> list[dict[str, Any]] | None:
    """The rows (id, question, context, answers) of a file in SQuAD's own format; None for a file of rows.

    The format is ``{"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "...", "question": "...", "answers":
    [{"text": "...", "answer_start": 0}]}]}]}]}``. A question with ``is_impossible`` has no answers.

    Raises:
        DataError: it is in neither format.
    """
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] != "{":
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line
            return None
        raise DataError(f"{path} is not valid JSON: {error}.", fix=f"Correct line {error.lineno}.") from error
    rows, place = [], "the file"
    try:
        for i, article in enumerate(content["data"]):
            place = f"data[{i}]"
            for j, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{i}].paragraphs[{j}]"
                for k, question in enumerate(paragraph["qas"]):
                    place = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    row = {"id": question["id"], "question": question["question"], "context": paragraph["context"]}
                    answers = answers_of([] if question.get("is_impossible") else question["answers"])
                    if answers is None or not all(isinstance(value, str) for value in row.values()):
                        raise TypeError
                    given = {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}
                    rows.append({**row, "answers": given})
    except (KeyError, TypeError) as error:
        fault = f"has no {error}" if isinstance(error, KeyError) else "has another structure"
        raise DataError(
            f"{path} is not in SQuAD's format: {place} {fault}.",
            fix='Use {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "...", "question": "...", "answers": '
            '[{"text": "...", "answer_start": 0}]}]}]}]}, or rows with question, context and answers.',
        ) from error
    return rows
