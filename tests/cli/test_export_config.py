"""``adafreeze export-config``: after `adafreeze train`, from a journal alone, and what it refuses."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from adafreeze.cli.main import main


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
    assert "Adapters in 1 of 2 blocks. Their parameters: 512; in the run: 512." in text
    config = LoraConfig.from_pretrained(str(tmp_path / "next"))
    assert config.base_model_name_or_path == bert and not config.inference_mode
    assert (config.layers_to_transform, config.target_modules) == ([1], {"query", "value"})
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2), config)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad and ".lora_A." in name}
    assert len(trained) == 2 and all(".layer.1." in name and shape[0] == 8 for name, shape in trained.items())


def test_without_the_adapter_the_flags_in_the_journal_say_what_it_was(run, capsys, tmp_path):
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
        ((tmp_path / "file",), "holds no scores"),
        ((run, "-o", run), r"holds a trained adapter.*-o .*next"),
        ((run, "-o", tmp_path / "file"), r"file cannot be written"),
        ((run, "--min_share", "0.999"), "No block has 0.999 of the score"),
        ((run, "--min_share", "half"), "invalid float value"),
        ((run, "--adapter_config", tmp_path), r"no adapter_config\.json in"),
        ((run, "--keep_rank"), r"Unknown: --keep_rank.*--keep_ranks"),
        (("-o", run), r"-o stands before the run"),
    ):
        code, out, error = export(capsys, *words)
        assert (code, out) == (2, ""), words
        assert re.search(text, error, re.DOTALL) and "Fix: " in error and "Traceback" not in error, error


def test_a_run_without_scores_is_named(train, bert, csv_file, capsys):
    code, _, error = export(capsys, train("text-classification", bert, csv_file))
    assert code == 2 and "--method none" in error
