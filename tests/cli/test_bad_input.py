"""Bad input: every message names the fact, the cause and the fix, and is never somebody else's traceback."""

from __future__ import annotations

import re

import pytest

from adafreeze.cli.main import main
from adafreeze.errors import AdafreezeError
from text_cases import llama_tokenizer, questions, reviews, write


@pytest.fixture
def refuse(train):
    def run(pattern: str, *arguments: str) -> str:
        with pytest.raises(AdafreezeError) as caught:
            train(*arguments)
        text = str(caught.value)
        assert re.search(pattern, text, re.DOTALL), text
        assert "Fix: " in text
        return text

    return run


CLASSIFY = "text-classification"


def test_a_model_path_that_does_not_exist(refuse, csv_file):
    refuse(r"folder /no/such/model does not exist.*--model_name_or_path", CLASSIFY, "/no/such/model", csv_file)


def test_the_hub_unreachable_for_a_model(refuse, csv_file):
    refuse(
        r"'bert-base-uncased'.*Hub is unreachable.*--model_name_or_path path/to",
        CLASSIFY,
        "bert-base-uncased",
        csv_file,
    )


def test_the_hub_unreachable_for_a_dataset(tmp_path, capsys, bert):
    flags = ["--task", CLASSIFY, "--model_name_or_path", bert, "--dataset_name", "nyu-mll/glue"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert re.search(r"error: The dataset 'nyu-mll/glue'.*Hub is unreachable.*--train_file", text, re.DOTALL)
    assert "Traceback" not in text


def test_a_folder_that_is_no_model(refuse, csv_file, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(r"empty cannot be loaded.*config\.json", CLASSIFY, str(tmp_path / "empty"), csv_file)


def test_a_saved_head_of_another_size(refuse, bert, csv_file):
    refuse(
        r"head.*does not fit.*--ignore_mismatched_sizes",
        "regression",
        bert,
        csv_file,
        "--label_column",
        "stars",
    )


def test_a_tokenizer_of_another_model(refuse, bert, csv_file, tmp_path):
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(tmp_path / "other")
    refuse(
        r"tokenizer has \d+ tokens.*24 embeddings",
        CLASSIFY,
        bert,
        csv_file,
        "--tokenizer_name",
        str(tmp_path / "other"),
    )


def test_an_output_folder_below_a_file(refuse, bert, csv_file, tmp_path):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "run")
    refuse(r"cannot be written.*--output_dir", CLASSIFY, bert, csv_file, "--output_dir", place)


@pytest.mark.parametrize("trace", ["adapter_config.json", "journal.jsonl", "checkpoint-7/x"])
def test_an_output_folder_that_holds_a_run(refuse, bert, csv_file, tmp_path, trace):
    file = tmp_path / "run" / trace
    file.parent.mkdir(parents=True)
    file.touch()
    pattern = rf"already holds a run \({trace.split('/')[0]}\).*--overwrite_output_dir.*--resume_from_checkpoint"
    refuse(pattern, CLASSIFY, bert, csv_file)


def test_nothing_to_resume_from(refuse, bert, csv_file):
    refuse(r"no checkpoint in", CLASSIFY, bert, csv_file, "--resume_from_checkpoint", "last")
    refuse(r"is not a checkpoint", CLASSIFY, bert, csv_file, "--resume_from_checkpoint", "/no/checkpoint-1")


def test_an_unknown_adapter(refuse, bert, csv_file):
    text = refuse(r"no adapter 'lorra'.*--adapter lora", CLASSIFY, bert, csv_file, "--adapter", "lorra")
    assert "dora" in text and "prompt_tuning" not in text


def test_target_modules_that_match_nothing(refuse, bert, csv_file):
    pattern = r"--target_modules q_proj matches no module.*query, key, value.*--target_modules query key"
    refuse(pattern, CLASSIFY, bert, csv_file, "--target_modules", "q_proj")


def test_a_setting_that_the_adapter_lacks(refuse, bert, csv_file):
    refuse(r"ia3 has no rank", CLASSIFY, bert, csv_file, "--adapter", "ia3", "--adapter_r", "4")
    refuse(
        r"no setting 'use_rslor'.*'use_rslora'",
        CLASSIFY,
        bert,
        csv_file,
        "--adapter_kwargs",
        '{"use_rslor": 1}',
    )
    refuse(
        r"PEFT refuses",
        CLASSIFY,
        bert,
        csv_file,
        "--adapter_kwargs",
        '{"init_lora_weights": "eva", "eva_config": 0}',
    )


@pytest.mark.parametrize("text", ["{use_rslora: true}", "[1]"])
def test_adapter_kwargs_that_are_no_json_object(refuse, bert, csv_file, text):
    refuse(r"--adapter_kwargs is .*--adapter_kwargs '", CLASSIFY, bert, csv_file, "--adapter_kwargs", text)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("adapter_r: 3\nlearning_rat: 1\nfoo: 2\n", r"unknown keys: learning_rat, foo.*learning_rate"),
        ("adapter_r: 3\ntext_column: [a, b\n", r"run\.yaml, line \d: not valid YAML"),
        ("- a\n", r"holds list"),
        ("", r"holds nothing"),
        ("learning_rate: [1, 2]\n", r"learning_rate is a list"),
        ("learning_rate: fast\n", r"learning_rate: invalid float value: 'fast'"),
    ],
)
def test_a_bad_config_file(refuse, bert, csv_file, tmp_path, content, pattern):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    refuse(pattern, CLASSIFY, bert, csv_file, "--config", str(file))


