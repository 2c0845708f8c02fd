"""Causal language modelling: plain text, or instruction tuning on prompt and completion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ._text import as_text, faults_of_text, guess_columns
from .pretrained import Source, load_model
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from .data import Split

__all__ = ["CausalLM"]

IGNORED = -100  # the label that every loss of transformers leaves out


@dataclass
class CausalLM(Task):
    """Predict the next token.

    One row of the data is one sequence; rows are neither joined nor split. With ``prompt_column`` and
    ``completion_column`` the loss is on the completion alone. The end-of-text token closes every row and is
    learnt. Metrics are ``perplexity`` = exp(mean loss of a token) and ``token_accuracy``, both over the
    tokens that have a loss.

    Args:
        text_column: the column of plain text; None: the usual names are looked for.
        prompt_column: what is given (with ``completion_column``, instead of ``text_column``).
        completion_column: what is to be learnt.
        prompt_separator: stands between prompt and completion, and counts as prompt.
        max_length: tokens of a row, at most. Longer texts are cut at the end; a prompt loses its beginning
            first.
        pad_to_max_length: pad every row to ``max_length`` (default: to the longest of its batch).
    """

    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    prompt_separator: str = "\n"
    max_length: int = 512
    pad_to_max_length: bool = False

    name: ClassVar[str] = "causal-lm"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """The text column, or prompt and completion."""
        if self.prompt_column and self.completion_column:
            return {"--prompt_column": [self.prompt_column], "--completion_column": [self.completion_column]}
        self.text_column = self.text_column or guess_columns(found)[0]
        return {"--text_column": [self.text_column]}

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text."""
        columns = (self.prompt_column, self.completion_column) if self.prompt_column else (self.text_column,)
        return faults_of_text(split, tuple(name for name in columns if name))

    def load_model(self, source: Source) -> PreTrainedModel:
        """The model with its own language-model head."""
        from transformers import AutoModelForCausalLM

        return load_model(AutoModelForCausalLM, source)

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and labels: the same ids, -100 where no loss is wanted."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pairs = self._prompts(batch, tokenizer) if self.prompt_column else self._texts(batch, tokenizer)
            ids = [prompt + rest for prompt, rest in pairs]
            return {
                "input_ids": ids,
                "attention_mask": [[1] * len(row) for row in ids],
                "labels": [[IGNORED] * len(prompt) + rest for prompt, rest in pairs],
            }

        # Not from the cache of an earlier run, as in text_classification.tokenize.
        return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)

    def _texts(
        self, batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[list[int], list[int]]]:
        assert self.text_column is not None
        ids = tokenizer(as_text(batch, self.text_column))["input_ids"]
        return [([], _close(row, tokenizer)[: self.max_length]) for row in ids]

    def _prompts(
        self, batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[list[int], list[int]]]:
        # Apart, not as one string: a token that spans the border would put prompt into the loss, and at
        # inference the prompt ends at the border too.
        assert self.prompt_column is not None and self.completion_column is not None
        prompts = tokenizer([text + self.prompt_separator for text in as_text(batch, self.prompt_column)])["input_ids"]
        rests = tokenizer(as_text(batch, self.completion_column), add_special_tokens=False)["input_ids"]
        pairs = []
        for prompt, rest in zip(prompts, rests, strict=True):
            if prompt and prompt[-1] == tokenizer.eos_token_id:
                prompt = prompt[:-1]  # some tokenizers close every text; the row goes on here
            rest = _close(rest, tokenizer)[: self.max_length - 1]
            pairs.append((prompt[-(self.max_length - len(rest)) :], rest))
        return pairs

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads ids, and labels with -100.

        Not DataCollatorForLanguageModeling: it takes the loss off every padding *token*, which is the
        end-of-text token where that one pads, and the model would never learn to stop.
        """
        from transformers import DataCollatorForSeq2Seq

        if self.pad_to_max_length:
            return DataCollatorForSeq2Seq(
                tokenizer, padding="max_length", max_length=self.max_length, label_pad_token_id=IGNORED
            )
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Each token's loss and whether it was guessed: (batch, tokens − 1, 2), not the vocabulary.

        Where there is no label both are -100, which is also what Trainer pads with.
        """
        logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
        targets = labels[:, 1:]
        known = targets != IGNORED
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        hits = (logits.argmax(dim=-1) == targets).float()
        return torch.stack([losses, hits], dim=-1).masked_fill(~known.unsqueeze(-1), float(IGNORED))

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Perplexity and accuracy over tokens (Trainer's own eval_loss is a mean over batches)."""
        values: Any = prediction.predictions
        losses, hits = values[..., 0], values[..., 1]
        known = losses != IGNORED
        loss = float(losses[known].mean()) if known.any() else 0.0
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": float(hits[known].mean()) if known.any() else 0.0,
        }


def _close(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
