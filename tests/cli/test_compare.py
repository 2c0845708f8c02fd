"""The command from end to end: methods × seeds on a tiny BERT, interrupted, continued, and with bad input."""

from __future__ import annotations

import json
import linecache
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from adafreeze.cli.main import main
from adafreeze.journal import read_journal
from adafreeze.methods.method import _source
from adafreeze.train import Arguments, compare
from text_cases import reviews, write

OWN = """
from adafreeze.methods.plain import Plain
from adafreeze.methods.safe import Safe

class Frugal(Safe):
    name = "frugal"
    fields = {"min_live_blocks": 2}

class Broken(Plain):
    name = "broken"

    def configure(self, setup):
        raise KeyboardInterrupt
"""


@pytest.fixture
def task(bert, tmp_path):
    data, path = write(tmp_path / "rows.csv", reviews(8)), tmp_path / "reviews.yaml"
    path.write_text(
        f"task: text-classification\nmodel_name_or_path: {bert}\ntrain_file: {data}\nvalidation_file: {data}\n"
        "max_steps: 8\nper_device_train_batch_size: 4\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def test_a_table_of_methods_with_what_does_not_fit_in_it(task, folder, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    methods = ["top-blocks", "plain", "safe", f"{tmp_path / 'own.py'}:Frugal", "lora-fa"]
    assert main(["compare", task, "--methods", *methods, "--seeds", "0", "1", "--output_dir", str(folder),
                 "--adapter", "vera"]) == 0  # fmt: skip
    found = json.loads((folder / "compare.json").read_text())
    assert found["reference"] == "plain"
    assert found["metrics"] == {"reviews": "accuracy"}
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["plain", "safe", "frugal", "lora-fa", "top-blocks"]
    assert [rows[name]["seeds"] for name in ("plain", "safe", "frugal")] == [2, 2, 2]
    assert rows["plain"]["difference"] is None
    assert rows["safe"]["difference"]["count"] == 2
    assert rows["frugal"]["frozen"] == 0  # of two blocks both stay live
    assert "kind of LoRA" in rows["lora-fa"]["reason"]
    assert {outcome["seed"] for outcome in found["outcomes"]} == {0, 1}
    printed = capsys.readouterr().out
    assert "not run, lora-fa" in printed
    assert "frugal" in printed
    assert (folder / "reviews" / "safe" / "seed-1" / "adapter_config.json").exists()


def test_an_interrupted_table_continues_without_repeating_or_losing_a_cell(task, folder, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    call = ["compare", task, "--output_dir", str(folder), "--seeds", "0"]
    assert main([*call, "--methods", "plain", f"{tmp_path / 'own.py'}:Broken", "safe"]) == 130
    plain = folder / "reviews" / "plain" / "seed-0" / "outcome.json"
    before = plain.read_bytes(), plain.stat().st_mtime_ns
    assert not (folder / "reviews" / "safe").exists()
    capsys.readouterr()
    assert main([*call, "--methods", "plain", "safe"]) == 0
    printed = capsys.readouterr().out
    assert "[2/2] reviews · safe · seed 0" in printed
    assert "· plain ·" not in printed
    assert (plain.read_bytes(), plain.stat().st_mtime_ns) == before
    assert main([*call, "--methods", "plain", "safe"]) == 0
    assert "reviews ·" not in capsys.readouterr().out


def test_a_cell_of_a_changed_method_is_not_reused(task, folder, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    call = ["compare", task, "--output_dir", str(folder), "--seeds", "0", "--methods", "plain", f"{own}:Frugal"]
    assert main(call) == 0
    assert json.loads((folder / "reviews" / "frugal" / "seed-0" / "outcome.json").read_text())["made_by"]
    own.write_text(OWN.replace('"min_live_blocks": 2', '"min_live_blocks": 1'))
    linecache.clearcache()  # as a new process would
    _source.cache_clear()
    assert main(call) == 2
    assert "The code of the method 'frugal'" in capsys.readouterr().err


def test_all_methods_get_the_same_data_in_the_same_order(task, folder):
    main(["compare", task, "--methods", "plain", "safe", "--seeds", "3", "--output_dir", str(folder),
          "--logging_steps", "1", "--freeze_share", "0"])  # fmt: skip
    journals = [read_journal(folder / "reviews" / method / "seed-3" / "journal.jsonl") for method in ("plain", "safe")]
    plain, safe = ([event["loss"] for event in journal if "loss" in event] for journal in journals)
    assert plain == safe and len(plain) == 8


def test_a_cell_that_another_process_trains_is_awaited(task, folder, monkeypatch):
    cell = folder / "reviews" / "plain" / "seed-0"
    cell.mkdir(parents=True)
    lock, waited = FileLock(cell / ".lock"), []

    def sleep(seconds):
        waited.append((cell / "journal.jsonl").exists())
        lock.release()

    monkeypatch.setattr("adafreeze.train.grid.time.sleep", sleep)
    lock.acquire()
    assert main(["compare", task, "--methods", "plain", "--seeds", "0", "--output_dir", str(folder)]) == 0
    assert waited == [False]
    assert (cell / "outcome.json").exists()


def test_cells_with_other_settings_are_not_mixed(task, folder, capsys):
    call = ["compare", task, "--methods", "plain", "--seeds", "0", "--output_dir", str(folder)]
    assert main(call) == 0
    assert main([*call, "--learning_rate", "0.5"]) == 2
    assert "learning_rate" in capsys.readouterr().err
    outcome = folder / "reviews" / "plain" / "seed-0" / "outcome.json"
    whole = outcome.read_text()
    outcome.write_text(whole.replace('"SafeConfig.probe_tokens": 2048', '"SafeConfig.probe_tokens": 1024'))
    assert main(call) == 2  # of a version with other defaults
    assert "SafeConfig.probe_tokens was 1024, and is 2048" in capsys.readouterr().err
    outcome.write_text(whole[:40])
    assert main(call) == 2
    assert "Remove" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "sage"], "'sage'"),
        (["--methods", "top-blocks", "plain"], "needs the result of 'safe'"),
        (["--methods", "plain", "--reference", "safe"], "is not compared"),
        (["--learning_rat", "1"], "--learning_rate"),
        (["--freeze_share", "7"], "freeze_share"),
        (["--method", "safe"], "--methods"),
        (["--metric", "bleu", "--methods", "plain", "--seeds", "0"], "accuracy"),
    ],
)
def test_bad_flags(task, folder, flags, message, capsys):
    assert main(["compare", task, "--output_dir", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_task_needs_something_to_be_compared_on(task, folder, tmp_path, capsys):
    bare = tmp_path / "bare.yaml"
    lines = Path(task).read_text().splitlines(keepends=True)
    bare.write_text("".join(line for line in lines if not line.startswith("validation")))
    assert main(["compare", str(bare), "--output_dir", str(folder)]) == 2
    assert "--validation_split" in capsys.readouterr().err
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "reviews.yaml").write_text(Path(task).read_text())
    assert main(["compare", task, str(tmp_path / "twice" / "reviews.yaml"), "--output_dir", str(folder)]) == 2
    assert "Two tasks are named" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "nowhere.yaml"), "--output_dir", str(folder)]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_script_compares_without_the_command_line(task, folder):
    settings = yaml.safe_load(Path(task).read_text())
    arguments = Arguments.of(**settings, output_dir=folder, report_to="none", save_strategy="no")
    found = compare({"reviews": arguments}, ["plain", "safe"], seeds=[0], output_dir=str(folder))
    assert [(row.method, row.seeds) for row in found.rows] == [("plain", 1), ("safe", 1)]
    assert found.metrics == {"reviews": "accuracy"} and found.reference == "plain"
    assert (folder / "reviews" / "safe" / "seed-0" / "adapter_config.json").exists()
