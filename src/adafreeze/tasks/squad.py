"""SQuAD's exact match and F1 (Rajpurkar et al. 2016, 2018), and its two file formats."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["answers_of", "exact_match", "f1", "normalize", "read_nested", "score"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, then without the words a, an, the; one space between words.

    >>> normalize("The  Eiffel-Tower, Paris!")
    'eiffeltower paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(guess: str, gold: str) -> float:
    """1 where both are the same normalized text, else 0."""
    return float(normalize(guess) == normalize(gold))


def f1(guess: str, gold: str) -> float:
    """2·P·R / (P + R) over the words of both normalized texts, counted with repetitions.

    Where one of them has no words: 1 if neither has, else 0.

    >>> round(f1("in the old town", "the town"), 4)
    0.5
    """
    found, wanted = normalize(guess).split(), normalize(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def score(guesses: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` in percent: the best over the answers of a question, the mean over questions.

    The guess that there is no answer is ``""``, which is right where none of the answers has words. Where questions
    have none at all, the same is also told of both kinds apart, as ``HasAns_exact``, ``HasAns_f1``, ``NoAns_exact`` and
    ``NoAns_f1``. All as SQuAD v2's own script has it.
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
    """(text, where it starts in the context) for each answer of a row; None where it is in neither format.

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
    """The rows (id, question, context, answers) of a file in SQuAD's own format; None where it is a list of rows.

    That format is ``{"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "...", "question": "...", "answers":
    [{"text": "...", "answer_start": 0}]}]}]}]}``. A question that ``is_impossible`` has no answers.

    Raises:
        DataError: it is neither; the place is named.
    """
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] != "{":
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line
            return None
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}).",
            cause="The file is cut off, or lacks a quote, a comma or a brace.",
            fix=f"Correct it; `sed -n {error.lineno}p {path}` shows the line.",
        ) from error
    rows = []
    for place, article in _items(path, content, "data", ""):
        for inner, paragraph in _items(path, article, "paragraphs", place):
            context = _text(path, paragraph, "context", inner)
            for spot, question in _items(path, paragraph, "qas", inner):
                given = [] if question.get("is_impossible") else question.get("answers")
                answers = answers_of(given)
                if answers is None:
                    raise _malformed(path, f"{spot}.answers", "is no list of texts with their answer_start")
                rows.append(
                    {
                        "id": _text(path, question, "id", spot),
                        "question": _text(path, question, "question", spot),
                        "context": context,
                        "answers": {"text": [t for t, _ in answers], "answer_start": [s for _, s in answers]},
                    }
                )
    return rows


def _items(path: Path, parent: dict[str, Any], key: str, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    found = f"{place}.{key}" if place else key
    if not isinstance(parent.get(key), list):
        raise _malformed(path, found, "is no list" if key in parent else "is missing")
    for index, item in enumerate(parent[key]):
        if not isinstance(item, dict):
            raise _malformed(path, f"{found}[{index}]", "is no object")
        yield f"{found}[{index}]", item


def _text(path: Path, parent: dict[str, Any], key: str, place: str) -> str:
    if not isinstance(parent.get(key), str):
        raise _malformed(path, f"{place}.{key}", "is no text" if key in parent else "is missing")
    return parent[key]


def _malformed(path: Path, place: str, fault: str) -> DataError:
    return DataError(
        f"{path} is not in SQuAD's format: {place} {fault}.",
        cause='It must be {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "...", "question": "...", '
        '"answers": [{"text": "...", "answer_start": 0}]}]}]}]}, or rows with question, context and answers.',
        fix=f"Correct {place}.",
    )
