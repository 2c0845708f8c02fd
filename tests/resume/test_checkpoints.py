"""Checkpoints of the Trainer that were not written to their end, or changed since."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import Trainer, TrainingArguments

import cases
from adafreeze import RunError, SafeCallback, SafeConfig
from adafreeze.integrations.checkpoints import check_checkpoint, last_checkpoint
from adafreeze.train.output import find_checkpoint


def trainer(folder, *callbacks):
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4,
        max_steps=6, save_strategy="steps", save_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    return Trainer(
        model=cases.lora_model("llama"),
        args=args,
        train_dataset=cases.Samples("llama", 16, length=12),
        data_collator=cases.collate,
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The output folder of a run of six steps, with three checkpoints."""
    folder = tmp_path_factory.mktemp("written")
    trainer(folder, SafeCallback(SafeConfig(cache="off"))).train()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def garble(path):
    path.write_bytes(b"\x80\x04\xff\x00")


def put_a_list(path):
    path.write_text("[1, 2]")


@pytest.mark.parametrize("damage", [cut, remove, garble, put_a_list])
def test_a_checkpoint_without_an_end_is_named_and_passed_over(folder, damage, caplog):
    newest = folder / "checkpoint-6"
    damage(newest / "trainer_state.json")
    with pytest.raises(RunError, match=r"checkpoint-6 is not a checkpoint: its trainer_state\.json .+"):
        check_checkpoint(newest)
    with pytest.raises(RunError, match="checkpoint-6 is not a checkpoint"):
        find_checkpoint(str(newest), str(folder))
    with caplog.at_level("INFO", logger="adafreeze"):
        assert last_checkpoint(folder) == str(folder / "checkpoint-4")
        assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-4")
    assert "Skipped: " in caplog.text and "checkpoint-6" in caplog.text


def test_of_no_whole_checkpoint_a_run_can_start_anew(folder):
    for place in folder.glob("checkpoint-*"):
        cut(place / "trainer_state.json")
    (folder / "checkpoint-final").mkdir()  # no number of the Trainer's
    assert last_checkpoint(folder) is None and last_checkpoint(folder / "nowhere") is None
    with pytest.raises(RunError, match="no checkpoint"):
        find_checkpoint("last", str(folder))


def resumed(folder, edit):
    """The model of a Trainer that resumed from the first checkpoint, its ``trainer_state.json`` edited."""
    path = folder / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    edit(state["stateful_callbacks"])
    path.write_text(json.dumps(state))
    host = trainer(folder, SafeCallback(SafeConfig(cache="off")))
    before = {name: module.forward for name, module in host.model.named_modules()}
    try:
        host.train(resume_from_checkpoint=str(path.parent))
    finally:
        assert {name: module.forward for name, module in host.model.named_modules()} == before
        assert not any(module._forward_hooks for module in host.model.modules())
    return host


def change_a_score(callbacks):
    callbacks["SafeCallback"]["attributes"]["saved"]["deciding"]["scores"]["model.layers.0"] = 0.5


def rename_the_attributes(callbacks):
    callbacks["SafeCallback"]["attributez"] = callbacks["SafeCallback"].pop("attributes")


def put_text(callbacks):
    callbacks["SafeCallback"] = "text"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (change_a_score, "does not match its checksum"),
        (rename_the_attributes, "without a version"),
        (put_text, "without a version"),
    ],
)
def test_an_edited_state_is_refused_and_the_model_left_alone(folder, edit, told):
    with pytest.raises(RunError, match=told):
        resumed(folder, edit)


def test_of_a_checkpoint_without_adafreeze_one_line_says_that_measuring_starts_there(folder, caplog):
    with caplog.at_level("INFO", logger="adafreeze"):
        host = resumed(folder, lambda callbacks: callbacks.pop("SafeCallback"))
    assert "is from a run without adafreeze" in caplog.text and host.state.global_step == 6
