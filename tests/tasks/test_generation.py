"""Text generation: the generated text, its references, and its scores."""

from __future__ import annotations

import json
import math
import sys

import pytest
import sacrebleu
import torch
from datasets import Dataset
from peft import PeftModel
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM

from adafreeze.cli.train import main
from adafreeze.errors import AdafreezeWarning, ConfigError
from adafreeze.journal import read_journal
from adafreeze.tasks import CausalLM, Source, TextGeneration, load_tokenizer
from adafreeze.tasks.generation import text_scores
from text_cases import WORDS, save_llama, write

COLUMNS = {"prompt_column": "prompt", "completion_column": "completion"}
PAIRS = [
    ("say hello", "hello"),
    ("ask", "is it good"),
    ("say hello", "hello hello"),
    ("was the film very very good", "i liked it"),
    ("ask", "was it bad"),
]
ROWS = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
WRITTEN = [
    "The Mill is a cheap pub near the river.",
    "Blue Spice serves Italian food and is not family friendly.",
    "There is a coffee shop in the city centre.",
]
REFERENCES = [
    ["The Mill is a cheap pub by the river.", "Near the river is a cheap pub named The Mill."],
    ["Blue Spice is an Italian restaurant. It is not family friendly.", "Blue Spice: Italian, no children.", "Adults!"],
    ["In the city centre there are coffee shops."],
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(llama):
    return AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.fixture
def task(llama):
    """Prepared for an evaluation on ROWS."""
    task = TextGeneration(**COLUMNS, generation_max_new_tokens=6)
    task.prepare_evaluation(Dataset.from_list(ROWS), load_tokenizer(Source(llama)))
    return task


def test_bleu_by_hand():
    # Clipped matches of 1, 2, 3 and 4 words: 5 of 6, 3 of 5, 2 of 4, 1 of 3; 6 words against the nearest reference's 7.
    found = text_scores(["the cat sat on the sofa"], [["the cat sat on the red mat", "one cat only"]])["bleu"]
    assert found == pytest.approx(100 * math.exp(1 - 7 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_rouge_l_by_hand_takes_the_best_reference():
    # "the cat on sofa": 4 of the 5 words of the text, 4 of the 6 of the reference; the other one shares one word.
    found = text_scores(["the cat lay on sofa"], [["the", "the cat sat on a sofa"]])["rougeL"]
    precision, recall = 4 / 5, 4 / 6
    assert found == pytest.approx(100 * 2 * precision * recall / (precision + recall))


def test_scores_equal_those_of_the_libraries():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    columns = [["" if n >= len(group) else group[n] for group in REFERENCES] for n in range(3)]
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in group)
        for text, group in zip(WRITTEN, REFERENCES, strict=True)
    ]
    found = text_scores(WRITTEN, REFERENCES)
    assert found["bleu"] == pytest.approx(sacrebleu.BLEU().corpus_score(WRITTEN, columns).score)
    assert found["rougeL"] == pytest.approx(100 * sum(best) / 3)
    assert text_scores([group[-1] for group in REFERENCES], REFERENCES) == pytest.approx({"bleu": 100, "rougeL": 100})


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_a_missing_package_is_named_before_training(monkeypatch, llama, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"(?s){package.replace('_', '-')}.* is not installed.*pip install"):
        TextGeneration(**COLUMNS).prepare_evaluation(Dataset.from_list(ROWS), load_tokenizer(Source(llama)))


def test_rows_of_one_prompt_are_its_references(task):
    assert task.references == {
        "say hello": ["hello", "hello hello"],
        "ask": ["is it good", "was it bad"],
        "was the film very very good": ["i liked it"],
    }


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_text_does_not_depend_on_the_batch(task, model, beams):
    task.generation_num_beams = beams
    prompts = list(task.references)
    alone = []
    for prompt in prompts:
        ids = task.tokenizer(prompt + "\n", return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=2)
        alone.append(task.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(alone)) == 3
    assert task.write(model, prompts, batch_size=2) == alone == task.write(model, prompts, batch_size=8)


def test_generation_restores_mode_and_random_state(task, model):
    model.train()
    before = torch.get_rng_state()
    task.write(model, ["ask"], batch_size=1)
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_a_prompt_too_long_for_the_model_loses_its_beginning(task, model):
    long = "very " * 100 + "good film"
    assert task.write(model, [long], 1) == task.write(model, ["very " * 57 + "good film"], 1)


def test_a_model_with_too_few_positions_raises(llama):
    with pytest.raises(ConfigError, match=r"(?s)new_tokens is 64, but the model has 64 positions.*new_tokens 32"):
        TextGeneration(**COLUMNS).load_model(Source(llama))


@pytest.fixture
def train(tmp_path, llama):
    """``train(*flags)``: text generation on ROWS for six epochs; the output folder."""
    file = write(tmp_path / "rows.jsonl", ROWS)

    def run(*flags: str, folder: str = "run"):
        given = {
            "model_name_or_path": llama,
            "train_file": file,
            "validation_file": file,
            "output_dir": str(tmp_path / folder),
            "num_train_epochs": "6",
            "per_device_train_batch_size": "2",
            "per_device_eval_batch_size": "2",
            "learning_rate": "0.05",
            "logging_steps": "1",
            "use_cpu": "true",
            "report_to": "none",
            "disable_tqdm": "true",
            "save_strategy": "no",
        }
        main([word for name, value in given.items() for word in (f"--{name}", value)] + list(flags))
        return tmp_path / folder

    return run


TASK = ("--task", "text-generation", "--prompt_column", "prompt", "--completion_column", "completion")
SHORT = ("--generation_max_new_tokens", "6", "--count_costs", "false")
FROZEN = ("--freeze", "model.layers.0", "--prefix_dropout", "false")


def losses(folder) -> list[float]:
    return [e["loss"] for e in read_journal(folder / "journal.jsonl") if e["event"] == "log" and "loss" in e]


def test_a_run_with_frozen_blocks_has_the_scores_of_its_adapter_in_plain_peft(train, task, llama):
    folder = train(*TASK, *SHORT, *FROZEN, "--eval_strategy", "epoch")
    found = json.loads((folder / "all_results.json").read_text())
    assert found["frozen_units"] == 1 and found["cache_hit_rate"] > 0.5  # the prefix is in use as it writes
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder)
    assert task.score(loaded, 2) == {name: found[f"eval_{name}"] for name in ("bleu", "rougeL")}
    assert found["perplexity"] == found["eval_perplexity"] > 1 and "eval_token_accuracy" in found
    events = [e for e in read_journal(folder / "journal.jsonl") if "eval_bleu" in e and e["event"] == "log"]
    assert len(events) == 7  # six epochs and the end
    assert losses(folder) == losses(train(*TASK, *SHORT, *FROZEN, folder="again"))  # writing changes nothing


