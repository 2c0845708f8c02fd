"""``adafreeze run``: scripts that know nothing of adafreeze."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adafreeze import AdafreezeWarning
from adafreeze.cli.main import main
from adafreeze.integrations import script
from adafreeze.journal import read_journal
from text_cases import write

SCRIPT = """
import argparse, json, sys
from pathlib import Path
import cases
from transformers import Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--trainers", type=int, default=1)
parser.add_argument("--output_dir", default="out")
parser.add_argument("--own", action="store_true")
parser.add_argument("--idle", action="store_true")
options = parser.parse_args()
losses = []
for _ in range(options.trainers):
    args = TrainingArguments(
        output_dir=options.output_dir, use_cpu=True, report_to=[], max_steps=12, logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=4, save_strategy="no", learning_rate=1e-2,
    )
    callbacks = []
    if options.own:
        from adafreeze import SafeCallback, SafeConfig
        callbacks = [SafeCallback(SafeConfig(freeze_at_start=0.5))]
    trainer = Trainer(
        cases.lora_model("llama"), args, train_dataset=cases.Samples("llama", 16), data_collator=cases.collate,
        callbacks=callbacks,
    )
    if not options.idle:
        trainer.train()
        trainer.save_model()
    losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
Path("losses.json").write_text(json.dumps(losses))
if options.config:
    sys.exit(options.config)
"""


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """``execute(*words)``: ``adafreeze run`` in a folder with script.py; its exit code and the script's losses."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def run(*words: str, command: Callable[..., int] = main) -> tuple[int, list[list[float]]]:
        code = command(["run", *words])
        losses = tmp_path / "losses.json"
        return code, json.loads(losses.read_text()) if losses.exists() else []

    return run


def frozen_at(folder: Path, journal: str = "journal.jsonl") -> dict[int, int]:
    return {e["step"]: len(e["units"]) for e in read_journal(folder / journal) if e["event"] == "freeze"}


def test_losses_are_those_of_the_script_alone_until_the_first_freeze(execute, tmp_path):
    _, (alone,) = execute("script.py", command=lambda words: script.run(words[1], words[2:]))
    (tmp_path / "adafreeze.yaml").write_text("freeze_at_start: 0\n")
    code, (losses,) = execute("--config", "adafreeze.yaml", "script.py")
    assert code == 0
    first = min(frozen_at(tmp_path / "out"))
    assert 0 < first < 12 and losses[:first] == alone[:first] and losses != alone
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_two_trainers_have_a_callback_and_a_journal_each_and_the_script_its_own_config(execute, tmp_path):
    (tmp_path / "adafreeze.yaml").write_text("freeze_at_start: 0.5\n")
    with pytest.raises(SystemExit, match="its own"):
        execute("--config", "adafreeze.yaml", "-m", "script", "--trainers", "2", "--config", "its own")
    one, other = json.loads((tmp_path / "losses.json").read_text())
    assert one == other
    for journal in ("journal.jsonl", "2-journal.jsonl"):
        assert frozen_at(tmp_path / "out", journal)[0] == 2


def test_a_callback_of_the_script_is_used(execute, tmp_path, caplog):
    code, _ = execute("script.py", "--own")
    assert code == 0
    assert "a SafeCallback of its own, which is used" in caplog.text
    assert "2 of 4 units are frozen (freeze_at_start)" in caplog.text
    assert not (tmp_path / "out" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--trainers", "0"], "script.py made no Trainer of transformers in this process, so nothing froze."),
        (["--idle"], "script.py made 1 Trainer and trained none, so nothing froze."),
    ],
)
def test_a_script_that_trains_nothing_is_told_so(execute, flags, text):
    with pytest.warns(AdafreezeWarning, match=text):
        assert execute("script.py", *flags)[0] == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["absent.py"], "There is no script absent.py"),
        (["-m", "absent.module"], "There is no module absent.module that can be run"),
        (["-m", "tests"], "There is no module tests that can be run"),
        (["bash"], "The command bash .* is not a Python script"),
        (["--conf", "a.yaml", "script.py"], "Unknown: --conf.*Did you mean --config"),
        (["--config", "absent.yaml", "script.py"], "The file absent.yaml of --config cannot be read"),
        (["--config"], "expected one argument"),
        (["-m"], "required: script.py"),
    ],
)
def test_bad_input(words, text, capsys):
    argv, path = list(sys.argv), list(sys.path)
    assert main(["run", *words]) == 2
    assert re.search(text, capsys.readouterr().err, re.DOTALL)
    assert (sys.argv, sys.path) == (argv, path)


@pytest.mark.parametrize("line", ["freeze_at_strt: 0.5", "freeze_at_start: 2"])
def test_bad_settings(line, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(line)
    assert main(["run", "--config", str(tmp_path / "a.yaml"), "script.py"]) == 2
    error = capsys.readouterr().err
    assert "freeze_at_start" in error and "Fix: " in error


@pytest.mark.slow
def test_two_processes(execute, tmp_path):
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29621")
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [*launch, "-m", "adafreeze", "run", "script.py"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [e["event"] for e in read_journal(tmp_path / "out" / "journal.jsonl")].count("start") == 1


def test_trl_sft(execute, llama, tmp_path):
    rows = [{"text": f"the film was {word} and the plot was {word}"} for word in ("good", "bad", "fine", "long")] * 2
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", rows)
    flags = f"--model_name_or_path {llama} --dataset_name data --output_dir out --use_peft"
    more = "--lora_target_modules q_proj v_proj --max_steps 12 --use_cpu --report_to none --save_strategy no"
    code, _ = execute("-m", "trl.scripts.sft", *flags.split(), *more.split(), "--bf16", "false", "--max_length", "16")
    assert code == 0
    assert frozen_at(tmp_path / "out") and (tmp_path / "out" / "adapter_config.json").is_file()
