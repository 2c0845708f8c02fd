"""``adafreeze cache``: list, info, fill, prune and delete."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from adafreeze.cli.main import main
from adafreeze.journal import read_journal
from text_cases import WORDS, save_bert, write


def texts(count):
    """Distinct texts of four to nine words, and labels."""
    chosen = [
        [WORDS[(index // 20**place) % 20] for place in range(3)] + ["film"] * (1 + index % 6) for index in range(count)
    ]
    return [{"text": " ".join(words), "label": index % 2} for index, words in enumerate(chosen)]


@pytest.fixture
def cache(tmp_path, capsys):
    """``cache(command, *flags)``: exit code, what was printed, and what was printed as error."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        folder = "--prefix_cache_dir" if words[0] in ("fill", "train") else "--cache_dir"
        words = words if words[0] == "train" else ("cache", *words)
        code = main([*words, folder, str(tmp_path / "states")])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def flags(tmp_path):
    """Of a small run."""
    model = save_bert(tmp_path / "model", layers=4)
    rows = write(tmp_path / "rows.csv", texts(24))
    return [
        *("--model_name_or_path", model, "--train_file", str(rows), "--task", "text-classification"),
        *("--freeze_at_start", "0.5", "--per_device_train_batch_size", "4", "--num_train_epochs", "2"),
        *("--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--max_seq_length", "16"),
    ]


def event(folder, name):
    return next(event for event in read_journal(folder / "journal.jsonl") if event["event"] == name)


def test_fill_then_train_then_delete(cache, flags, tmp_path):
    assert cache("list")[:2] == (0, f"No states are kept in {tmp_path / 'states'}.\n")
    code, _, text = cache("fill", *flags)
    assert code == 0 and "filling the prefix cache" in text
    found = json.loads(cache("list", "--json")[1])
    assert len(found) == 1 and found[0]["samples"] == 24 and found[0]["depths"] == {"bert.encoder.layer": 2}
    code, listed, _ = cache("list")
    assert re.search(rf"{found[0]['id'][:8]}.*│ +2 │ +24 │", listed) and "in all" in listed

    out = tmp_path / "out"
    code, _, text = cache("train", *flags, "--output_dir", str(out), "--keep_cache", "--learning_rate", "1e-3")
    assert code == 0, text
    # The first batch of the first run shows whether the loss reads padding.
    assert event(out, "cache")["misses"] <= 4 and event(out, "cache_kept")["samples"] == 24

    code, shown, _ = cache("info", found[0]["id"][:6])
    assert json.loads(shown)["id"] == found[0]["id"] and not json.loads(shown)["in_use"]
    assert "24 samples" not in cache("prune", "--unused_days", "1")[1]
    assert len(json.loads(cache("list", "--json")[1])) == 1
    assert cache("prune", "--max_size", "1KiB")[1].startswith("Deleted")
    assert json.loads(cache("list", "--json")[1]) == []
    assert not list((tmp_path / "states").glob("states-*"))


def test_filling_again_computes_nothing(cache, flags, caplog):
    cache("fill", *flags)
    cache("fill", *flags)
    assert "24 states were stored, 0 are new" in caplog.text


@pytest.mark.slow
def test_under_torchrun_each_process_fills_its_share(cache, flags, tmp_path, caplog):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "adafreeze", "cache", "fill", *flags, "--prefix_cache_dir", str(tmp_path / "states")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Batches of 16, four times those of training: one each.
    assert "filled by rank 0 of 2: 0 states were stored, 16 are new" in done.stderr
    assert json.loads(cache("list", "--json")[1])[0]["samples"] == 24
    cache("fill", *flags)
    assert "24 states were stored, 0 are new" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["delete"], "needs an ID, or --all"),
        (["delete", "abc"], "There is no ID that begins with 'abc'"),
        (["info", "abc"], "There is no ID that begins with 'abc'"),
        (["prune"], "prune has no limit"),
        (["prune", "--max_size", "many"], "--max_size is 'many'"),
    ],
)
def test_what_cannot_be_done_is_named(cache, words, message):
    code, _, text = cache(*words)
    assert code == 2 and message in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--freeze_at_start", "0"], "No block is frozen from step 0"),
        (["--method", "none"], "Without freezing there is no prefix"),
        (["--prefix_cache_budget", "260KiB", "--train_file", "many"], "cache_budget is 260 KiB"),
        (["--prefix_dropout"], "prefix_dropout=True makes the prefix's output random"),
    ],
)
def test_what_cannot_be_filled_is_named_before_computing(cache, flags, more, message, tmp_path):
    if "many" in more:
        more[-1] = str(write(tmp_path / "many.csv", texts(600)))
    code, _, text = cache("fill", *flags, *more)
    assert code == 2 and message in " ".join(text.split())


def test_a_folder_that_cannot_keep_the_states_is_named_before_computing(flags, capsys):
    assert main(["cache", "fill", *flags, "--prefix_cache_dir", "/proc/states"]) == 2
    assert "The states of this model cannot be kept: the folder cannot be used" in " ".join(
        capsys.readouterr()[1].split()
    )
