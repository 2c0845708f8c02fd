"""A tiny sentence-transformers model with an adapter, and pairs of texts."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from text_cases import WORDS, save_bert

LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
SUBJECTS, VERBS = WORDS[:4], WORDS[12:16]


def save_encoder(folder: Path) -> str:
    """A BERT without a head, of four blocks, with its tokenizer."""
    name = save_bert(folder, layers=4)
    AutoModel.from_pretrained(name).save_pretrained(name)
    return name


def encoder(folder: Path) -> SentenceTransformer:
    model = SentenceTransformer(save_encoder(folder), device="cpu")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", **LORA))
    return model


def pairs(label: bool = False) -> Dataset:
    """16 pairs of texts of several lengths, each text in two rows."""
    rows = [(f"a {s} {v}", f"the {s} it {v} was") for s in SUBJECTS for v in VERBS]
    rows = [row for row in rows for _ in range(2)]
    columns = {"anchor": [a for a, _ in rows], "positive": [b for _, b in rows]}
    return Dataset.from_dict(columns | ({"label": [float(i % 4 > 1) for i in range(32)]} if label else {}))
