"""Causal language modelling: plain text, or instruction tuning on prompts and completions or on conversations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import ConfigError, DataError, ModelError
from ._text import as_text, faults_of_text, guess_columns
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

    from .data import Split
    from .pretrained import Source

__all__ = ["CausalLM", "turns"]

IGNORED = -100  # the label without a loss in transformers
Row = tuple[list[int], list[int]]  # token ids and labels


@dataclass
class CausalLM(Task):
    """Predict the next token.

    Each row is one sequence, unless ``block_size`` is set. The loss is on the whole text, on the completion, or on the
    assistant's turns. The end-of-text token is appended to each text and completion, and has a loss. Metrics are
    ``perplexity`` = exp(mean loss per token) and ``token_accuracy``, both over the tokens with a loss.

    Args:
        text_column: one column of plain text; empty: the first of the usual names that exists.
        prompt_column: with ``completion_column``, instead of ``text_column``.
        messages_column: instead: conversations, lists of ``{"role": ..., "content": ...}``.
        prompt_separator: text between prompt and completion, part of the prompt.
        max_length: maximum tokens per row (0: ``block_size``, or 512). Texts are cut at the end, prompts and
            conversations at the beginning.
        block_size: join all texts and cut them into rows of this many tokens, as run_clm does; drops the rest. The
            rows are the same in every epoch, so the prefix cache finds them.
        pad_to_max_length: pad to ``max_length``, not to the longest row of the batch.

    Raises:
        ConfigError: the columns or ``block_size`` contradict each other.
    """

    text_column: Sequence[str] = ()
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    prompt_separator: str = "\n"
    max_length: int = 0
    block_size: int | None = None
    pad_to_max_length: bool = False

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"

    def __post_init__(self) -> None:
        prompts = [name for name in (self.prompt_column, self.completion_column) if name]
        kinds = bool(self.text_column) + bool(prompts) + bool(self.messages_column)
        if len(self.text_column) > 1 or len(prompts) == 1 or kinds > 1:
            raise ConfigError(
                f"--task {self.name} reads one --text_column, or both --prompt_column and --completion_column, or "
                "--messages_column.",
                fix="--prompt_column prompt --completion_column completion",
            )
        if self.block_size is not None and (prompts or self.messages_column or self.max_length):
            raise ConfigError(
                f"--block_size {self.block_size} cuts plain text into rows of that length, and does not go with "
                "prompts, conversations or --max_seq_length.",
                fix="--text_column text --block_size 512",
            )
        self.max_length = self.max_length or self.block_size or 512

    def columns(self, found: list[str]) -> Sequence[str]:
        """The text column, or prompt and completion, or the conversations."""
        if self.messages_column:
            return ["messages_column"]
        if self.prompt_column:
            return "prompt_column", "completion_column"
        self.text_column = self.text_column or guess_columns(found)[:1]
        return ["text_column"]

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without text, and conversations without an answer."""
        if self.messages_column:
            found = {index: _fault(value) for index, value in enumerate(split.rows[self.messages_column])}
            return {index: f"{fault} in column {self.messages_column!r}" for index, fault in found.items() if fault}
        prompts = [name for name in (self.prompt_column, self.completion_column) if name]
        faults = faults_of_text(split, prompts or self.text_column)
        if self.block_size is not None and faults:  # an empty line is a line of the whole text
            values = split.rows[self.text_column[0]]
            faults = {index: fault for index, fault in faults.items() if not isinstance(values[index], str)}
        return faults

    def load_model(self, source: Source) -> PreTrainedModel:
        """Load the model with its own language-model head.

        Raises:
            ModelError: its attention is bidirectional (BERT, RoBERTa, ...).
        """
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        model = super().load_model(source)
        config = model.config
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (config.is_decoder or getattr(config, "causal", False)):
            raise ModelError(
                f"{type(model).__name__} of {source.name} is bidirectional (is_decoder is false in its configuration): "
                "it sees the words it is trained to predict.",
                fix="Use a causal model such as GPT-2 or Llama, or --task text-classification, question-answering, ...",
            )
        return model

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and labels: the same ids, or -100 for tokens without a loss.

        Raises:
            DataError: all texts together are shorter than ``block_size``.
            ModelError: the tokenizer cannot write conversations, see ``turns``.
        """
        from datasets import Features, Sequence, Value

        left: list[int] = []  # tokens that do not fill a block yet
        template = _training_template(tokenizer) if self.messages_column else None

        def read(batch: dict[str, list[Any]]) -> list[Row]:
            if self.messages_column:
                return [self._chat(messages, tokenizer, template) for messages in batch[self.messages_column]]
            if self.prompt_column and self.completion_column:
                prompts, completions = as_text(batch, self.prompt_column), as_text(batch, self.completion_column)
                return self._prompts(prompts, completions, tokenizer)
            texts = as_text(batch, self.text_column[0])
            if self.block_size is not None:
                return self._blocks(texts, tokenizer, left)
            return [(ids, ids) for ids in (_close(ids, tokenizer)[: self.max_length] for ids in _ids(texts, tokenizer))]

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pairs = read(batch)
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
            # Not inferred from the first batch, which may be too short for a block.
            features=Features({name: Sequence(Value(kind)) for name, kind in kinds.items()}),
            load_from_cache_file=False,  # as in TextPair.prepare
        )
        if len(made) == 0:
            raise DataError(
                f"All texts together have {len(left)} tokens, fewer than one block of {self.max_length}.",
                fix=f"--block_size {max(2, len(left) // 2)}",
            )
        return made

    def _blocks(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, left: list[int]) -> list[Row]:
        # Not TRL's pack_dataset: it packs each batch of rows by itself, keeps short blocks, and is an extra.
        for ids in _ids(texts, tokenizer):
            left += ids
        whole = len(left) - len(left) % self.max_length
        rows = [left[start : start + self.max_length] for start in range(0, whole, self.max_length)]
        del left[:whole]
        return [(ids, ids) for ids in rows]

    def _prompts(self, prompts: list[str], completions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        # Tokenized separately, not as one string as TRL does: a token across the border would belong to both, and in
        # generation the prompt ends at the border too.
        rows = []
        rests = _ids(completions, tokenizer, add_special_tokens=False)
        for prompt, rest in zip(self.prompt_ids(prompts, tokenizer), rests, strict=True):
            rest = _close(rest, tokenizer)[: self.max_length - 1]
            prompt = prompt[-(self.max_length - len(rest)) :]
            rows.append((prompt + rest, [IGNORED] * len(prompt) + rest))
        return rows

    def prompt_ids(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of the prompts with the separator, without the end-of-text token that some tokenizers add."""
        rows = _ids([prompt + self.prompt_separator for prompt in prompts], tokenizer)
        return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in rows]

    def _chat(self, messages: Any, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Row:
        ids: list[int] = []
        labels: list[int] = []
        for text, learnt in turns(messages, tokenizer, template):  # tokenized separately, as prompt and completion are
            piece = _ids([text], tokenizer, add_special_tokens=False)[0]
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        return ids[-self.max_length :], labels[-self.max_length :]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads ids, and labels with -100.

        Not DataCollatorForLanguageModeling of transformers: it removes the loss of every padding *token*. If the
        end-of-text token pads, the model would never learn to stop.
        """
        from transformers import DataCollatorForSeq2Seq

        length: dict[str, Any] = {"padding": "max_length", "max_length": self.max_length}
        return DataCollatorForSeq2Seq(
            tokenizer, label_pad_token_id=IGNORED, **(length if self.pad_to_max_length else {})
        )

    def preprocess_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each token and whether it was predicted: (batch, tokens − 1, 2).

        Both are -100 where there is no label; Trainer pads with -100 too.
        """
        logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
        targets = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        hits = (logits.argmax(dim=-1) == targets).float()
        return torch.stack([losses, hits], dim=-1).masked_fill((targets == IGNORED).unsqueeze(-1), float(IGNORED))

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


def turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> list[tuple[str, bool]]:
    """A conversation as the chat template writes it, in pieces: (text, whether it is the assistant's).

    The assistant's text is what its turn adds to the template's generation prompt, including the end-of-turn mark.
    Messages after the last answer are left out. Not the assistant mask of transformers and TRL: it needs
    ``{% generation %}`` in the template, which Llama 3.1, Mistral, Gemma 4 and many others lack.

    Raises:
        ModelError: there is no chat template, or it changes a turn when others follow.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            "The tokenizer has no chat template, which --messages_column needs.",
            fix="--tokenizer_name of a chat model with the same vocabulary, or --prompt_column and --completion_column",
        )
    # A dataset column gives every message all fields that any message has.
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index in (index for index, message in enumerate(given) if message["role"] == "assistant"):
        for count, learnt in ((index, False), (index + 1, True)):
            text = str(
                tokenizer.apply_chat_template(
                    given[:count], chat_template=template, tokenize=False, add_generation_prompt=not learnt
                )
            )
            if not text.startswith(done):
                raise ModelError(
                    "The chat template changes a turn when others follow (for example, it drops earlier thinking), "
                    f"so the assistant's text is unknown at message {index + 1} of a conversation.",
                    fix='pip install "adafreeze[llm]", which has training templates for some models, or keep one '
                    "answer per conversation, or use --prompt_column and --completion_column.",
                )
            pieces.append((text[len(done) :], learnt))
            done = text
    return pieces


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's version of the tokenizer's chat template that does not change earlier turns (Qwen3, ...); None without.

    Of TRL 1.16's templates, those that ``turns`` accepts unchanged give the same text in both versions.
    """
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # TRL has no version of this template
        return None


def _fault(messages: Any) -> str | None:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        return "no list of messages with role and content"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return "no message of the assistant"
    return "a conversation that starts with the assistant" if roles[0] == "assistant" else None


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[list[int]]:
    return tokenizer(texts, **options)["input_ids"]


def _close(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
