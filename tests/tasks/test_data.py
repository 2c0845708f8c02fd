from __future__ import annotations

import re

import pytest

from adafreeze.errors import DataError
from adafreeze.tasks import CausalLM, Regression, TextClassification, load_splits
from adafreeze.tasks.data import check, load_file, load_hub
from text_cases import reviews, write

GOOD = '{"text": "a", "label": 0}\n'


def refused(call, pattern: str) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert re.search(pattern, text, re.DOTALL), text
    assert "Fix: " in text
    return text


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        (
            "a.csv",
            "text,label\na,1\nb,2,3\n",
            r"a\.csv, line 3: 3 fields, but the header has 2 \(text, label\)",
        ),
        ("a.csv", "text,label\na,1,x\nb,2,x\n", r"line 2: 3 fields"),
        ("a.csv", 'text,label\n"two\nlines",1\n\nb,2,3\n', r"line 5: 3 fields"),
        ("a.csv", "text,label\n", r"a\.csv has no rows"),
        ("a.csv", "", r"a\.csv cannot be read: No columns"),
        ("a.jsonl", "\n", r"a\.jsonl has no rows"),
        ("a.json", "[]", r"a\.json has no rows"),
        ("a.jsonl", GOOD + "\n" + '{"text": "b", "label":\n', r"line 3: not valid JSON"),
        ("a.jsonl", GOOD + "[1, 2]\n", r"cannot be read: JSON parse error: Column\(\) changed from object"),
        (
            "a.jsonl",
            GOOD + '\n{"text": "b", "label": "x"}\n{"text": 5}\n',
            r"cannot be read: JSON parse error: Column\(/label\) changed from number to string",
        ),
        (
            "a.json",
            '[{"text": "a", "label": 0},\n {"text": "b" "label": 1}]',
            r"line 2: not valid JSON",
        ),
        ("a.parquet", "text,label\n", r"a\.parquet cannot be read"),
        ("a.tsv", "a", r"extension \.tsv, not one of \.csv, \.json, \.jsonl, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_line(tmp_path, name, content, pattern):
    (tmp_path / name).write_text(content)
    refused(lambda: load_file(str(tmp_path / name)), pattern)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_another_encoding_names_the_line(tmp_path, name):
    text = "text,label\na,0\ncafé,1\n" if name == "a.csv" else GOOD * 2 + '{"text": "café", "label": 1}\n'
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused(lambda: load_file(str(tmp_path / name)), r"line 3: not UTF-8.*iconv")


def test_a_file_that_does_not_exist(tmp_path):
    refused(lambda: load_file(str(tmp_path / "no.csv")), r"no\.csv cannot be read: .*No such file")
    (tmp_path / "folder.csv").mkdir()
    refused(lambda: load_file(str(tmp_path / "folder.csv")), r"folder\.csv cannot be read: .*Is a directory")


def test_words_that_pandas_reads_as_missing_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nNA,0\nnull,1\nNone,0\n")
    assert load_file(str(tmp_path / "a.csv")).rows["text"][:] == ["NA", "null", "None"]


@pytest.mark.parametrize("extension", ["csv", "jsonl", "json"])
@pytest.mark.parametrize(
    ("column", "value", "pattern"),
    [
        ("text", "  ", "empty text in column 'text'"),
        ("text", None, "empty text in column 'text'"),
        ("label", None, "no label in column 'label'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, extension, column, value, pattern):
    rows = [{"text": f"a{i}", "label": "pos" if i % 2 else "neg"} for i in range(4)]
    rows[2][column] = value
    file = tmp_path / f"a.{extension}"
    write(file, rows)
    place = {"csv": "line 4", "jsonl": "line 3", "json": "row 3"}[extension]
    refused(
        lambda: load_splits(TextClassification(), train_file=str(file)),
        rf"a\.{extension}, {place}: {pattern}",
    )


def test_lines_count_quoted_line_breaks_and_blank_lines(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a\nb",0\n\nc,1\nd,\n')
    refused(lambda: load_splits(TextClassification(), train_file=str(tmp_path / "a.csv")), r"line 6: no label")


def test_parquet_has_rows_instead_of_lines(tmp_path):
    file = write(tmp_path / "a.parquet", [{"text": "a", "label": 0}, {"text": "", "label": 1}])
    refused(lambda: load_splits(TextClassification(), train_file=file), r"a\.parquet, row 2: empty text")


def test_one_class_only(tmp_path):
    file = write(tmp_path / "a.csv", [{"text": "a", "label": 1}] * 3)
    refused(lambda: load_splits(TextClassification(), train_file=file), r"only one class: each 'label' is 1")


def test_a_label_missing_in_training(tmp_path):
    train, validation = reviews(), reviews()
    validation[3]["label"] = "mixed"
    files = {
        "train_file": write(tmp_path / "t.csv", train),
        "validation_file": write(tmp_path / "v.csv", validation),
    }
    refused(
        lambda: load_splits(TextClassification(), **files),
        r"v\.csv, line 5: the label 'mixed' is not in the training data \(known: 'neg', 'pos'\)",
    )


def test_mixed_numbers_and_strings_as_labels_raise(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD + GOOD + '{"text": "b", "label": "x"}\n')
    call = lambda: load_splits(TextClassification(), train_file=str(tmp_path / "a.jsonl"))  # noqa: E731
    refused(call, r"a\.jsonl, line 3: the label is 'x', but 0 in line 1")


@pytest.mark.parametrize("label", [0.5, [1]])
def test_floats_and_lists_as_labels_raise(tmp_path, label):
    file = write(tmp_path / "a.jsonl", [{"text": "a", "label": label}, {"text": "b", "label": label}])
    refused(lambda: load_splits(TextClassification(), train_file=file), r"line 1: the label .* is neither")


def test_regression_needs_numbers(tmp_path):
    file = write(tmp_path / "a.csv", [{"text": "a", "label": "1.5"}, {"text": "b", "label": "good"}])
    refused(lambda: load_splits(Regression(), train_file=file), r"line 3: the label 'good' is not a finite number")


def test_a_missing_column_names_those_found(tmp_path):
    file = write(tmp_path / "a.csv", reviews())
    task = CausalLM(prompt_column="question", completion_column="completion")
    refused(lambda: load_splits(task, train_file=file), r"no column 'question'.*text, reply.*--prompt_column text")


def test_bad_rows_can_be_left_out_and_keep_their_lines(tmp_path):
    rows = reviews()
    rows[1]["text"] = ""
    split, task = load_file(write(tmp_path / "a.csv", rows)), TextClassification()
    with pytest.warns(UserWarning, match="1 of 8 rows.*left out"):
        kept = check(task, split, skip_bad_rows=True)
    assert len(kept.rows) == 7 and kept.where(1).endswith("a.csv, line 4")


def test_a_share_is_held_out_and_the_rest_is_trained_on(tmp_path):
    file = write(tmp_path / "a.csv", [{**row, "text": f"text {i}"} for i, row in enumerate(reviews())])
    train, validation = load_splits(TextClassification(), train_file=file, validation_split="0.25")
    assert len(validation) == 2 and sorted([*train["text"], *validation["text"]]) == [f"text {i}" for i in range(8)]
    train, validation = load_splits(
        TextClassification(), train_file=file, validation_file=file, max_train_samples=3, max_eval_samples=2
    )
    assert train["text"][:] == ["text 0", "text 1", "text 2"] and len(validation) == 2


@pytest.fixture
def hub(monkeypatch):
    """The Hub is a dictionary: the names that reach ``datasets.load_dataset`` are what counts."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features)
    hidden = Dataset.from_dict({"sentence": ["a"], "label": [-1]}, features=features)
    asked = []

    def load(name, config=None, **options):
        asked.append((name, config, options))
        return DatasetDict({"train": rows, "validation": rows, "test": hidden})

    monkeypatch.setattr("datasets.load_dataset", load)
    return asked


def test_a_hub_dataset_keeps_its_own_label_names(hub):
    task = TextClassification()
    train, validation = load_splits(task, dataset_name="owner/data", dataset_config_name="small", token="t")
    assert hub[0][:2] == ("owner/data", "small") and hub[0][2]["token"] == "t"
    assert task.text_column == ("sentence",) and task.config_fields()["id2label"] == {0: "no", 1: "yes"}
    assert len(train) == len(validation) == 2


def test_a_hub_split_that_does_not_exist_or_has_no_labels(hub):
    ask = {"dataset_name": "owner/data"}
    refused(
        lambda: load_splits(TextClassification(), **ask, validation_split="dev"),
        r"no split 'dev'.*train, validation, test",
    )
    refused(
        lambda: load_splits(TextClassification(), **ask, validation_split="test"),
        r"owner/data\[test\], row 1: no label",
    )


def test_the_hub_unreachable_names_the_local_flag():
    refused(
        lambda: load_hub("nyu-mll/glue", "mrpc"),
        r"'nyu-mll/glue' cannot be loaded: Couldn't reach.*--train_file train\.csv",
    )


def test_no_data_source_or_two_raise():
    refused(lambda: load_splits(CausalLM()), r"Exactly one of --dataset_name and --train_file.*got neither")
    refused(lambda: load_splits(CausalLM(), train_file="a", dataset_name="b"), r"got both")
