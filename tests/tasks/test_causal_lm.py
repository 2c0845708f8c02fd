from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction

from adafreeze.tasks import CausalLM, Source, load_tokenizer
from text_cases import llama_tokenizer, save_llama


@pytest.fixture
def tokenizer():
    tokenizer = llama_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as load_tokenizer does
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


INSTRUCT = {"prompt_column": "prompt", "completion_column": "completion"}


def test_the_loss_is_on_the_completion_and_its_end_alone(tokenizer):
    rows = Dataset.from_dict({"prompt": ["say hello", "ask"], "completion": ["hello", "is it good"]})
    task = CausalLM(**INSTRUCT)
    prepared = task.prepare(rows, tokenizer)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert prepared[0]["input_ids"] == [begin, *ids(tokenizer, "say hello hello"), end]
    assert prepared[0]["labels"] == [-100, -100, -100, *ids(tokenizer, "hello"), end]
    batch = task.collator(tokenizer)(list(prepared))
    # Padding is the end-of-text token: that of the row has a loss, that of the padding has none.
    assert batch["input_ids"][0, -1] == end and batch["labels"][0].tolist()[-2:] == [end, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0]


def test_the_prompts_words_do_not_reach_the_loss_but_the_completions_do(tokenizer, tmp_path):
    task = CausalLM(**INSTRUCT)
    model = task.load_model(Source(save_llama(tmp_path))).eval()
    rows = Dataset.from_dict({"prompt": ["say hello"], "completion": ["hello bye"]})
    batch = task.collator(tokenizer)(list(task.prepare(rows, tokenizer)))
    loss = model(**batch).loss
    by_hand = torch.nn.functional.cross_entropy(model(batch["input_ids"]).logits[0, 2:-1], batch["input_ids"][0, 3:])
    torch.testing.assert_close(loss, by_hand)


def test_plain_text_is_learnt_to_its_end(tokenizer):
    prepared = CausalLM(text_column="text").prepare(Dataset.from_dict({"text": ["good film"]}), tokenizer)
    assert prepared[0]["labels"] == prepared[0]["input_ids"]
    assert prepared[0]["input_ids"] == [1, *ids(tokenizer, "good film"), 2]


@pytest.mark.parametrize("length", [2, 3, 5])
def test_a_long_row_keeps_its_completion(tokenizer, length):
    rows = Dataset.from_dict({"prompt": ["the film was very good"], "completion": ["bad plot"]})
    row = CausalLM(**INSTRUCT, max_length=length).prepare(rows, tokenizer)[0]
    assert len(row["input_ids"]) == length and row["labels"][0] == -100
    wanted = [*ids(tokenizer, "bad plot"), 2][: length - 1]
    assert row["labels"][-len(wanted) :] == wanted


def test_perplexity_is_over_tokens_and_leaves_out_padding():
    task = CausalLM()
    logits = torch.zeros(1, 4, 8)
    labels = torch.tensor([[5, 0, 3, -100]])
    kept = task.preprocess_logits(logits, labels)
    assert kept.shape == (1, 3, 2) and kept[0, 2].tolist() == [-100, -100]
    found = task.compute_metrics(EvalPrediction(kept.numpy(), labels.numpy()))
    assert found["perplexity"] == pytest.approx(8) and found["token_accuracy"] == 0.5
    huge = task.compute_metrics(EvalPrediction(kept.numpy() * 0 + 1000, labels.numpy()))
    assert huge["perplexity"] == math.inf


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    assert load_tokenizer(Source(save_llama(tmp_path))).pad_token == "</s>"
