"""Tiny text models and tokenizers, saved as folders, and rows to train them on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from adafreeze.tasks.glue import GLUE

WORDS = ["good", "bad", "film", "book", "very", "not", "a", "the", "was", "is", "it", "i"]
WORDS += ["liked", "hated", "plot", "actor", "ask", "say", "hello", "bye"]


def _tokenizer(specials: list[str], single: str, pair: str, **names: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, vocabulary[name]) for name in specials[1:]]
    )
    names = {"unk_token": specials[0], **names}
    if "cls_token" in names:
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(
        ["[UNK]", "[CLS]", "[SEP]", "[PAD]"],
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
    )


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Starts every text with <s>; has no padding token."""
    return _tokenizer(["<unk>", "<s>", "</s>"], "<s> $A", "<s> $A <s> $B", bos_token="<s>", eos_token="</s>")


def save_bert(folder: Path, layers: int = 2) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(bert_tokenizer()),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return str(folder)


def save_llama(folder: Path, layers: int = 2) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(llama_tokenizer()),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return str(folder)


def reviews(count: int = 8) -> list[dict]:
    texts = [
        ("the film was good", "pos"),
        ("a bad plot", "neg"),
        ("i liked it", "pos"),
        ("i hated the book", "neg"),
    ]
    return [
        {
            "text": texts[i % 4][0],
            "reply": "very " * (i % 3) + "good",
            "label": texts[i % 4][1],
            "id": i % 2,
            "stars": 1.5 * (i % 4),
            "prompt": "say hello" if i % 2 else "ask",
            "completion": "hello" if i % 2 else "is it good",
        }
        for i in range(count)
    ]


def glue_rows(name: str, count: int = 8, as_text: bool = False) -> list[dict]:
    """Rows of a task of GLUE; labels by number, or by their official names."""
    columns, classes = GLUE[name].columns, GLUE[name].classes
    rows = []
    for i, row in enumerate(reviews(count)):
        label = i % len(classes) if classes else row["stars"]
        rows.append(
            dict(zip(columns, (row["text"], row["reply"]), strict=False))
            | {"label": classes[label] if as_text and classes else label}
        )
    return rows


def questions(count: int = 8, unanswerable: bool = False) -> list[dict]:
    """Rows of question answering; with ``unanswerable`` every fourth has no answer."""
    cases = [
        ("was the film good", "i liked it very. the film was good, not bad.", "good"),
        ("was the book good", "the book was very bad. i hated the plot.", "very bad"),
        ("was it the actor", "it was the plot.", "the plot"),
        ("say hello", "hello, hello, bye. i say bye.", "bye"),
    ]
    rows = []
    for i in range(count):
        question, context, answer = cases[i % 4]
        known = not (unanswerable and i % 4 == 3)
        answers = {"text": [answer], "answer_start": [context.index(answer)]} if known else {}
        row = {"id": f"q{i}", "question": question, "context": context}
        rows.append(row | {"answers": answers or {"text": [], "answer_start": []}})
    return rows


def nested(rows: list[dict]) -> dict:
    """Rows of question answering in SQuAD's own format."""
    paragraphs = []
    for row in rows:
        answers = [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)]
        question = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": row["context"], "qas": [question]})
    return {"version": "v2.0", "data": [{"title": "all", "paragraphs": paragraphs}]}


def write(path: Path, rows: list[dict]) -> str:
    """Write rows in the format of the extension."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)
