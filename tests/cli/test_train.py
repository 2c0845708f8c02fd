"""The command from end to end, on tiny random models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import safetensors.torch
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adafreeze import SafeConfig
from adafreeze.errors import AdafreezeError
from adafreeze.journal import read_journal
from adafreeze.train.arguments import parse
from image_cases import blocks_of, images
from text_cases import glue_rows, nested, questions, reviews, write


def results(folder) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def events(folder, *kinds: str) -> list[dict]:
    return [event for event in read_journal(folder / "journal.jsonl") if event["event"] in kinds]


def assert_loads(folder, kind, base: str, trained, batch) -> None:
    """Plain PEFT gives the logits of the trained model, to the bit."""
    loaded = PeftModel.from_pretrained(kind.from_pretrained(base), folder).eval()
    with torch.no_grad():
        ours, theirs = trained[0].eval()(**batch), loaded(**batch)
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=0)


@pytest.fixture
def trained(monkeypatch):
    """The model as it was when it was saved."""
    from adafreeze.train.trainer import MeteredTrainer

    seen = []
    save = MeteredTrainer.save_model

    def spy(self, *args, **kwargs):
        seen[:] = [self.model]
        return save(self, *args, **kwargs)

    monkeypatch.setattr(MeteredTrainer, "save_model", spy)
    return seen


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3", "vera"])
def test_the_saved_adapter_gives_the_same_logits_with_plain_peft(train, trained, bert, csv_file, adapter):
    folder = train("text-classification", bert, csv_file, "--adapter", adapter, "--learning_rate", "0.1")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["the film was good", "a bad plot"], padding=True, return_tensors="pt")
    assert_loads(folder, AutoModelForSequenceClassification, bert, trained, batch)
    with torch.no_grad():
        adapted = trained[0](**batch).logits
        with trained[0].disable_adapter():
            assert not torch.allclose(adapted, trained[0](**batch).logits)


def test_a_causal_adapter_loads_with_plain_peft(train, trained, llama, csv_file):
    folder = train("causal-lm", llama, csv_file, "--learning_rate", "0.1")
    assert_loads(folder, AutoModelForCausalLM, llama, trained, {"input_ids": torch.tensor([[1, 5, 6, 7]])})


@pytest.mark.parametrize("extension", ["csv", "json", "jsonl", "parquet"])
def test_every_kind_of_file_trains_and_evaluates(train, bert, tmp_path, extension):
    file = write(tmp_path / f"data.{extension}", reviews())
    folder = train("text-classification", bert, file, "--validation_file", file)
    found = results(folder)
    assert 0 <= found["eval_accuracy"] <= 1 and 0 <= found["eval_f1"] <= 1 and found["train_samples"] == 8
    for name in ("adapter_config.json", "train_results.json", "eval_results.json", "tokenizer_config.json"):
        assert (folder / name).is_file(), name


def test_pairs_with_int_labels_and_a_held_out_share(train, bert, csv_file):
    flags = ("--text_column", "text", "reply", "--label_column", "id", "--validation_split", "0.25")
    found = results(train("text-classification", bert, csv_file, *flags))
    assert found["train_samples"] == 6 and "eval_accuracy" in found


def test_the_labels_names_are_saved_with_the_model(train, trained, bert, csv_file):
    train("text-classification", bert, csv_file)
    assert trained[0].config.id2label == {0: "neg", 1: "pos"}


def test_regression(train, bert, csv_file):
    flags = ("--label_column", "stars", "--validation_file", csv_file, "--ignore_mismatched_sizes")
    found = results(train("regression", bert, csv_file, *flags))
    assert found["eval_mse"] > 0 and -1 <= found["eval_pearson"] <= 1 and -1 <= found["eval_spearmanr"] <= 1


def test_a_glue_task_needs_only_its_name(train, bert, tmp_path):
    file = write(tmp_path / "data.jsonl", glue_rows("mrpc"))
    found = results(train("mrpc", bert, file, "--validation_file", file))
    assert found["eval_combined_score"] == pytest.approx((found["eval_accuracy"] + found["eval_f1"]) / 2)


def test_stsb_is_a_regression_by_its_name(train, bert, tmp_path):
    file = write(tmp_path / "data.csv", glue_rows("stsb"))
    found = results(train("stsb", bert, file, "--validation_file", file, "--ignore_mismatched_sizes"))
    assert found["eval_combined_score"] == pytest.approx((found["eval_pearson"] + found["eval_spearmanr"]) / 2)


def test_mnli_is_evaluated_on_both_kinds_of_genres(train, bert, tmp_path):
    matched = write(tmp_path / "matched.jsonl", glue_rows("mnli", 9, as_text=True))
    other = write(tmp_path / "other.jsonl", [{**row, "label": "neutral"} for row in glue_rows("mnli", 6)])
    files = ("--validation_file", matched, "--validation_mismatched_file", other, "--ignore_mismatched_sizes")
    found = results(train("mnli", bert, matched, *files))
    assert {"eval_accuracy", "eval_accuracy_mm", "eval_loss", "eval_loss_mm"} <= set(found)
    assert found["eval_accuracy"] in [pytest.approx(n / 9) for n in range(10)] and found["eval_accuracy_mm"] in (0, 1)


def test_glue_comes_from_the_hub_if_no_file_is_given(bert, quiet, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    from adafreeze.cli.train import main

    rows = Dataset.from_list(glue_rows("mnli", 6))
    splits = DatasetDict(train=rows, validation_matched=rows, validation_mismatched=rows.select(range(3)))
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **_: asked.append(names) or splits)
    main(
        [
            *("--task_name", "mnli", "--model_name_or_path", bert, "--output_dir", str(tmp_path / "run")),
            *("--max_steps", "1", *quiet, "--ignore_mismatched_sizes", "--method", "none"),
        ]
    )
    assert set(asked) == {("nyu-mll/glue", "mnli")} and "eval_accuracy_mm" in results(tmp_path / "run")


def test_squad_v1_is_scored_without_unanswerable_questions(train, bert, tmp_path):
    file = tmp_path / "train-v1.1.json"
    file.write_text(json.dumps({"data": nested(questions())["data"], "version": "1.1"}))
    flags = ("--validation_file", str(file), "--max_seq_length", "24", "--learning_rate", "0.05", "--max_steps", "60")
    found = results(train("question-answering", bert, str(file), *flags, "--target_modules", "all-linear"))
    assert 0 < found["eval_exact_match"] <= found["eval_f1"] and "eval_NoAns_f1" not in found


@pytest.mark.parametrize("name", ["squad.json", "rows.jsonl"])
def test_question_answering_freezes_and_reports_exact_match_and_f1(train, trained, bert, tmp_path, name):
    rows, file = questions(unanswerable=True), tmp_path / name
    if name == "squad.json":
        file.write_text(json.dumps(nested(rows)))
    else:
        write(file, rows)
    flags = ("--validation_file", str(file), "--max_seq_length", "16", "--doc_stride", "4", "--pad_to_max_length")
    units = ("--method", "safe", "--freeze", "bert.encoder.layer.0", "--num_train_epochs", "3", "--max_steps", "-1")
    more = ("--eval_strategy", "epoch", "--learning_rate", "0.1")
    folder = train("question-answering", bert, str(file), *flags, *units, *more)
    found = results(folder)
    assert 0 <= found["eval_exact_match"] <= found["eval_f1"] <= 100 and "eval_NoAns_f1" in found
    assert found["frozen_units"] == 1 and found["cache_hit_rate"] > 0.5 and found["train_samples"] > len(rows)
    batch = AutoTokenizer.from_pretrained(folder)(["was it"], ["it was the plot"], return_tensors="pt")
    assert_loads(folder, AutoModelForQuestionAnswering, bert, trained, batch)


@pytest.mark.parametrize("workers", [(), ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true")])
def test_images_train_freeze_and_hit_the_cache(train, trained, vit, tmp_path, workers):
    folder = images(tmp_path / "images")
    flags = ("--validation_dir", folder, "--target_modules", "fc1", "fc2", "--learning_rate", "0.01")
    units = ("--method", "safe", "--freeze", *blocks_of(vit)[:1], "--num_train_epochs", "12", "--max_steps", "-1")
    out = train("image-classification", vit, folder, *flags, *units, "--per_device_train_batch_size", "8", *workers)
    found = results(out)
    assert found["eval_accuracy"] == 1 and "eval_f1" in found  # the classes are two colours
    assert found["frozen_units"] == 1 and found["cache_hit_rate"] > 0.5
    assert trained[0].config.id2label == {0: "blue", 1: "red"} and (out / "preprocessor_config.json").is_file()
    assert_loads(out, AutoModelForImageClassification, vit, trained, {"pixel_values": torch.randn(2, 3, 8, 8)})


def test_causal_lm_reports_perplexity_and_loss(train, llama, csv_file):
    found = results(train("causal-lm", llama, csv_file, "--validation_file", csv_file))
    assert found["eval_perplexity"] > 1 and found["eval_loss"] > 0 and 0 <= found["eval_token_accuracy"] <= 1


def test_instruction_tuning(train, llama, csv_file):
    flags = ("--prompt_column", "prompt", "--completion_column", "completion", "--validation_file", csv_file)
    assert results(train("causal-lm", llama, csv_file, *flags))["eval_perplexity"] > 1


def test_adalora_gets_the_steps_and_moves_its_ranks(train, trained, bert, csv_file):
    options = '{"target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1}'
    flags = ("--adapter", "adalora", "--adapter_r", "4", "--adapter_kwargs", options, "--max_steps", "4")
    train("text-classification", bert, csv_file, *flags)
    config = trained[0].peft_config["default"]
    assert config.total_step == 4 and config.rank_pattern


def test_adapter_flags_reach_peft_under_its_own_names(train, bert, csv_file):
    flags = ("--adapter", "lora", "--adapter_r", "3", "--adapter_alpha", "6", "--adapter_dropout", "0.1")
    more = ("--target_modules", "key", "value", "--adapter_kwargs", '{"use_rslora": true}')
    folder = train("text-classification", bert, csv_file, *flags, *more)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.1)
    assert sorted(config["target_modules"]) == ["key", "value"] and config["use_rslora"] is True


def test_a_yaml_file_gives_flags_and_the_command_line_wins(train, bert, csv_file, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("adapter_r: 3\nlearning_rate: 1e-4\ntext_column: [text, reply]\nadapter_alpha: 5\n")
    folder = train("text-classification", bert, csv_file, "--config", str(file), "--adapter_alpha", "7")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 7)
    kept = yaml.safe_load((folder / "adafreeze_config.yaml").read_text())
    assert "include_num_input_tokens_seen" not in kept and kept["task"] == "text-classification"
    assert kept["text_column"] == ["text", "reply"] and kept["learning_rate"] == 1e-4


@pytest.mark.parametrize("entry", [e for e in fields(SafeConfig) if isinstance(e.default, bool)], ids=lambda e: e.name)
def test_every_boolean_setting_accepts_both_values(entry, tmp_path):
    def setting(*words):
        arguments = parse(["--model_name_or_path", "m", "--output_dir", str(tmp_path), *words])
        found = getattr(arguments.safe, entry.name)
        assert arguments.resolved.get(entry.name, entry.default) == found  # as it is kept for the next run
        return found

    assert setting() is entry.default
    assert setting(f"--{entry.name}") is setting(f"--{entry.name}", "True") is True
    assert setting(f"--{entry.name}", "False") is setting(f"--{entry.name}=no") is False
    file = tmp_path / "run.yaml"
    file.write_text(f"{entry.name}: {str(not entry.default).lower()}\n")
    assert setting("--config", str(file)) is (not entry.default)


def test_the_resolved_config_repeats_the_run_to_the_last_bit(train, bert, csv_file, tmp_path):
    from adafreeze.cli.train import main

    folder = train("text-classification", bert, csv_file, "--adapter_r", "2", "--token", "hf_secret")
    assert "hf_secret" not in (folder / "adafreeze_config.yaml").read_text()
    again = tmp_path / "again"
    main(["--config", str(folder / "adafreeze_config.yaml"), "--output_dir", str(again)])
    assert (folder / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()


def test_the_journal_holds_the_settings_the_losses_and_the_result(train, bert, csv_file):
    folder = train("text-classification", bert, csv_file)
    events = list(read_journal(folder / "journal.jsonl"))
    assert [event["event"] for event in events[:2]] == ["journal", "run"] and events[-1]["event"] == "done"
    assert [event["step"] for event in events if event["event"] == "log" and "loss" in event] == [1, 2]
    assert events[1]["settings"]["max_steps"] == 2


def test_a_run_resumes_from_its_last_checkpoint(train, bert, csv_file):
    flags = ("text-classification", bert, csv_file, "--save_strategy", "steps", "--save_steps", "1")
    folder = train(*flags)
    train(*flags, "--max_steps", "3", "--resume_from_checkpoint", "last")
    assert [event["event"] for event in events(folder, "run", "resume", "done")] == ["run", "resume", "done"]
    assert (folder / "checkpoint-3").is_dir()


@pytest.mark.parametrize("method", ["none", "safe"])
def test_the_repeated_steps_of_a_resumed_run_are_in_the_journal_once(train, bert, csv_file, method):
    flags = ("--method", method, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    folder = train("text-classification", bert, csv_file, *flags)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()  # as if it had been killed while it saved
    train("text-classification", bert, csv_file, *flags, "--resume_from_checkpoint", "last")
    assert [event["step"] for event in events(folder, "log") if "loss" in event] == [1, 2, 3, 4]
    assert len(events(folder, "done")) == 1
    *_, resumed = [event for event in events(folder, "resume") if "checkpoint" in event]
    assert resumed["step"] == 2 and resumed["checkpoint"].endswith("checkpoint-2")


def test_overwriting_removes_the_old_run(train, bert, csv_file):
    folder = train("text-classification", bert, csv_file, "--save_strategy", "steps", "--save_steps", "1")
    (folder / "notes.txt").write_text("mine")
    train("text-classification", bert, csv_file, "--overwrite_output_dir")
    assert not list(folder.glob("checkpoint-*")) and (folder / "notes.txt").read_text() == "mine"
    assert len(events(folder, "run")) == 1


def test_bad_input_does_not_remove_the_run_that_would_be_overwritten(train, bert, csv_file):
    folder = train("text-classification", bert, csv_file)
    with pytest.raises(AdafreezeError):
        train("text-classification", bert, "/no/file.csv", "--overwrite_output_dir")
    assert (folder / "adapter_config.json").is_file() and (folder / "journal.jsonl").is_file()


def test_safe_freezes_and_its_costs_are_counted(train, bert, csv_file):
    flags = ("--method", "safe", "--count_costs", "true", "--max_steps", "8", "--freeze_share", "0.9")
    folder = train("text-classification", bert, csv_file, *flags, "--learning_rate", "0.1")
    found = results(folder)
    assert found["frozen_units"] >= 1 and found["train_flops"] > 0 and found["train_peak_saved_bytes"] > 0
    assert events(folder, "freeze")


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_the_prefix_cache_has_flags_of_its_own(train, bert, csv_file, tmp_path, where):
    folder = ("--prefix_cache_dir", str(tmp_path / "prefix")) if where == "disk" else ()
    flags = ("--method", "safe", "--prefix_cache", where, "--prefix_cache_budget", "10MiB", *folder)
    units = ("--freeze", "bert.encoder.layer.0", "--num_train_epochs", "3", "--max_steps", "-1")
    found = train("text-classification", bert, csv_file, *flags, *units)
    assert results(found)["cache_hit_rate"] > 0.5 and results(found)["frozen_units"] >= 1
    (event,) = events(found, "cache")
    assert list(event["nbytes"]) == ["memory" if where == "ram" else "disk"]


def test_the_papers_method_trains_a_causal_model(train, llama, csv_file):
    flags = ("--method", "safe-paper", "--threshold", "0.5", "--max_steps", "8", "--probe_seed", "3")
    folder = train("causal-lm", llama, csv_file, *flags, "--learning_rate", "0.1")
    (start,) = events(folder, "start")
    found = {name: start["config"][name] for name in ("policy", "threshold", "seed")}
    assert found == {"policy": "threshold", "threshold": 0.5, "seed": 3}


def test_a_frozen_adapter_is_saved_with_the_others(train, trained, bert, csv_file):
    units = ("--freeze", "bert.encoder.layer.0")
    folder = train("text-classification", bert, csv_file, "--method", "safe", *units)
    assert results(folder)["frozen_units"] == 1
    batch = AutoTokenizer.from_pretrained(folder)(["a bad plot"], return_tensors="pt")
    assert_loads(folder, AutoModelForSequenceClassification, bert, trained, batch)


def test_method_none_is_to_the_byte_a_script_without_adafreeze(train, bert, csv_file, tmp_path):
    folder = train("text-classification", bert, csv_file, "--count_costs", "true", "--learning_rate", "0.1")
    script = f"""
