"""Text generation: write a completion for a prompt, and score what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import ConfigError
from ._text import as_text
from .causal_lm import CausalLM

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .pretrained import Source

__all__ = ["TextGeneration", "text_scores"]


@dataclass
class TextGeneration(CausalLM):
    """Write a completion for a prompt.

    Trains as ``CausalLM`` does on prompt and completion. Evaluation adds the ``text_scores`` of what the model writes
    for each distinct prompt; the completions of all rows with this prompt are its references.

    Args:
        generation_num_beams: width of the beam search; 1: greedy.
    """

    generation_max_new_tokens: int = 64
    generation_num_beams: int = 1
    text_column: Sequence[str] = field(default=(), init=False)
    messages_column: None = field(default=None, init=False)
    block_size: None = field(default=None, init=False)
    references: dict[str, list[str]] = field(default_factory=dict, init=False)
    tokenizer: Any = field(default=None, init=False)

    name: ClassVar[str] = "text-generation"

    def __post_init__(self) -> None:
        if not (self.prompt_column and self.completion_column):
            raise ConfigError(
                f"--task {self.name} needs both --prompt_column and --completion_column.",
                fix="--prompt_column mr --completion_column ref",
            )
        for flag in ("generation_max_new_tokens", "generation_num_beams"):
            if getattr(self, flag) < 1:
                raise ConfigError(f"--{flag} is {getattr(self, flag)}; it must be at least 1.", fix=f"--{flag} 1")
        super().__post_init__()

    def load_model(self, source: Source) -> PreTrainedModel:
        """Load the model with its own language-model head.

        Raises:
            ConfigError: it has too few positions for prompt and completion.
        """
        model = super().load_model(source)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and positions <= self.generation_max_new_tokens:
            raise ConfigError(
                f"--generation_max_new_tokens is {self.generation_max_new_tokens}, but the model has {positions} "
                "positions for prompt and completion.",
                fix=f"--generation_max_new_tokens {positions // 2}",
            )
        return model

    def prepare_evaluation(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """As ``prepare``; also collects the references of each prompt."""
        _scorers()  # a missing package fails here, before the training
        prompts, texts = as_text(rows, str(self.prompt_column)), as_text(rows, str(self.completion_column))
        self.references, self.tokenizer = {}, tokenizer
        for prompt, text in zip(prompts, texts, strict=True):
            self.references.setdefault(prompt, []).append(text)
        return self.prepare(rows, tokenizer)

    def score(self, model: Any, batch_size: int) -> dict[str, float]:
        """The ``text_scores`` of what the model writes for the prompts of the evaluation."""
        return text_scores(self.write(model, list(self.references), batch_size), list(self.references.values()))

    def write(self, model: Any, prompts: list[str], batch_size: int) -> list[str]:
        """A completion for each prompt; every process writes all of them.

        Prompts are batched by length and padded on the left; one that is too long loses its beginning.
        """
        from transformers import GenerationConfig

        new, tokenizer = self.generation_max_new_tokens, self.tokenizer
        positions = getattr(model.config, "max_position_embeddings", None) or self.max_length + new
        room = min(self.max_length, positions - new)
        rows = [ids[-room:] for ids in self.prompt_ids(prompts, tokenizer)]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        config = GenerationConfig(
            max_new_tokens=new,
            num_beams=self.generation_num_beams,
            do_sample=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = [""] * len(rows)
        training = model.training
        model.eval()
        try:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                width = len(rows[batch[0]])
                ids = [[config.pad_token_id] * (width - len(rows[i])) + rows[i] for i in batch]
                mask = [[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in batch]
                written = model.generate(
                    input_ids=torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    generation_config=config,
                    use_cache=True,
                )
                decoded = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
                for index, text in zip(batch, decoded, strict=True):
                    texts[index] = text.strip()
        finally:
            model.train(training)
        return texts


def text_scores(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L, 0 to 100, of each text against its references.

    ``bleu`` is sacrebleu's corpus BLEU. ``rougeL`` is rouge-score's with Porter's stemmer, as in transformers'
    run_summarization: the mean over the texts of the F-measure of the best reference.

    Raises:
        ConfigError: sacrebleu or rouge-score is not installed.
    """
    corpus_bleu, scorer = _scorers()
    # sacrebleu takes one list per reference, with None where a text has fewer.
    columns = [[group[n] if n < len(group) else None for group in references] for n in range(max(map(len, references)))]
    best = [scorer.score_multi(group, text)["rougeL"].fmeasure for text, group in zip(texts, references, strict=True)]
    return {"bleu": float(corpus_bleu(texts, columns).score), "rougeL": 100 * sum(best) / len(best)}


def _scorers() -> tuple[Any, Any]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ConfigError(
            f"The package {(error.name or '').split('.')[0].replace('_', '-')}, which scores generated text, is not "
            "installed.",
            fix='pip install "adafreeze[generation]"',
        ) from error
    return corpus_bleu, RougeScorer(["rougeL"], use_stemmer=True)
