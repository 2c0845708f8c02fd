"""Models with an unusual shape: own modules around an encoder, other libraries' trainers, variants."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .build import build, names_of
from .case import BOS, EOS, PAD, ROWS, VOCABULARY, WIDTH, Case, Family, Row
from .rows import LENGTHS, Draw
from .training import BATCH, EPOCHS, RATE, arguments, recording

BLOCKS = 6


class Classifier(nn.Module):
    """torch's encoder with a loss, batch first or second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids if self.batch_first else input_ids.T)
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        logits = self.out(hidden[:, 0] if self.batch_first else hidden[0])
        return {"logits": logits} if labels is None else _with_loss(logits, labels)


class TwoCalls(nn.Module):
    """A bi-encoder: anchors, then positives through the same encoder; in-batch loss."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positive_ids: Tensor, positive_mask: Tensor
    ) -> dict[str, Tensor]:
        first = _mean(self.encoder(input_ids=input_ids, attention_mask=attention_mask), attention_mask)
        second = _mean(self.encoder(input_ids=positive_ids, attention_mask=positive_mask), positive_mask)
        return _in_batch(first, second)


class Pairs(nn.Module):
    """SimCSE's shape: (batch, 2, length), flattened inside."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        flat, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        vectors = self.encoder(input_ids=flat, attention_mask=mask).last_hidden_state[:, 0]
        return _in_batch(*vectors.unflatten(0, input_ids.shape[:2]).unbind(1))


class Pictures(nn.Module):
    """timm's ViT with a loss."""

    def __init__(self) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.vit = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=WIDTH, depth=BLOCKS, num_heads=4, num_classes=2
        )

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return _with_loss(self.vit(pixel_values), labels)


