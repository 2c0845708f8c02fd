"""Bad input: every message is a fact with a fix, never a traceback."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from adafreeze.cli.main import main
from adafreeze.errors import AdafreezeError
from text_cases import llama_tokenizer, questions, reviews, write

CLASSIFY = "text-classification"


@pytest.fixture
def refuse(train, bert, csv_file):
    """``refuse(pattern, *flags)``: the command with these flags raises an error with this text."""

    def run(pattern: str, *flags: str, task: str = CLASSIFY, model: str = bert, file: str = csv_file) -> str:
        with pytest.raises(AdafreezeError) as caught:
            train(task, model, file, *flags)
        text = str(caught.value)
        assert re.search(pattern, text, re.DOTALL), text
        assert "Fix: " in text
        return text

    return run


def test_a_model_that_cannot_be_loaded(refuse, tmp_path):
    refuse(r"folder /no/such/model does not exist.*--model_name_or_path", model="/no/such/model")
    refuse(
        r"'bert-base-uncased' cannot be loaded by .*: We couldn't connect.*--model_name_or_path",
        model="bert-base-uncased",
    )
    (tmp_path / "empty").mkdir()
    refuse(r"empty' cannot be loaded.*config\.json", model=str(tmp_path / "empty"))


def test_the_hub_unreachable_for_a_dataset(tmp_path, capsys, bert):
    flags = ["--task", CLASSIFY, "--model_name_or_path", bert, "--dataset_name", "nyu-mll/glue"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert re.search(
        r"error: The dataset 'nyu-mll/glue' cannot be loaded: Couldn't reach.*--train_file", text, re.DOTALL
    )
    assert "Traceback" not in text


def test_a_tokenizer_of_another_model(refuse, tmp_path):
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(tmp_path / "other")
    refuse(r"tokenizer has \d+ tokens.*24 embeddings", "--tokenizer_name", str(tmp_path / "other"))


def test_an_output_folder_below_a_file(refuse, tmp_path):
    (tmp_path / "file").touch()
    refuse(r"cannot be written.*--output_dir", "--output_dir", str(tmp_path / "file" / "run"))


@pytest.mark.parametrize("trace", ["adapter_config.json", "journal.jsonl", "checkpoint-7/x"])
def test_an_output_folder_with_a_run(refuse, tmp_path, trace):
    file = tmp_path / "run" / trace
    file.parent.mkdir(parents=True)
    file.touch()
    refuse(rf"already holds a run \({trace.split('/')[0]}\).*--overwrite_output_dir.*--resume_from_checkpoint")


def test_the_adapters_that_exist_are_named(refuse):
    text = refuse(r"no adapter 'lorra'.*--adapter lora", "--adapter", "lorra")
    assert "dora" in text and "prompt_tuning" not in text


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("adapter_r: 3\nlearning_rat: 1\nfoo: 2\n", r"unknown keys: learning_rat, foo.*learning_rate"),
        ("adapter_r: 3\ntext_column: [a, b\n", r"run\.yaml, line \d: not valid YAML"),
        ("- a\n", r"contains list"),
        ("", r"contains nothing"),
        ("learning_rate: [1, 2]\n", r"learning_rate is a list"),
        ("learning_rate: fast\n", r"learning_rate: invalid float value: 'fast'"),
    ],
)
def test_a_bad_config_file(refuse, tmp_path, content, pattern):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    refuse(pattern, "--config", str(file))


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (("--config", "/no/run.yaml"), r"/no/run\.yaml of --config cannot be read"),
        (("--learning_rte", "1"), r"Unknown: --learning_rte.*--learning_rate"),
        (("--adapter_r", "two"), r"invalid int value: 'two'"),
        (("--method", "safe", "--freeze_share", "1.5"), r"freeze_share is 1\.5"),
        (("--eval_strategy", "epoch"), r"nothing to evaluate on.*--validation_split 0\.1"),
        (("--text_column", "sentence"), r"no column 'sentence'.*text, reply, label.*--text_column text"),
        (("--prompt_column", "prompt"), r"--prompt_column has no effect on text-classification"),
        (("--task_name", "mrpc"), r"Exactly one of --task and --task_name.*both"),
        (("--train_dir", "images"), r"--train_dir has no effect.*image-classification"),
        (("--doc_stride", "4"), r"--doc_stride has no effect.*question-answering"),
        (("--validation_mismatched_file", "a.csv"), r"no effect on text-classification.*is for mnli"),
        (("--max_seq_length", "0"), r"--max_seq_length is 0"),
        (("--validation_split", "1.5"), r"--validation_split is 1\.5"),
        (("--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "steps"), r"do not go together"),
        (("--task", "regression", "--label_column", "stars"), r"saved head of .*--ignore_mismatched_sizes"),
        (("--resume_from_checkpoint", "last"), r"no checkpoint in"),
        (("--resume_from_checkpoint", "/no/checkpoint-1"), r"is not a checkpoint"),
        (
            ("--target_modules", "q_proj"),
            r"PEFT cannot add lora.*q_proj.*query, key, value.*--target_modules query key",
        ),
        (("--adapter", "ia3", "--adapter_r", "4"), r"ia3 has no rank"),
        (("--adapter_kwargs", '{"use_rslor": 1}'), r"PEFT rejects the settings.*'use_rslor'.*use_rslora"),
        (("--adapter_kwargs", '{"init_lora_weights": "eva", "eva_config": 0}'), r"PEFT rejects"),
        (("--adapter_kwargs", "{use_rslora: true}"), r"--adapter_kwargs is .*--adapter_kwargs '"),
        (("--adapter_kwargs", "[1]"), r"--adapter_kwargs is .*--adapter_kwargs '"),
    ],
)
def test_flags_that_cannot_be_used(refuse, flags, pattern):
    refuse(pattern, *flags)


def test_questions_grouped_by_length_are_not_evaluated(refuse, tmp_path):
    file = write(tmp_path / "data.jsonl", questions())
    flags = ("--validation_file", file, "--train_sampling_strategy", "group_by_length")
    refuse(r"grouped by length cannot be evaluated", *flags, task="question-answering", file=file)
    refuse(r"--max_answer_length is 0", "--max_answer_length", "0", task="question-answering", file=file)


def test_a_row_without_text_stops_the_command_or_is_left_out(refuse, train, bert, tmp_path):
    rows = reviews()
    rows[2]["text"] = " "
    file = write(tmp_path / "data.csv", rows)
    refuse(r"data\.csv, line 4: empty text in column 'text'.*--skip_bad_rows", file=file)
    with pytest.warns(UserWarning, match="1 of 8 rows"):
        train(CLASSIFY, bert, file, "--skip_bad_rows")


def test_rows_are_cut_to_what_the_model_reads(train, bert, csv_file):
    with pytest.warns(UserWarning, match="reads 32 tokens"):
        train(CLASSIFY, bert, csv_file, "--max_seq_length", "99")


def test_an_unknown_command_and_a_missing_flag(capsys):
    assert main(["tran"]) == 2
    assert "no command 'tran'" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "required: --model_name_or_path" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert main([]) == 0 and main(["--help"]) == 0 and main(["--version"]) == 0
    assert re.search(r"train .*\nadafreeze \d", capsys.readouterr().out, re.DOTALL)
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and text.index("--freeze_share") < text.index("--learning_rate")
    assert "part of the total score that may be frozen" in " ".join(text.split())


def test_no_flag_of_ours_hides_one_of_trainer():
    from adafreeze.train.arguments import build_parser

    counts = Counter(name for group in build_parser().dataclass_types for name in group.__dataclass_fields__)
    assert {name for name, count in counts.items() if count > 1} <= {"overwrite_output_dir"}