import sys
import pandas as pd
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import (AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer,
                          TrainingArguments, set_seed)
set_seed(42)
model = AutoModelForSequenceClassification.from_pretrained({bert!r}, num_labels=2)
config = PeftConfig.from_pretrained({str(folder)!r})
config.inference_mode = False
model = get_peft_model(model, config)
tokenizer = AutoTokenizer.from_pretrained({bert!r})
rows = pd.read_csv({csv_file!r})
names = sorted(rows.label.unique())
encoded = tokenizer(rows.text.tolist(), truncation=True, max_length=64)
data = Dataset.from_dict({{**encoded, "labels": [names.index(label) for label in rows.label]}})
args = TrainingArguments({str(tmp_path / "plain")!r}, max_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
                         use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
trainer.train()
trainer.save_model()
assert not [name for name in sys.modules if name.startswith("adafreeze")]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (folder / weights).read_bytes()


@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_a_model_whose_frozen_part_never_came_to_the_device_trains_the_same(train, llama, csv_file, offload, tmp_path):
    more = ("--method", "safe", "--freeze_at_start", "0.5", "--freeze_share", "0", "--fill", "before")
    flags = (*more, "--validation_file", csv_file, "--learning_rate", "0.1", "--max_steps", "6")
    stays = train("causal-lm", llama, csv_file, *flags, "--offload", "off").rename(tmp_path / "stays")
    left = train("causal-lm", llama, csv_file, *flags, "--offload", offload)
    for key in ("train_loss", "eval_loss"):
        assert results(left)[key] == results(stays)[key], key
    adapters = [safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (left, stays)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    (moved,) = events(left, "offload")
    assert moved["step"] == 0 and moved["nbytes"] > 0
    assert not events(left, "offload_off") and not list(left.rglob("offload-*"))