def _with_loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _mean(output: Any, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    return (output.last_hidden_state * weights).sum(1) / weights.sum(1)


def _in_batch(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """In-batch contrastive loss, temperature 0.05."""
    first, second = nn.functional.normalize(first, dim=-1), nn.functional.normalize(second, dim=-1)
    return _with_loss(first @ second.T / 0.05, torch.arange(len(first), device=first.device))


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4,
        intermediate_size=2 * WIDTH, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False)


def _texts(*names: tuple[str, str], label: bool = False) -> list[Row]:
    draw, rows = Draw(), []
    for index, length in enumerate(LENGTHS):
        row: Row = {}
        for ids, mask in names:
            row[ids] = draw.words(length)
            row[mask] = torch.ones_like(row[ids])
        rows.append(row | ({"labels": torch.tensor(index % 2)} if label else {}))
    return rows


def _torch_encoder(batch_first: bool) -> Case:
    torch.manual_seed(0)
    rows = _texts(("input_ids", "attention_mask"), label=True)
    return Case(Classifier(batch_first), rows, targets=["linear1", "linear2"])


def _two_calls() -> Case:
    names = ("input_ids", "attention_mask"), ("positive_ids", "positive_mask")
    return Case(TwoCalls(_bert()), _texts(*names))


def _simcse() -> Case:
    rows = _texts(("input_ids", "attention_mask"))
    return Case(Pairs(_bert()), [{name: torch.stack([value, value]) for name, value in row.items()} for row in rows])


def _timm() -> Case:
    draw = Draw()
    torch.manual_seed(0)
    rows = [{"pixel_values": draw.normal(3, 32, 32), "labels": torch.tensor(index % 2)} for index in range(ROWS)]
    return Case(Pictures(), rows)


# sentence-transformers and SetFit

_WORDS = [f"w{number}" for number in range(40)]


@functools.cache
def _folder(head: str) -> str:
    """A saved tiny BERT with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *_WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip
    folder = tempfile.mkdtemp(prefix="families-bert-")
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(special) + len(_WORDS), hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4,
        intermediate_size=2 * WIDTH, max_position_embeddings=64, initializer_range=0.2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, head)(config).save_pretrained(folder)
    return folder


def _sentences(*columns: str, label: bool = False) -> Any:
    import datasets

    draw = Draw()
    rows = {
        name: [" ".join(_WORDS[draw.integer(40)] for _ in range(4 + (index + place) % 4)) for index in range(ROWS)]
        for place, name in enumerate(columns)
    }
    return datasets.Dataset.from_dict(rows | ({"label": [index % 2 for index in range(ROWS)]} if label else {}))


def _lora(model: Any) -> Any:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["query", "key", "value"]))
    return model


def _bi_encoder(cached: bool) -> Case:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    def trainer(model: Any, callbacks: list[Any], steps: list[float]) -> Any:
        kind, more = (losses.CachedMultipleNegativesRankingLoss, {"mini_batch_size": 2}) if cached else (
            losses.MultipleNegativesRankingLoss, {},
        )  # fmt: skip
        return recording(SentenceTransformerTrainer, steps)(
            model=model,
            args=arguments(SentenceTransformerTrainingArguments),
            train_dataset=_sentences("anchor", "positive"),
            loss=kind(model, **more),
            callbacks=callbacks,
        )

    return Case(SentenceTransformer(_folder("BertModel"), device="cpu"), [], adapt=_lora, trainer=trainer)


def _cross_encoder() -> Case:
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )

    def trainer(model: Any, callbacks: list[Any], steps: list[float]) -> Any:
        return recording(CrossEncoderTrainer, steps)(
            model=model,
            args=arguments(CrossEncoderTrainingArguments),
            train_dataset=_sentences("query", "passage", label=True),
            loss=losses.BinaryCrossEntropyLoss(model),
            callbacks=callbacks,
        )

    def adapt(model: Any) -> Any:
        return _lora(model) if hasattr(model, "add_adapter") else _lora(model.model) and model

    model = CrossEncoder(_folder("BertForSequenceClassification"), device="cpu", num_labels=1)
    return Case(model, [], adapt=adapt, trainer=trainer)


def _setfit() -> Case:
    import setfit

    def trainer(model: Any, callbacks: list[Any], steps: list[float]) -> Any:
        settings = setfit.TrainingArguments(
            tempfile.gettempdir(), batch_size=BATCH, num_epochs=(EPOCHS, 1), body_learning_rate=RATE, seed=0,
            max_steps=9, report_to="none", save_strategy="no", logging_strategy="no", use_amp=False,
            show_progress_bar=False,
        )  # fmt: skip
        data = _sentences("text", label=True)
        whole = setfit.Trainer(model=model, args=settings, train_dataset=data, callbacks=callbacks)
        inner = whole.st_trainer
        compute = inner.compute_loss

        def written(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            steps.append(float(result[0] if isinstance(result, tuple) else result))
            return result

        inner.compute_loss = written
        whole.state = inner.state
        return whole

    def adapt(model: Any) -> Any:
        _lora(model.model_body)
        return model

    model = setfit.SetFitModel.from_pretrained(_folder("BertModel"), device="cpu")
    return Case(model, [], adapt=adapt, trainer=trainer)


# Variants of transformers' own families


def _with_layer_drop() -> Case:
    return build("wav2vec2", "CTC", "Wav2Vec2ForCTC", {"layerdrop": 0.3})


def _language_model_only(kind: str) -> Case:
    """LoRA in the language model only, as in most recipes."""
    case = build(kind, "image-text-to-text", names_of("image-text-to-text")[kind])
    case.targets = r".*(language_model|text_model|text_encoder)\..*\.(q_proj|k_proj|v_proj)"
    return case


def _mixed(kind: str) -> Case:
    """Every third row is text only, including the first."""
    case = build(kind, "image-text-to-text", names_of("image-text-to-text")[kind])
    token = case.model.config.image_token_id
    rows = []
    for index, row in enumerate(case.rows):
        if index % 3:
            rows.append(row)
            continue
        words = row["input_ids"] != token
        text = {name: value[words] for name, value in row.items() if name not in case.together}
        empty = {name: row[name][:0] for name in case.together}
        rows.append(text | empty)
    case.rows = rows
    return case


def _luke(head: str) -> Case:
    """Words and entities: blocks pass on two streams."""
    config = transformers.LukeConfig(
        vocab_size=VOCABULARY, entity_vocab_size=8, hidden_size=WIDTH, entity_emb_size=WIDTH, num_hidden_layers=BLOCKS,
        num_attention_heads=4, intermediate_size=2 * WIDTH, num_labels=2, max_position_embeddings=64, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, head)(config)
    count = 1 if head == "LukeForEntityClassification" else 2
    rows = _texts(("input_ids", "attention_mask"))
    for index, row in enumerate(rows):
        row["entity_ids"] = torch.tensor([1, 2][:count])
        row["entity_attention_mask"] = torch.ones(count, dtype=torch.long)
        row["entity_position_ids"] = torch.tensor([[1, 2, -1], [3, 4, -1]][:count])
        row["labels"] = torch.tensor(index % 2)
    return Case(model, rows)


def of_own_shape() -> Iterator[Family]:
    """All models with an unusual shape."""
    yield Family("nn.TransformerEncoder, batch first", "own module", lambda: _torch_encoder(True))
    yield Family("nn.TransformerEncoder, sequence first", "own module", lambda: _torch_encoder(False))
    yield Family("bi-encoder, two calls", "own module", _two_calls)
    yield Family("SimCSE's shape", "own module", _simcse)
    yield Family("timm ViT", "own module", _timm, needs="timm")
    yield Family(
        "sentence-transformers", "multiple negatives", lambda: _bi_encoder(False), needs="sentence_transformers"
    )
    yield Family(
        "sentence-transformers", "cached multiple negatives", lambda: _bi_encoder(True), needs="sentence_transformers"
    )
    yield Family("sentence-transformers", "cross-encoder", _cross_encoder, needs="sentence_transformers")
    yield Family("SetFit", "contrastive", _setfit, needs="setfit")
    yield Family("wav2vec2, layer drop 0.3", "CTC", _with_layer_drop)
    for kind in ("llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3", "gemma4"):
        yield Family(
            f"{kind}, LoRA in the language model", "image-text-to-text", functools.partial(_language_model_only, kind)
        )
    for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        yield Family(f"{kind}, rows with and without pictures", "image-text-to-text", functools.partial(_mixed, kind))
    for head in ("LukeForEntityPairClassification", "LukeForEntityClassification"):
        yield Family("luke", head, functools.partial(_luke, head))
