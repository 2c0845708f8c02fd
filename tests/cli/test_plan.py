"""``adafreeze plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from adafreeze.cli.main import main
from adafreeze.journal import read_journal
from text_cases import questions, write


@pytest.fixture
def config(llama) -> str:
    return str(Path(llama) / "config.json")


@pytest.fixture
def plan(config, capsys):
    """``plan(*flags)``: exit code, what was printed, and what was printed as error."""

    def run(*flags: str, model: str = config) -> tuple[int, str, str]:
        fixed = ("--model_name_or_path", model, "--max_seq_length", "16", "--per_device_train_batch_size", "2")
        code = main(["plan", *fixed, *flags])
        return code, *capsys.readouterr()

    return run


def test_two_tables_and_what_follows(plan):
    code, text, _ = plan("--device_memory", "RTX 4090", "--adapter_dropout", "0.1")
    assert code == 0
    rows = re.findall(r"^│ (plain PEFT|\d of \d|all checkpointed) +│(.*)│$", text, re.MULTILINE)
    depths = [f"{depth} of 2" for depth in (0, 1)]
    assert [name for name, _ in rows] == ["plain PEFT", *depths, "all checkpointed"] * 2
    assert "peak = weights + adapters + optimizer + saved + transient" in text
    said = "Of RTX 4090, 23.0 GiB can be used. Micro-batches that fit: "
    ways = (
        r'(\d+) plain, (\d+) with SafeConfig\(\), (\d+) with checkpointing="selective", up to (\d+) with memory_budget'
    )
    fits = re.search(re.escape(said) + ways, " ".join(text.split()))
    assert fits is not None
    plain, safe, selective, least = map(int, fits.groups())
    assert least >= selective >= safe >= plain > 1000
    assert "The cheapest way to fit 2 samples: adafreeze train as it is." in text
    assert "Adapter dropout" not in text  # lean layers keep no dropped copy


def test_json_is_the_plan_and_nothing_else(plan, config):
    code, text, _ = plan("--json", "--device_memory", "1.01GiB")
    made = json.loads(text)
    assert code == 0
    assert [step["prefix"] for step in made["steps"]] == [0, 1]
    parts = ("weights", "adapters", "optimizer", "saved", "transient")
    for step in (*made["steps"], made["plain"], made["checkpointed"]):
        assert sum(step[part] for part in parts) == step["peak"]
    assert made["micro_batches"]["plain"] < made["micro_batches"]["checkpointed"]
    assert made["limit"] == int(1.01 * 2**30) - 2**30  # of which CUDA itself takes one


def test_the_folder_of_a_model_is_planned_by_its_configuration_alone(plan, config, tmp_path):
    (tmp_path / "config.json").write_text(Path(config).read_text())
    assert plan(model=str(tmp_path))[1] == plan()[1]


@pytest.mark.slow
def test_a_device_on_which_nothing_fits(plan):
    code, text, _ = plan("--device_memory", "1.0000001GiB")
    assert code == 0
    text = " ".join(text.split())
    assert re.search(r"Micro-batches that fit: 0 plain, 0 with SafeConfig\(\), 0 with .*, up to 0", text)
    assert re.search(r"Nothing fits\. .*--max_seq_length|Nothing fits\. .*max_length", text), text


def test_weights_that_fit_only_in_4_bits_are_for_a_script_of_ones_own(plan, tmp_path):
    LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    flags = ("--dtype", "bfloat16", "--target_modules", "all-linear")
    code, text, _ = plan(*flags, "--device_memory", "1042MiB", model=str(tmp_path))
    assert code == 0 and "up to 0 with" in text
    assert "nf4 weights, from BitsAndBytesConfig in your own script, with the defaults." in " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--device_memory", "RTX 9090"], r"no GPU of that name.*RTX"),
        (["--device_memory", "6 parsecs"], r"parsecs.*GiB"),
        (["--device_memory", "0"], "device_memory"),
        (["--optim", "adamm"], r"optim.*adamw"),
        (["--adapter", "loraa"], "loraa"),
        (["--per_device_train_batch_size", "0"], "empty"),
        (["--per_device_train_batch_size", "many"], "invalid int value"),
        (["--max_seq_length", "100000"], r"the model reads \d+ tokens"),
        (["--quantization", "int2"], "invalid choice"),
        (["--target_modules", "no_such_layer"], "no_such_layer"),
        (["--batch_size", "4"], r"Unknown: --batch_size.*Fix: "),
        (["--task", "image-classification"], "image-classification"),
        (["--model_name_or_path", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_flags(plan, flags, text):
    code, out, error = plan(*flags)
    assert (code, out) == (2, "")
    assert re.search(text, error, re.DOTALL), error
    assert error.startswith("error: ") and "Fix: " in error and "Traceback" not in error


def test_a_configuration_with_missing_fields(plan, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    code, out, error = plan(model=str(tmp_path / "config.json"))
    assert (code, out) == (2, "") and "model_type" in error and "Fix: " in error


def budget_events(folder) -> list[dict]:
    return [event for event in read_journal(folder / "journal.jsonl") if event["event"] == "recompute"]


def test_train_keeps_a_memory_budget(train, llama, csv_file):
    flags = ("causal-lm", llama, csv_file, "--method", "safe", "--pad_to_max_length", "--max_seq_length", "16")
    flags += ("--text_column", "text", "--per_device_train_batch_size", "8", "--overwrite_output_dir")
    folder = train(*flags, "--memory_budget", "1.0")
    whole, *_ = budget_events(folder)
    assert whole["blocks"] == whole["selective"] == []
    limit = whole["peak"] - 10_000
    folder = train(*flags, "--memory_budget", str(limit))
    tight, *later = budget_events(folder)
    assert (tight["blocks"] or tight["selective"]) and tight["peak"] <= limit == tight["limit"]
    assert all(event["peak"] <= limit for event in later)
    settings = (folder / "adafreeze_config.yaml").read_text()
    assert f"memory_budget: '{limit}'" in settings


def test_train_refuses_a_budget_that_cannot_be_met(llama, csv_file, tmp_path, capsys):
    fixed = ["--task", "causal-lm", "--model_name_or_path", llama, "--train_file", csv_file, "--text_column", "text"]
    fixed += ["--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", "8", "--max_steps", "2"]
    for index, (budget, text) in enumerate(
        {
            "20KB": r"20000|19\.5 KiB",
            "6 parsecs": "parsecs",
            "0": "memory_budget",
            "-1GiB": "memory_budget",
            "1000TiB": "1000 TiB",
        }.items()
    ):
        code = main(["train", *fixed, f"--memory_budget={budget}", "--output_dir", str(tmp_path / str(index))])
        error = capsys.readouterr().err
        assert code == 2, error
        assert re.search(text, error) and "Fix: " in error and "Traceback" not in error, error


def test_a_plan_of_question_answering_is_what_a_run_holds(plan, train, bert, tmp_path):
    _, text, _ = plan("--task", "question-answering", "--target", "cpu", "--json", model=bert)
    file = write(tmp_path / "rows.jsonl", questions())
    flags = ("--count_costs", "true", "--max_seq_length", "16", "--pad_to_max_length")
    out = train("question-answering", bert, file, *flags)
    measured = json.loads((out / "all_results.json").read_text())["train_peak_saved_bytes"]
    assert json.loads(text)["plain"]["saved"] == measured
