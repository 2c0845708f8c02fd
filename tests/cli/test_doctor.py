"""``adafreeze doctor``: what it finds in a model and in a script, and that it trains nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from adafreeze import Safe
from adafreeze.cli.main import main

SCRIPT = """
import sys
from pathlib import Path
from transformers import Trainer, TrainingArguments
import cases
from adafreeze import SafeCallback, SafeConfig

{before}
model = cases.lora_model("llama", **{lora})
args = TrainingArguments(
    output_dir=str(Path(__file__).parent / "out"), use_cpu=True, report_to=[], num_train_epochs=3, **{arguments}
)
data = cases.Samples("llama", 32)
callbacks = [SafeCallback(SafeConfig({settings}))]
trainer = Trainer(model, args, train_dataset=data, data_collator=cases.collate, callbacks=callbacks)
trainer.train()
Path(__file__).with_name("trained").touch()
"""


@pytest.fixture
def doctor(monkeypatch, capsys):
    """``doctor(*words)``: exit code, what was found by its name, all that was printed, and the error."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words: str) -> tuple[int, dict[str, tuple[str, str]], str, str]:
        code = main(["doctor", *words])
        text, error = capsys.readouterr()
        rows = re.findall(r"^│ (.*?) *│ (.*?) *│ (.*?) *│$", text, re.MULTILINE)
        return code, {what: (verdict, found) for what, verdict, found in rows}, text, error

    return run


@pytest.fixture
def script(tmp_path):
    """``script(...)``: the path of a training script."""

    def write(before: str = "", lora: str = "{}", arguments: str = "{}", settings: str = "") -> str:
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(before=before, lora=lora, arguments=arguments, settings=settings))
        return str(path)

    return write


def test_a_configuration_is_enough(doctor, llama):
    code, found, text, _ = doctor(str(Path(llama) / "config.json"), "--adapter_r", "4", "--adapter_dropout", "0")
    assert code == 0
    assert found["model"] == ("ok", "LlamaForCausalLM; blocks: model.layers (2)")
    assert found["adapters"][1].startswith("2 units of LORA, ")
    assert found["frozen prefix"][0] == "ok" and found["checkpointing"] == ("ok", "off")
    assert found["adapter dropout"] == ("ok", "none")
    assert found["PEFT"][0] == "ok"
    assert "prefix cache" not in found, "it depends on the run"
    assert re.search(r"Versions: adafreeze .*torch 2", text)


def test_what_trains_below_the_blocks_is_found(doctor, llama):
    options = '{"modules_to_save": ["embed_tokens"]}'
    _, found, _, _ = doctor(llama, "--adapter_kwargs", options)
    assert found["frozen prefix"][0] == "costs" and "without 'embed_tokens'" in found["frozen prefix"][1]
    assert "embed_tokens" in found["adapters"][1]


def test_a_script_is_ended_before_its_first_step(doctor, script, tmp_path):
    path, before = list(sys.path), list(sys.argv)
    code, found, _, _ = doctor(script())
    assert code == 0
    assert not (tmp_path / "trained").exists() and not list(tmp_path.glob("out/checkpoint*"))
    assert found["processes"] == ("ok", "one process, no wrapper")
    assert found["prefix cache"] == ("ok", "on")
    assert found["probe"][1].startswith("32 samples, 368 tokens")
    assert found["run"] == ("ok", "12 optimizer steps, settings all default")
    assert (sys.path, sys.argv) == (path, before)
    assert Safe.on_made == []


def test_what_is_arranged_and_what_costs_is_found(doctor, script):
    arguments = "{'gradient_checkpointing': True, 'gradient_checkpointing_kwargs': {'use_reentrant': True}}"
    settings = "prefix_dropout=True, memory_budget='3GiB'"
    _, found, _, _ = doctor(script(lora="{'lora_dropout': 0.2}", arguments=arguments, settings=settings))
    assert found["checkpointing"][0] == "arranged" and "reentrant" in found["checkpointing"][1]
    assert found["input gradients"][0] == "arranged"
    assert found["adapter dropout"][0] == "costs" and found["adapter dropout"][1].startswith("0.2: ")
    assert found["prefix cache"] == ("costs", "off: prefix_dropout=True makes the prefix's output random")
    assert found["memory budget"] == ("ok", "3.00 GiB from the first step")
    assert "prefix_dropout=True" in found["run"][1] and "memory_budget='3GiB'" in found["run"][1]


LOOP = """
import torch, cases
from adafreeze import Safe
model = cases.lora_model("llama")
{compile}
Safe(model, probe=cases.loader("llama"), total_steps=9)
"""


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("model = torch.compile(model, backend='aot_eager')", "the whole model"),
        ("for b in model.get_base_model().model.layers: b.compile(backend='aot_eager')", "4 modules"),
    ],
)
def test_a_compiled_model_is_found(doctor, tmp_path, line, parts):
    (tmp_path / "loop.py").write_text(LOOP.format(compile=line))
    code, found, _, _ = doctor(str(tmp_path / "loop.py"))
    assert code == 0
    assert found["torch.compile"] == ("arranged", f"{parts}; each freeze recompiles what it changes")


def test_a_script_gets_its_own_arguments(doctor, script, tmp_path):
    said = "Path(__file__).with_name('said').write_text(' '.join(sys.argv[1:]))"
    assert doctor(script(before=said), "--epochs", "3")[0] == 0
    assert (tmp_path / "said").read_text() == "--epochs 3"


def test_an_error_of_safe_is_printed(doctor, script):
    code, _, _, error = doctor(script(settings="freeze=['model.layers.9']"))
    assert code == 2 and "'model.layers.9' to freeze; the units of this model are" in error


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("1 / 0", r"failed in line 8, .*ZeroDivisionError: division by zero\n"),
        ("import no_such_package", r"failed in line 8, .*No module named 'no_such_package'\n"),
        ("print(", r"failed in line 8, .*SyntaxError: .*\n"),
        ("sys.exit()", "ended without a Safe"),
    ],
)
def test_a_script_that_makes_no_safe(doctor, script, before, said):
    path = script(before=before)
    code, found, _, error = doctor(path)
    assert code == 2 and not found
    assert re.search(said, error), error


def test_a_script_that_ends_with_an_error_of_its_own_keeps_it(doctor, script):
    with pytest.raises(SystemExit) as ended:
        doctor(script(before="sys.exit(7)"))
    assert ended.value.code == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.py"], "There is no script nowhere.py"),
        (["nowhere"], "nowhere"),
        (["--adapter", "lora"], "--adapter stands before the model or script"),
    ],
)
def test_missing_models_and_scripts(doctor, words, said):
    code, found, _, error = doctor(*words)
    assert code == 2 and not found and said in error and "Fix:" in error


def test_an_unknown_task(doctor, llama):
    code, _, _, error = doctor(llama, "--task", "poetry")
    assert code == 2 and "--task" in error and "poetry" in error


def test_help(doctor):
    code, _, text, _ = doctor("--help")
    assert code == 0 and text.startswith("usage: adafreeze doctor MODEL")