def test_a_config_file_that_does_not_exist(refuse, bert, csv_file):
    refuse(r"/no/run\.yaml of --config cannot be read", CLASSIFY, bert, csv_file, "--config", "/no/run.yaml")


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (("--learning_rte", "1"), r"Unknown: --learning_rte.*--learning_rate"),
        (("--adapter_r", "two"), r"invalid int value: 'two'"),
        (("--freeze_share", "1.5"), r"freeze_share is 1\.5"),
        (("--eval_strategy", "epoch"), r"nothing to evaluate on.*--validation_split 0\.1"),
        (("--prompt_column", "prompt"), r"columns do not go with --task"),
        (("--task_name", "mrpc"), r"Exactly one of --task and --task_name.*Both"),
        (("--train_dir", "images"), r"--train_dir has no effect.*image-classification"),
        (("--doc_stride", "4"), r"--doc_stride has no effect.*question-answering"),
        (("--validation_mismatched_file", "a.csv"), r"no effect on text-classification.*is for mnli"),
        (("--max_seq_length", "0"), r"--max_seq_length is 0"),
        (("--validation_split", "1.5"), r"--validation_split is 1\.5"),
        (
            ("--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "steps"),
            r"do not go together",
        ),
    ],
)
def test_flags_that_cannot_be(refuse, bert, csv_file, flags, pattern):
    method = ("--method", "safe") if "--freeze_share" in flags else ()
    refuse(pattern, CLASSIFY, bert, csv_file, *method, *flags)


def test_a_missing_column_names_those_found(refuse, bert, csv_file):
    pattern = r"no column 'sentence'.*text, reply, label.*--text_column text"
    refuse(pattern, CLASSIFY, bert, csv_file, "--text_column", "sentence")


def test_questions_grouped_by_length_are_not_evaluated(refuse, bert, tmp_path):
    file = write(tmp_path / "data.jsonl", questions())
    flags = ("--validation_file", file, "--train_sampling_strategy", "group_by_length")
    refuse(r"grouped by length cannot be evaluated", "question-answering", bert, file, *flags)
    refuse(r"--max_answer_length is 0", "question-answering", bert, file, "--max_answer_length", "0")


def test_a_row_without_text_stops_the_command_or_is_left_out(refuse, train, bert, tmp_path):
    rows = reviews()
    rows[2]["text"] = " "
    file = write(tmp_path / "data.csv", rows)
    refuse(r"data\.csv, line 4: empty text in column 'text'.*--skip_bad_rows", CLASSIFY, bert, file)
    with pytest.warns(UserWarning, match="1 of 8 rows"):
        train(CLASSIFY, bert, file, "--skip_bad_rows")


def test_rows_are_cut_to_what_the_model_reads(train, bert, csv_file):
    with pytest.warns(UserWarning, match="cut to 32 tokens"):
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
    from collections import Counter

    from adafreeze.train.arguments import build_parser

    groups = build_parser().dataclass_types
    counts = Counter(name for group in groups for name in group.__dataclass_fields__)
    assert {name for name, count in counts.items() if count > 1} <= {"overwrite_output_dir"}
