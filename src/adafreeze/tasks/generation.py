"""Text generation: a completion for a prompt, judged on what the model writes by itself."""

from __future__ import annotations

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

    It trains as ``CausalLM`` does on prompt and completion. To the loss, ``perplexity`` and
    ``token_accuracy`` of an evaluation come the ``text_scores`` of what the model writes for each distinct
    prompt: completions of rows that share their prompt are its references.

    Args:
        max_new_tokens: of a completion, at most.
        num_beams: width of the beam search; 1: the likeliest token each time.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    references: dict[str, list[str]] = field(default_factory=dict, init=False)
    tokenizer: Any = field(default=None, init=False)

    name: ClassVar[str] = "text-generation"

    def load_model(self, source: Source) -> PreTrainedModel:
        """The model with its own language-model head.

        Raises:
            ConfigError: it reads fewer tokens than it is to write.
        """
        model = super().load_model(source)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and positions <= self.max_new_tokens:
            raise ConfigError(
                f"--generation_max_new_tokens is {self.max_new_tokens}, but the model has {positions} positions.",
                cause="Prompt and completion must fit into them together.",
                fix=f"--generation_max_new_tokens {positions // 2}",
            )
        return model

    def prepare_evaluation(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """As ``prepare``, and the references of each prompt are remembered."""
        _scorers()  # before the training, not after it
        assert self.prompt_column is not None and self.completion_column is not None
        self.references, self.tokenizer = {}, tokenizer
        for prompt, text in zip(as_text(rows, self.prompt_column), as_text(rows, self.completion_column), strict=True):
            self.references.setdefault(prompt, []).append(text)
        return self.prepare(rows, tokenizer)

    def score(self, model: Any, batch_size: int) -> dict[str, float]:
        """The ``text_scores`` of what the model writes for the prompts of the evaluation."""
        return text_scores(self.write(model, list(self.references), batch_size), list(self.references.values()))

    def write(self, model: Any, prompts: list[str], batch_size: int) -> list[str]:
        """A completion for each prompt. Of several processes each one writes all of them.

        Prompts of like length come together and are padded on the left; one that is too long loses its
        beginning.
        """
        from transformers import GenerationConfig

        positions = getattr(model.config, "max_position_embeddings", None) or self.max_length + self.max_new_tokens
        room = min(self.max_length, positions - self.max_new_tokens)
        rows = [ids[-room:] for ids in self.prompt_ids(prompts, self.tokenizer)]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            do_sample=False,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
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
                decoded = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
                for index, text in zip(batch, decoded, strict=True):
                    texts[index] = text.strip()
        finally:
            model.train(training)
        return texts


def text_scores(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L, 0 to 100, of one text against one or several references each.

    ``bleu`` is sacrebleu's corpus BLEU. ``rougeL`` is rouge-score's, as transformers' run_summarization takes
    it: with Porter's stemmer, the F-measure of the best reference, the mean over the texts.

    Raises:
        ConfigError: sacrebleu or rouge-score is not installed.
    """
    corpus_bleu, scorer = _scorers()
    most = max(map(len, references))
    # One list a reference, not a text; None where a text has fewer.
    columns = [[group[n] if n < len(group) else None for group in references] for n in range(most)]
    best = [scorer.score_multi(group, text)["rougeL"].fmeasure for text, group in zip(texts, references, strict=True)]
    return {"bleu": float(corpus_bleu(texts, columns).score), "rougeL": 100 * sum(best) / len(best)}


def _scorers() -> tuple[Any, Any]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ConfigError(
            f"The package {(error.name or '').split('.')[0].replace('_', '-')} is not installed.",
            cause="Generated text is judged with sacrebleu (BLEU) and rouge-score (ROUGE-L).",
            fix="pip install sacrebleu rouge-score",
        ) from error
    return corpus_bleu, RougeScorer(["rougeL"], use_stemmer=True)
