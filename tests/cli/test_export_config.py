"""``adafreeze export-config``: after `adafreeze train`, from a journal alone, and with bad input."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from adafreeze import ConfigError, RunError
from adafreeze.cli.main import main
from text_cases import glue_rows, write


@pytest.fixture
def run(train, bert, csv_file):
    """The folder of a run of 12 steps of a BERT of two blocks, of which the lower one froze."""
    flags = ("--method", "safe", "--max_steps", "12", "--policy", "bottom_up", "--freeze_share", "0.5")
    return train("text-classification", bert, csv_file, *flags, "--adapter_r", "4", "--learning_rate", "1e-2")


def export(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["export-config", *map(str, words)])
    return code, *capsys.readouterr()


def test_a_table_and_a_configuration_that_the_next_run_can_use(run, bert, capsys, tmp_path):
    code, text, _ = export(capsys, run, "-o", tmp_path / "next")
    assert code == 0
    assert re.search(r"bert\.encoder\.layer\.0 +│ \S+ │ +[\d.]+% │ +\d+ │ +│", text), text
    assert re.search(r"bert\.encoder\.layer\.1 +│ \S+ │ +[\d.]+% │ +│ +8 │", text), text
    assert "Adapters in 1 of 2 blocks. Parameters: 512; in the run: 512." in text
    config = LoraConfig.from_pretrained(str(tmp_path / "next"))
    assert config.base_model_name_or_path == bert and not config.inference_mode
    assert (config.layers_to_transform, config.target_modules) == ([1], {"query", "value"})
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2), config)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad and ".lora_A." in name}
    assert len(trained) == 2 and all(".layer.1." in name and shape[0] == 8 for name, shape in trained.items())


def test_without_the_adapter_its_configuration_is_made_from_the_flags_in_the_journal(run, capsys, tmp_path):
    whole = export(capsys, run)
    assert whole[0] == 0 and str(run / "next" / "adapter_config.json") in whole[1].replace("\n", "")
    (tmp_path / "journal.jsonl").write_bytes((run / "journal.jsonl").read_bytes())
    code, text, _ = export(capsys, tmp_path / "journal.jsonl")
    assert code == 0 and "Adapters in 1 of 2 blocks.\n" in text
    found, expected = (PeftConfig.from_pretrained(str(folder / "next")) for folder in (tmp_path, run))
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"):
        assert getattr(found, name) == getattr(expected, name), name
    assert (found.task_type, found.base_model_name_or_path) == (expected.task_type, expected.base_model_name_or_path)


def test_what_is_refused(run, capsys, tmp_path):
    (tmp_path / "file").touch()
    for words, text in (
        ((tmp_path / "nowhere",), r"There is no journal .*nowhere"),
        ((tmp_path,), r"There is no journal .*journal\.jsonl"),
        ((tmp_path / "file",), "holds no scores|is empty"),
        ((run, "-o", run), r"contains a trained adapter.*-o .*next"),
        ((run, "-o", tmp_path / "file"), r"file cannot be written"),
        ((run, "--min_share", "0.999"), "No block has 0.999 of the score"),
        ((run, "--min_share", "half"), "invalid float value"),
        ((run, "--adapter_config", tmp_path), r"no adapter_config\.json in"),
        ((run, "--keep_rank"), r"Unknown: --keep_rank.*--keep_ranks"),
        (("-o", run), r"required: RUN"),
    ):
        code, out, error = export(capsys, *words)
        assert (code, out) == (2, ""), words
        assert re.search(text, error, re.DOTALL) and "Fix: " in error and "Traceback" not in error, error


def test_a_run_without_scores_is_named(train, bert, csv_file, capsys):
    code, _, error = export(capsys, train("text-classification", bert, csv_file))
    assert code == 2 and "--method none" in error


def test_train_takes_the_exported_configuration(run, train, bert, llama, csv_file, capsys, tmp_path):
    following = tmp_path / "next"
    assert export(capsys, run, "-o", following)[0] == 0
    words = ("text-classification", bert, csv_file, "--overwrite_output_dir", "--adapter_config")
    folder = train(*words, str(following))
    found, expected = (PeftConfig.from_pretrained(str(path)) for path in (folder, following))
    assert (found.layers_to_transform, found.rank_pattern) == ([1], expected.rank_pattern)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape()[0] for name in file.keys() if ".lora_A." in name}  # noqa: SIM118
    assert len(shapes) == 2 and all(".layer.1." in name and rank == 8 for name, rank in shapes.items())
    with pytest.raises(ConfigError, match="--adapter_config and --adapter_r are both given"):
        train(*words, str(following), "--adapter_r", "2")
    with pytest.raises(RunError, match=r"There is no adapter_config\.json in"):
        train(*words, str(tmp_path))
    with pytest.raises(RunError, match="for PEFT's task SEQ_CLS, and this run is for CAUSAL_LM"):
        train("causal-lm", llama, csv_file, "--overwrite_output_dir", "--adapter_config", str(following))


def test_a_configuration_without_a_task_gets_that_of_the_run(train, bert, csv_file, tmp_path):
    config = LoraConfig(r=3, target_modules=["query"])
    config.save_pretrained(str(tmp_path / "own"))
    folder = train("text-classification", bert, csv_file, "--adapter_config", str(tmp_path / "own/adapter_config.json"))
    found = PeftConfig.from_pretrained(str(folder))
    assert (found.task_type, found.r, found.modules_to_save) == ("SEQ_CLS", 3, ["classifier", "score"])


def test_plan_and_doctor_take_a_configuration_too(bert, capsys, tmp_path):
    LoraConfig(r=3, target_modules=["query"]).save_pretrained(str(tmp_path))
    for words in (("plan", "--model_name_or_path", bert, "--max_seq_length", "16"), ("doctor", bert)):
        assert main([*words, "--task", "text-classification", "--adapter_config", str(tmp_path)]) == 0
        assert main([*words, "--adapter_config", str(tmp_path / "nowhere")]) == 2
        assert "There is no adapter_config.json in" in capsys.readouterr().err


def test_a_glue_run_is_exported_from_its_journal_alone(train, bert, capsys, tmp_path):
    flags = ("--method", "safe", "--max_steps", "12", "--policy", "bottom_up", "--freeze_share", "0.5")
    folder = train("sst2", bert, write(tmp_path / "sst2.csv", glue_rows("sst2")), *flags)
    (tmp_path / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes())
    assert export(capsys, tmp_path)[0] == 0
    assert PeftConfig.from_pretrained(str(tmp_path / "next")).task_type == "SEQ_CLS"
