"""Extractive question answering: the answer is a span of the context, or there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError, DataError, ModelError
from ._files import check_encoding
from ._text import faults_of_text
from .data import Split, load_file
from .pretrained import Source, load_tokenizer
from .squad import answers_of, best_span, read_nested, score, span_of
from .task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase

__all__ = ["QuestionAnswering"]

_OF_WINDOWS = ("row", "null", "starts", "ends")  # columns that are not inputs of the model


@dataclass
class QuestionAnswering(Task):
    """Predict the span of ``context`` that answers ``question``.

    A long context is cut into windows that overlap by ``doc_stride`` tokens. Each window is a sample; without the
    answer, ``[CLS]`` is its label. Metrics are SQuAD's ``exact_match`` and ``f1``, in percent. If questions of the
    training data have no answer (SQuAD v2), "no answer" may be predicted.

    Args:
        answers_column: ``{"text": [...], "answer_start": [...]}``.
        max_length: maximum tokens of question and window together.
        doc_stride: None: a third of ``max_length``.
        pad_to_max_length: pad to ``max_length``, not to the longest window of the batch.
        n_best_size: number of starts and ends of a window that are paired.
        max_answer_length: maximum tokens of an answer.
        null_score_diff_threshold: by how much "no answer" must exceed the best span.

    Raises:
        ConfigError: a number is too small.
    """

    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    max_length: int = 384
    doc_stride: int | None = None
    pad_to_max_length: bool = False
    n_best_size: int = 20
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0
    _unanswerable: bool | None = field(default=None, init=False)
    _windows: Any = field(default=None, init=False)
    _rows: Any = field(default=None, init=False)

    name: ClassVar[str] = "question-answering"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_task_type: ClassVar[str] = "QUESTION_ANS"
    label_names: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    scored_in_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for flag, least in (("doc_stride", 0), ("n_best_size", 1), ("max_answer_length", 1)):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise ConfigError(f"--{flag} is {value}; it must be at least {least}.", fix=f"Leave out --{flag}.")

    def read(self, path: str, cache_dir: str | None = None) -> Split:
        """Read rows of question, context and answers, or a file in SQuAD's own format."""
        from datasets import Dataset

        file = Path(path).expanduser()
        if file.suffix == ".json" and file.is_file():
            check_encoding(file)
            rows = read_nested(file)
            if rows:
                return Split(Dataset.from_list(rows), path, lambda index: f"question {rows[index]['id']!r}")
            if rows is not None:
                raise DataError(f"{path} has no questions.", fix="Give another file.")
        return load_file(path, cache_dir)

    def columns(self, found: list[str]) -> tuple[str, str, str]:
        """Question, context and answers."""
        return "question_column", "context_column", "answers_column"

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without question or context, or with an answer that is not in the context at its ``answer_start``."""
        faults = faults_of_text(split, (self.question_column, self.context_column))
        contexts, values = split.rows[self.context_column], split.rows[self.answers_column]
        for index, (context, value) in enumerate(zip(contexts, values, strict=True)):
            if index in faults:
                continue
            answers = answers_of(value)
            if answers is None:
                faults[index] = "the answers are not {'text': [...], 'answer_start': [...]}"
            elif not answers and self._unanswerable is False:
                faults[index] = "no answer, but every question of the training data has one"
            for text, start in answers or ():
                if not text.strip():
                    faults.setdefault(index, "an answer is empty")
                elif not 0 <= start < len(context):
                    faults.setdefault(index, f"answer_start {start} is beyond the context of {len(context)} characters")
                elif not context.startswith(text, start):
                    there = context[start : start + len(text)]
                    faults.setdefault(index, f"the text at answer_start {start} is {there!r}, not the answer {text!r}")
        return faults

    def fit(self, train: Split) -> None:
        """Learn whether questions may have no answer."""
        counts = [len(answers_of(value) or ()) for value in train.rows[self.answers_column]]
        self._unanswerable = not all(counts)
        if not any(counts):
            raise DataError(f"{train.name} has no question with an answer.", fix="Give rows with answers.")

    def load_processor(self, source: Source) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ModelError: it is a slow one.
        """
        tokenizer = load_tokenizer(source)
        if not tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer {source.tokenizer or source.name} is written in Python, and only fast tokenizers "
                "(tokenizer.json) map tokens to characters.",
                fix="Give a model with a fast tokenizer: --tokenizer_name NAME",
            )
        tokenizer.padding_side = "right"  # positions count from the left
        return tokenizer

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids of the windows, with the first and last token of the answer."""
        return self._cut(rows, tokenizer).remove_columns(list(_OF_WINDOWS))

    def prepare_evaluation(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The same; later calls of ``compute_metrics`` score these rows."""
        windows = self._cut(rows, tokenizer)
        self._rows, self._windows = rows, windows.select_columns(list(_OF_WINDOWS)).with_format("numpy")
        return windows.remove_columns(list(_OF_WINDOWS))

    def _cut(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        stride = self.max_length // 3 if self.doc_stride is None else self.doc_stride
        special = tokenizer.num_special_tokens_to_add(pair=True)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            # Some questions start with many spaces, which would count as tokens.
            questions = [text.strip() for text in batch[self.question_column]]
            for text, ids in zip(questions, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
                room = self.max_length - len(ids) - special
                if room <= stride:
                    raise DataError(
                        f"The question {text[:60]!r} has {len(ids)} tokens and leaves {room} of {self.max_length} for "
                        f"the context, but windows overlap by {stride}.",
                        fix="Increase --max_seq_length" + (f", or use --doc_stride {room // 2}." if room > 1 else "."),
                    )
            encoded = tokenizer(
                questions,
                batch[self.context_column],
                truncation="only_second",
                max_length=self.max_length,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            sources, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
            found: dict[str, list[Any]] = {name: [] for name in (*self.label_names, *_OF_WINDOWS)}
            for window, source in enumerate(sources):
                spans = [
                    span if which == 1 else (-1, -1)
                    for span, which in zip(offsets[window], encoded.sequence_ids(window), strict=True)
                ]
                starts, ends = (list(side) for side in zip(*spans, strict=True))
                null = _null_token(encoded["input_ids"][window], tokenizer)
                answers = answers_of(batch[self.answers_column][source])
                span = None
                if answers:
                    text, first = answers[0]
                    span = span_of(starts, ends, first, first + len(text))
                values = (*(span or (null, null)), indices[source], null, starts, ends)
                for name, value in zip(found, values, strict=True):
                    found[name].append(value)
            return {**encoded, **found}

        return rows.map(  # load_from_cache_file as in TextPair.prepare
            encode, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
        )

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> Any:
        """Start and end logits; some models return more."""
        return logits[:2]

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Exact match and F1 of the best span of each row's windows."""
        count, logits = len(self._rows), prediction.predictions
        best: list[tuple[float, tuple[int, int] | None]] = [(-math.inf, None)] * count
        null = [math.inf] * count  # SQuAD v2: the smallest score of "no answer" among the windows
        for window, start, end in zip(self._windows, *logits, strict=True):
            row, size = int(window["row"]), len(window["starts"])  # beyond size is padding
            span = best_span(
                window["starts"], window["ends"], start[:size], end[:size], self.n_best_size, self.max_answer_length
            )
            best[row] = max(best[row], span, key=lambda pair: pair[0])
            null[row] = min(null[row], float(start[window["null"]] + end[window["null"]]))
        guesses = []
        for context, (found, place), none in zip(self._rows[self.context_column], best, null, strict=True):
            impossible = self._unanswerable and none - found > self.null_score_diff_threshold
            guesses.append("" if place is None or impossible else context[slice(*place)])
        golds = [[text for text, _ in answers_of(value) or ()] for value in self._rows[self.answers_column]]
        return score(guesses, golds)


def _null_token(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    return 0
