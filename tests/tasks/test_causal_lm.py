from __future__ import annotations

import math
import sys
from itertools import chain

import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction

from adafreeze.errors import DataError, ModelError
from adafreeze.tasks import CausalLM, Source, Split, load_splits, load_tokenizer
from adafreeze.tasks.causal_lm import turns
from text_cases import llama_tokenizer, save_bert, save_llama


@pytest.fixture
def tokenizer():
    tokenizer = llama_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as load_tokenizer does
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


INSTRUCT = {"prompt_column": "prompt", "completion_column": "completion"}


def test_the_loss_is_only_on_the_completion_and_its_end(tokenizer):
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


def test_prompt_tokens_have_no_loss(tokenizer, tmp_path):
    task = CausalLM(**INSTRUCT)
    model = task.load_model(Source(save_llama(tmp_path))).eval()
    rows = Dataset.from_dict({"prompt": ["say hello"], "completion": ["hello bye"]})
    batch = task.collator(tokenizer)(list(task.prepare(rows, tokenizer)))
    loss = model(**batch).loss
    by_hand = torch.nn.functional.cross_entropy(model(batch["input_ids"]).logits[0, 2:-1], batch["input_ids"][0, 3:])
    torch.testing.assert_close(loss, by_hand)


def test_the_end_of_plain_text_has_a_loss(tokenizer):
    prepared = CausalLM(text_column=["text"]).prepare(Dataset.from_dict({"text": ["good film"]}), tokenizer)
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


def test_a_bidirectional_model_raises(tmp_path):
    with pytest.raises(ModelError, match=r"BertLMHeadModel of .* is bidirectional"):
        CausalLM().load_model(Source(save_bert(tmp_path)))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    assert load_tokenizer(Source(save_llama(tmp_path))).pad_token == "</s>"


def run_clm_blocks(texts: list[str], tokenizer, size: int) -> list[list[int]]:
    """``group_texts`` of transformers' run_clm.py, on one batch of its map."""
    joined = list(chain.from_iterable(tokenizer(texts)["input_ids"]))
    whole = (len(joined) // size) * size
    return [joined[start : start + size] for start in range(0, whole, size)]


LINES = [" = good film = \n", "", "the film was very good\n", "\n", "i liked it\n"]


def test_grouped_texts_are_the_blocks_of_run_clm(tokenizer):
    rows = Dataset.from_dict({"text": LINES * 4})
    task = CausalLM(text_column=["text"], block_size=7)
    assert task.faults(Split(rows, "here")) == {}  # empty lines belong to the text
    prepared = task.prepare(rows, tokenizer)
    assert prepared["input_ids"][:] == run_clm_blocks(LINES * 4, tokenizer, 7) == prepared["labels"][:]
    assert task.prepare(rows, tokenizer)["input_ids"][:] == prepared["input_ids"][:]  # and again in the next epoch


def test_blocks_span_batches_of_rows(tokenizer):
    rows = Dataset.from_dict({"text": LINES * 700})
    joined = list(chain.from_iterable(tokenizer(LINES * 700)["input_ids"]))
    size = len(joined) // 2 - 1  # so that the first thousand fills none
    prepared = CausalLM(text_column=["text"], block_size=size).prepare(rows, tokenizer)
    assert list(chain.from_iterable(prepared["input_ids"])) == joined[: 2 * size]


def test_too_little_text_for_a_block_raises(tokenizer):
    task = CausalLM(text_column=["text"], block_size=50)
    with pytest.raises(DataError, match=r"(?s)11 tokens, fewer than one block of 50.*--block_size 5"):
        task.prepare(Dataset.from_dict({"text": ["the film was very good", "i liked it", ""]}), tokenizer)


def test_a_plain_text_file_is_read_line_by_line(tmp_path, tokenizer):
    file = tmp_path / "wiki.txt"
    file.write_text("".join(line or "\n" for line in LINES))
    rows, _ = load_splits(CausalLM(block_size=8), train_file=str(file))
    assert "".join(rows["text"]) == file.read_text()
    with pytest.raises(DataError, match=r"wiki\.txt, line 2: empty text"):
        load_splits(CausalLM(), train_file=str(file))


CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "say hello", "name": None},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "is it good"},
    {"role": "user", "content": "bye"},
]


def test_the_loss_of_a_conversation_is_on_the_assistants_turns(tokenizer):
    tokenizer.chat_template = CHATML
    assert turns(CHAT, tokenizer) == [
        ("<|user|>say hello</s><|assistant|>", False),
        ("hello</s>", True),
        ("<|user|>ask</s><|assistant|>", False),
        ("is it good</s>", True),
    ]
    task = CausalLM(messages_column="messages")
    rows = Dataset.from_dict({"messages": [CHAT, CHAT[:2]]})
    assert task.faults(Split(rows, "here")) == {}
    prepared = task.prepare(rows, tokenizer)
    learnt = [*ids(tokenizer, "hello"), 2, *ids(tokenizer, "is it good"), 2]
    assert [label for label in prepared[0]["labels"] if label != -100] == learnt
    whole = tokenizer.apply_chat_template(CHAT[:4], tokenize=False)
    assert prepared[0]["input_ids"] == ids(tokenizer, whole)
    short = CausalLM(messages_column="messages", max_length=4).prepare(rows, tokenizer)[0]
    assert short["input_ids"] == short["labels"] == [*ids(tokenizer, "is it good"), 2]


def test_a_tokenizer_that_cannot_write_conversations_raises(tokenizer):
    with pytest.raises(ModelError, match=r"(?s)no chat template.*--tokenizer_name"):
        turns(CHAT, tokenizer)
    # As templates that drop the thinking of earlier turns: the first answer reads otherwise once others follow.
    tokenizer.chat_template = CHATML.replace(
        "m['content']", "('' if m['role'] == 'assistant' and not loop.last else m['content'])"
    )
    with pytest.raises(ModelError, match=r"(?s)changes a turn when others follow.*message 4.*adafreeze\[llm\]"):
        turns(CHAT, tokenizer)


def test_training_templates_of_trl_keep_earlier_turns(tokenizer, monkeypatch):
    trl = pytest.importorskip("trl.chat_template_utils")
    tokenizer.chat_template = trl.qwen3_chat_template  # drops the thinking of earlier turns
    thinking = [CHAT[0], {**CHAT[1], "content": "<think>\nvery\n</think>\n\nhello"}, *CHAT[2:]]
    thinking = [{key: value for key, value in message.items() if value} for message in thinking]
    rows = Dataset.from_dict({"messages": [thinking]})
    task = CausalLM(messages_column="messages")
    labels = [label for label in task.prepare(rows, tokenizer)[0]["labels"] if label != -100]
    assert all(token in labels for token in ids(tokenizer, "very hello is it good"))
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    with pytest.raises(ModelError, match=r"changes a turn"):
        task.prepare(rows, tokenizer)
    tokenizer.chat_template = CHATML  # needs no other version, so no TRL
    assert task.prepare(Dataset.from_dict({"messages": [CHAT]}), tokenizer)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (CHAT[:1], "no message of the assistant"),
        (CHAT[1:], "that starts with the assistant"),
        ([{"role": "user", "content": None}], "no list of messages with role and content"),
        (None, "no list of messages"),
    ],
)
def test_a_conversation_without_an_answer_is_a_fault(messages, fault):
    rows = Dataset.from_dict({"messages": [CHAT[:2], messages]})
    assert fault in CausalLM(messages_column="messages").faults(Split(rows, "here"))[1]
