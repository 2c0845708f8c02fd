"""Causal language modelling: plain text, or instruction tuning on prompts and completions or on conversations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import DataError, ModelError
from ._text import as_text, faults_of_text, guess_columns
from .pretrained import Source, load_model
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from .data import Split

__all__ = ["CausalLM"]

IGNORED = -100  # the label that every loss of transformers leaves out
Row = tuple[list[int], list[int]]  # token ids and labels


@dataclass
class CausalLM(Task):
    """Predict the next token.

    One row of the data is one sequence, unless ``group_texts`` is set. With ``prompt_column`` and
    ``completion_column`` the loss is on the completion alone, with ``messages_column`` on what the assistant
    says. The end-of-text token closes every text and completion and is learnt. Metrics are ``perplexity`` =
    exp(mean loss of a token) and ``token_accuracy``, both over the tokens that have a loss.

    Args:
        text_column: the column of plain text; None: the usual names are looked for.
        prompt_column: what is given (with ``completion_column``, instead of ``text_column``).
        completion_column: what is to be learnt.
        messages_column: conversations instead: lists of ``{"role": ..., "content": ...}``, which the
            tokenizer's chat template writes out.
        prompt_separator: stands between prompt and completion, and counts as prompt.
        max_length: tokens of a row, at most. Longer texts are cut at the end; a prompt or a conversation
            loses its beginning first.
        group_texts: join all texts and cut them into rows of ``max_length`` tokens, as transformers' run_clm
            does; what is left at the end is dropped. They are the same rows in every epoch, so the prefix
            cache finds them.
        pad_to_max_length: pad every row to ``max_length`` (default: to the longest of its batch).
    """

    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    prompt_separator: str = "\n"
    max_length: int = 512
    group_texts: bool = False
    pad_to_max_length: bool = False

    name: ClassVar[str] = "causal-lm"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"

    def columns(self, found: list[str]) -> dict[str, list[str]]:
        """The text column, or prompt and completion, or the conversations."""
        if self.messages_column:
            return {"--messages_column": [self.messages_column]}
        if self.prompt_column and self.completion_column:
            return {"--prompt_column": [self.prompt_column], "--completion_column": [self.completion_column]}
        self.text_column = self.text_column or guess_columns(found)[0]
        return {"--text_column": [self.text_column]}

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text, and conversations without an answer."""
        if self.messages_column:
            found = {index: _fault(value) for index, value in enumerate(split.rows[self.messages_column])}
            return {index: f"{fault} in column {self.messages_column!r}" for index, fault in found.items() if fault}
        columns = (self.prompt_column, self.completion_column) if self.prompt_column else (self.text_column,)
        faults = faults_of_text(split, tuple(name for name in columns if name))
        if self.group_texts and faults:  # an empty line is a line of the whole text
            values = split.rows[self.text_column]
            faults = {index: fault for index, fault in faults.items() if not isinstance(values[index], str)}
        return faults

    def load_model(self, source: Source) -> PreTrainedModel:
        """The model with its own language-model head.

        Raises:
            ModelError: its attention sees the words that come next, which it is to predict (BERT, RoBERTa, ...).
        """
        from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM

        model = load_model(AutoModelForCausalLM, source)
        config = model.config
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (config.is_decoder or getattr(config, "causal", False)):
            raise ModelError(
                f"{type(model).__name__} of {source.name} reads in both directions.",
                cause="It sees the words that it is to predict: is_decoder is false in its configuration.",
                fix="A causal model such as GPT-2 or Llama; or --task text-classification, question-answering, ...",
            )
        return model

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and labels: the same ids, -100 where no loss is wanted.

        Raises:
            DataError: all texts together do not fill one row of ``group_texts``.
            ModelError: there are conversations, and the tokenizer has no chat template, or one that writes a
                turn otherwise once others follow.
        """
        from datasets import Features, Sequence, Value

        left: list[int] = []  # with group_texts: the tokens that fill no row yet
        read = self._chats if self.messages_column else self._prompts if self.prompt_column else self._texts

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pairs = self._blocks(batch, tokenizer, left) if self.group_texts else read(batch, tokenizer)
            return {
                "input_ids": [ids for ids, _ in pairs],
                "attention_mask": [[1] * len(ids) for ids, _ in pairs],
                "labels": [labels for _, labels in pairs],
            }

        kinds = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
        made = rows.map(
            encode,
            batched=True,
            remove_columns=rows.column_names,
            # Said, not read off the first batch, of which group_texts may make no row.
            features=Features({name: Sequence(Value(kind)) for name, kind in kinds.items()}),
            load_from_cache_file=False,  # as in text_classification.tokenize
        )
        if len(made) == 0:
            raise DataError(
                f"The texts have {len(left)} tokens in all, too few for one block of {self.max_length}.",
                cause="They are joined and cut into blocks of that size, and what is left over is dropped.",
                fix=f"--block_size {max(2, len(left) // 2)}",
            )
        return made

    def _texts(self, batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        assert self.text_column is not None
        rows = [_close(ids, tokenizer)[: self.max_length] for ids in _ids(as_text(batch, self.text_column), tokenizer)]
        return [(ids, ids) for ids in rows]

    def _blocks(self, batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, left: list[int]) -> list[Row]:
        assert self.text_column is not None
        for ids in _ids(as_text(batch, self.text_column), tokenizer):
            left += ids
        whole = len(left) - len(left) % self.max_length
        rows = [left[start : start + self.max_length] for start in range(0, whole, self.max_length)]
        del left[:whole]
        return [(ids, ids) for ids in rows]

    def _prompts(self, batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        # Apart, not as one string: a token that spans the border would put prompt into the loss, and at
        # inference the prompt ends at the border too.
        assert self.prompt_column is not None and self.completion_column is not None
        prompts = self.prompt_ids(as_text(batch, self.prompt_column), tokenizer)
        rests = _ids(as_text(batch, self.completion_column), tokenizer, add_special_tokens=False)
        rows = []
        for prompt, rest in zip(prompts, rests, strict=True):
            rest = _close(rest, tokenizer)[: self.max_length - 1]
            prompt = prompt[-(self.max_length - len(rest)) :]
            rows.append((prompt + rest, [IGNORED] * len(prompt) + rest))
        return rows

    def prompt_ids(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of prompts, with the separator behind them."""
        rows = _ids([prompt + self.prompt_separator for prompt in prompts], tokenizer)
        # Some tokenizers close every text; the row goes on here.
        return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in rows]

    def _chats(self, batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        assert self.messages_column is not None
        rows = []
        for messages in batch[self.messages_column]:
            ids: list[int] = []
            labels: list[int] = []
            for text, learnt in turns(messages, tokenizer):  # apart, as prompt and completion are
                piece = _ids([text], tokenizer, add_special_tokens=False)[0]
                ids += piece
                labels += piece if learnt else [IGNORED] * len(piece)
            rows.append((ids[-self.max_length :], labels[-self.max_length :]))
        return rows

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


def turns(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A conversation as the chat template writes it, in pieces: (text, whether the assistant says it).

    What the assistant says is what a turn adds to the template's prompt for that turn, the mark of its end
    included. What follows the last answer is left out.

    Raises:
        ModelError: see ``CausalLM.prepare``.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            "The tokenizer has no chat template.",
            cause="--messages_column needs one to write conversations as text; models tuned for chat bring one.",
            fix="--tokenizer_name of such a model with the same vocabulary, or --prompt_column and --completion_column",
        )
    # A column of a table gives every message all the fields that any message has.
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index in (index for index, message in enumerate(given) if message["role"] == "assistant"):
        for count, learnt in ((index, False), (index + 1, True)):
            text = str(tokenizer.apply_chat_template(given[:count], tokenize=False, add_generation_prompt=not learnt))
            if not text.startswith(done):
                raise ModelError(
                    "The chat template writes a turn otherwise once others follow it.",
                    cause="What the assistant says can then not be told from the rest (thinking that is dropped "
                    f"from earlier turns, for example); it happened at message {index + 1} of a conversation.",
                    fix="Keep one answer a conversation, or use --prompt_column and --completion_column.",
                )
            pieces.append((text[len(done) :], learnt))
            done = text
    return pieces


def _fault(messages: Any) -> str | None:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        return "no list of messages with role and content"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return "no message of the assistant"
    return "a conversation that the assistant begins" if roles[0] == "assistant" else None


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[list[int]]:
    return tokenizer(texts, **options)["input_ids"]


def _close(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
