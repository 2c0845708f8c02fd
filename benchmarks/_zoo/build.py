"""Builds the models of transformers' architectures, and chooses the adapters' targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .case import Case, Family, NotRunnable, collate, first_line
from .configs import config_of
from .rows import candidates

MOST_PARAMETERS = 20_000_000

# Heads in table order, with the name of transformers' list of architectures.
HEADS_OF: dict[str, str] = {
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "causal LM": "CAUSAL_LM",
    "masked LM": "MASKED_LM",
    "seq2seq LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "multiple choice": "MULTIPLE_CHOICE",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
    "image classification": "IMAGE_CLASSIFICATION",
    "masked image modeling": "MASKED_IMAGE_MODELING",
    "semantic segmentation": "SEMANTIC_SEGMENTATION",
    "video classification": "VIDEO_CLASSIFICATION",
    "audio classification": "AUDIO_CLASSIFICATION",
    "CTC": "CTC",
    "speech seq2seq": "SPEECH_SEQ_2_SEQ",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "image-text contrastive": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "time series prediction": "TIME_SERIES_PREDICTION",
}
# An architecture gets a row for these heads only if it has no other head.
IF_NO_OTHER = ("token classification", "question answering")


def names_of(head: str) -> dict[str, str]:
    """Model type → class name, from the library's mapping."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{HEADS_OF[head]}_MAPPING_NAMES")
    return {kind: name if isinstance(name, str) else name[0] for kind, name in mapping.items()}


def of_transformers() -> Iterator[Family]:
    """One family for each architecture and head in the library's mappings."""
    seen: set[str] = set()
    for head in HEADS_OF:
        for kind, class_name in sorted(names_of(head).items()):
            if head in IF_NO_OTHER and kind in seen:
                continue
            seen.add(kind)
            yield Family(kind, head, lambda kind=kind, head=head, name=class_name: build(kind, head, name))


def build(kind: str, head: str, class_name: str, forced: Mapping[str, Any] | None = None) -> Case:
    """A tiny model of an architecture with this head, and rows that it accepts.

    Raises:
        NotRunnable: the library cannot build it tiny, or no known input gives a loss.
    """
    try:
        model_class = getattr(transformers, class_name)
        config = config_of(kind, head, model_class.config_class or CONFIG_MAPPING[kind], forced)
        torch.manual_seed(0)
        model = model_class(config)
    except Exception as error:
        raise NotRunnable(f"cannot be built tiny: {first_line(error)}") from error
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise NotRunnable(f"cannot be built tiny: {count / 1e6:.0f} M parameters remain")
    failures: list[str] = []
    tried = candidates(model, head)
    while True:
        try:
            rows, together = next(tried)
            loss = loss_of(model, collate(rows[:2], together))
        except StopIteration:
            break
        except Exception as error:
            failures.append(first_line(error))
            continue
        if loss is not None and loss.requires_grad:
            return Case(model, rows, together)
        failures.append("returns no loss")
    failures = list(dict.fromkeys(failures))
    raise NotRunnable(" / ".join(failures[:3]) or f"no inputs are known for {head}")


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The loss that the model returns."""
    model.train()
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None


# Names of attention's linear layers in all families.
_ATTENTION = (
    *(
        "q_proj",
        "v_proj",
        "k_proj",
        "query",
        "value",
        "key",
        "q",
        "v",
        "q_lin",
        "v_lin",
        "query_key_value",
        "qkv",
        "c_attn",
    ),
    *(
        "qkv_proj",
        "Wqkv",
        "query_proj",
        "value_proj",
        "in_proj_linear",
        "to_q",
        "to_v",
        "c_q",
        "c_v",
        "q_a_proj",
        "q_b_proj",
    ),
    *(
        "kv_b_proj",
        "kv_a_proj_with_mqa",
        "att_proj",
        "linear_q",
        "linear_v",
        "Wq",
        "Wv",
        "query_proj",
        "W_pack",
        "wq",
        "wv",
    ),
    *(
        "q_head",
        "v_head",
        "in_proj_qkvz",
        "attn_qkv",
        "self_attn_q",
        "project_q",
        "query_layer",
        "fc_q",
        "project_value",
    ),
)


def lora_targets(model: nn.Module) -> list[str] | str:
    """Attention's linear layers, or all linear layers of a block if it has none with a known name."""
    from transformers.pytorch_utils import Conv1D

    of_blocks: dict[str, set[str]] = {}
    linear: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = re.match(r"(.*?\.\d+)\.", name)
        if inside and isinstance(module, (nn.Linear, Conv1D)):
            linear[name] = name.rsplit(".", 1)[-1]
            of_blocks.setdefault(inside[1], set()).add(linear[name])
    found: set[str] = set()
    for names in of_blocks.values():
        found |= names & set(_ATTENTION) or names - {"out_proj"}  # PEFT refuses Mamba's
    others = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name not in linear}
    if found & others:  # PEFT may not support other modules with such a name
        return [name for name, last in linear.items() if last in found]
    return sorted(found) or "all-linear"


def head_names(model: nn.Module) -> list[str]:
    """Names of the new classifier, which is trained with the adapters."""
    new = ("classifier", "score", "classification_head", "qa_outputs", "pre_classifier", "seq_relationship", "cls_head")
    return [name for name, _ in model.named_children() if name in new]
