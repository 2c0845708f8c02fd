"""Extractive question answering: the answer is a span of the context, or there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DataError, ModelError
from ._files import check_encoding
from ._spans import Window, best_span, span_of
from ._text import faults_of_text
from .data import Split, load_file
from .pretrained import Source, load_model, load_tokenizer
from .squad import answers_of, read_nested, score
from .task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["QuestionAnswering"]

_OF_WINDOWS = ("row", "null", "starts", "ends")  # beside what the model takes


@dataclass
class QuestionAnswering(Task):
    """Predict where in ``context`` the answer to ``question`` stands.

    A context that is longer than ``max_length`` leaves room for is cut into windows that overlap by ``doc_stride``
    tokens; each is a sample of its own, and in one without the answer ``[CLS]`` is right. Metrics are SQuAD's
    ``exact_match`` and ``f1``, in percent. If questions of the training data have no answer (SQuAD v2), none may be
    predicted too.

    Args:
        question_column: where the question stands.
        context_column: where the text stands that holds the answer.
        answers_column: where the answers stand, ``{"text": [...], "answer_start": [...]}``.
        max_length: tokens of question and window together, at most.
        doc_stride: tokens by which windows overlap; None: a third of ``max_length``.
        pad_to_max_length: pad every window to ``max_length`` (default: to the longest of its batch).
        n_best: starts and ends of a window that are paired.
        max_answer_length: tokens of an answer, at most.
        null_threshold: by how much "no answer" must beat the best span.
    """

    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    max_length: int = 384
    doc_stride: int | None = None
    pad_to_max_length: bool = False
    n_best: int = 20
    max_answer_length: int = 30
    null_threshold: float = 0.0
    _unanswerable: bool | None = field(default=None, init=False)
    _windows: Any = field(default=None, init=False)
    _rows: Any = field(default=None, init=False)

    name: ClassVar[str] = "question-answering"
    peft_task_type: ClassVar[str] = "QUESTION_ANS"
    label_names: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    scored_in_order: ClassVar[bool] = True

    def read(self, path: str, cache_dir: str | None = None) -> Split:
        """Rows of question, context and answers, or a file in SQuAD's own format."""
        from datasets import Dataset

        file = Path(path).expanduser()
        if file.suffix == ".json" and file.is_file():
            check_encoding(file)
            rows = read_nested(file)
            if rows:
                return Split(Dataset.from_list(rows), path, lambda index: f"question {rows[index]['id']!r}")
            if rows is not None:
                raise DataError(f"{path} holds no question.", cause="Its data is empty.", fix="Give another file.")
        return load_file(path, cache_dir)

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """Question, context and answers."""
        return {
            "--question_column": [self.question_column],
            "--context_column": [self.context_column],
            "--answers_column": [self.answers_column],
        }

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without question or context, or whose answers do not stand where they should."""
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
                    faults.setdefault(index, f"at answer_start {start} stands {there!r}, not the answer {text!r}")
        return faults

    def fit(self, train: Split) -> None:
        """Whether questions may have no answer."""
        counts = [len(answers_of(value) or ()) for value in train.rows[self.answers_column]]
        self._unanswerable = not all(counts)
        if not any(counts):
            raise DataError(
                f"{train.name} has no question with an answer.",
                cause="There is nothing to learn from.",
                fix="Give rows with answers.",
            )

    def load_processor(self, source: Source) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ModelError: it does not tell which characters a token stands for.
        """
        tokenizer = load_tokenizer(source)
        if not tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer {source.tokenizer or source.name} does not say which characters a token stands for.",
                cause="It is written in Python; spans can be mapped back only by the fast ones (tokenizer.json).",
                fix="Give a model with a fast tokenizer: --tokenizer_name NAME",
            )
        tokenizer.padding_side = "right"  # positions count from the left
        return tokenizer

    def load_model(self, source: Source) -> PreTrainedModel:
        """The model with a head of two outputs a token: start and end."""
        from transformers import AutoModelForQuestionAnswering

        return load_model(AutoModelForQuestionAnswering, source)

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Windows as token ids, with the first and last token of the answer."""
        return self._cut(rows, tokenizer).remove_columns(list(_OF_WINDOWS))

    def prepare_evaluation(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The same; ``compute_metrics`` scores these rows from then on."""
        windows = self._cut(rows, tokenizer)
        self._rows, self._windows = rows, windows.select_columns(list(_OF_WINDOWS)).with_format("numpy")
        return windows.remove_columns(list(_OF_WINDOWS))

    def _cut(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        stride = self.max_length // 3 if self.doc_stride is None else self.doc_stride
        special = tokenizer.num_special_tokens_to_add(pair=True)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            # Leading space, of which some questions have a lot, would count as tokens.
            questions = [text.strip() for text in batch[self.question_column]]
            for text, ids in zip(questions, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
                room = self.max_length - len(ids) - special
                if room <= stride:
                    raise DataError(
                        f"The question {text[:60]!r} has {len(ids)} tokens, which leave {room} of {self.max_length} to "
                        "the context.",
                        cause=f"Windows of the context overlap by {stride} tokens, and must be longer than that.",
                        fix=f"A longer --max_seq_length, or --doc_stride {max(0, room // 2)}"
                        if room > 1
                        else "A longer --max_seq_length.",
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
                of_context = [which == 1 for which in encoded.sequence_ids(window)]
                starts = [span[0] if inside else -1 for span, inside in zip(offsets[window], of_context, strict=True)]
                ends = [span[1] if inside else -1 for span, inside in zip(offsets[window], of_context, strict=True)]
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

        return rows.map(
            encode, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads to the longest window of the batch, or to ``max_length``."""
        from .text_classification import pad

        return pad(tokenizer, self)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> Any:
        """Start and end logits. Some models return more behind them."""
        return logits[:2]

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Exact match and F1 of the best span of each row's windows."""
        contexts, windows = self._rows[self.context_column], self._found(prediction)
        return score(
            [self.answer(*pair) for pair in zip(contexts, windows, strict=True)],
            [[text for text, _ in answers_of(value) or ()] for value in self._rows[self.answers_column]],
        )

    def _found(self, prediction: EvalPrediction) -> list[list[Window]]:
        """The windows of each row, with what the model says of them."""
        found: list[list[Window]] = [[] for _ in range(len(self._rows))]
        logits: Any = prediction.predictions
        for window, start, end in zip(self._windows, *logits, strict=True):
            size = len(window["starts"])  # beyond it is padding
            found[int(window["row"])].append(
                Window(window["starts"], window["ends"], start[:size], end[:size], int(window["null"]))
            )
        return found

    def answer(self, context: str, windows: list[Window]) -> str:
        """The text of the best span; empty where there is none."""
        span = best_span(
            windows,
            n_best=self.n_best,
            max_tokens=self.max_answer_length,
            null_threshold=self.null_threshold if self._unanswerable else None,
        )
        return "" if span is None else context[slice(*span)]


def _null_token(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    return 0