def test_max_eval_samples_are_rows_and_beams_are_searched(train):
    flags = ("--method", "none", "--max_steps", "1", "--max_eval_samples", "3", "--generation_num_beams", "2")
    found = json.loads((train(*TASK, *SHORT, *flags) / "all_results.json").read_text())
    assert 0 <= found["eval_bleu"] <= 100 and 0 <= found["eval_rougeL"] <= 100


def test_grouped_text_hits_the_cache_and_has_the_perplexity_of_run_clm(train, llama, tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text("\n".join(f"{first} {second}" for first in WORDS[:6] for second in WORDS[:5]))
    flags = ("--task", "causal-lm", "--block_size", "8", "--train_file", str(file), "--validation_file", str(file))
    found = json.loads((train(*flags, "--count_costs", "false", *FROZEN) / "all_results.json").read_text())
    assert found["train_samples"] == 30 * 3 // 8 and found["cache_hit_rate"] == pytest.approx(5 / 6)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "run").eval()
    joined = [token for ids in load_tokenizer(Source(llama))(file.read_text().splitlines()).input_ids for token in ids]
    blocks = torch.tensor(joined[: len(joined) // 8 * 8]).view(-1, 8)
    with torch.no_grad():
        assert found["perplexity"] == pytest.approx(math.exp(loaded(blocks, labels=blocks).loss), rel=1e-5)


def test_block_size_is_limited_to_the_models_positions(train, tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text("the film was very good\n" * 26)
    flags = ("--task", "causal-lm", "--block_size", "100", "--train_file", str(file), "--validation_file", str(file))
    with pytest.warns(AdafreezeWarning, match=r"(?s)cut to 64 tokens, not 100.*--block_size 64"):
        folder = train(*flags, "--method", "none", "--max_steps", "1", "--count_costs", "false")
    assert json.loads((folder / "all_results.json").read_text())["train_samples"] == 26 * 6 // 64


def test_perplexity_is_the_exponential_of_the_loss_of_a_token(train, llama):
    folder = train("--task", "causal-lm", *TASK[2:], "--method", "none", "--max_steps", "2", "--count_costs", "false")
    found = json.loads((folder / "all_results.json").read_text())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder).eval()
    tokenizer, total, count = load_tokenizer(Source(llama)), 0.0, 0
    for row in CausalLM(**COLUMNS).prepare(Dataset.from_list(ROWS), tokenizer):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        known = int((labels != -100).sum())
        with torch.no_grad():
            total, count = total + loaded(ids, labels=labels).loss.item() * known, count + known
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--task", "text-generation", "--prompt_column", "prompt"), "needs both --prompt_column and"),
        (("--task", "text-generation", "--text_column", "prompt"), "text_column has no effect on text-generation"),
        ((*TASK, "--generation_num_beams", "0"), "--generation_num_beams is 0"),
        ((*TASK, "--block_size", "8"), "--block_size has no effect on text-generation"),
        (("--task", "causal-lm", *TASK[2:], "--block_size", "8"), "--block_size 8 cuts plain text into rows"),
        (("--task", "causal-lm", *TASK[2:], "--messages_column", "m"), "or --messages_column"),
        (("--task", "causal-lm", "--generation_num_beams", "2"), "It is for text-generation"),
        (("--task", "causal-lm", "--messages_column", "prompt"), "no list of messages"),
    ],
)
def test_contradicting_flags_raise(train, flags, said):
    with pytest.raises(Exception, match=said):
        train(*flags)
