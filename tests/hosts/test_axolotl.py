"""Axolotl's own command on examples/axolotl.yaml, and the plugin by itself."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from adafreeze import AdafreezeWarning
from host_cases import EXAMPLES, frozen_at, losses, run, trained_blocks

pytest.importorskip("axolotl")

from adafreeze.integrations import axolotl

OTHER = """
from adafreeze import SafeCallback
from axolotl.integrations.base import BasePlugin

class Other(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        return [SafeCallback({"freeze": ["model.layers.0"], "cache": "off"}, journal="other.jsonl")]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the model, the rows, and an adapter to start from, because Axolotl does not seed a new one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("axolotl")
    run(folder, str(EXAMPLES / "tiny_llama.py"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/tiny_llama")
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    get_peft_model(model, config).save_pretrained(folder / "runs/start")
    return folder


@pytest.fixture
def train(folder):
    """``train(**changes)``: ``axolotl train`` on the example with changed keys; output folder and text."""
    output = folder / "runs/axolotl"

    def call(fails: bool = False, before: tuple[str, ...] = ("-m",), **changes):
        config = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text()) | changes
        (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
        shutil.rmtree(output, ignore_errors=True)
        words = (*before, "axolotl.cli.main", "train", "config.yaml", "--launcher", "python")
        return output, run(folder, *words, fails=fails)

    return call


@pytest.mark.parametrize("packing", [{}, {"sample_packing": True, "multipack_real_batches": False}])
def test_losses_are_those_of_axolotl_alone_until_the_first_freeze(train, packing):
    changes = {"lora_model_dir": "runs/start", "num_epochs": 5, **packing}
    alone = losses(train(plugins=None, adafreeze=None, **changes)[0])
    output, _ = train(adafreeze={"freeze_at_start": 0}, **changes)
    ours, first = losses(output), min(frozen_at(output))
    assert 0 < first < len(alone) and ours[:first] == alone[:first] and ours != alone


def test_the_example_freezes_and_logs_and_peft_loads_its_adapter(train, folder):
    output, text = train()
    assert frozen_at(output)[0] == 3
    assert "[axolotl.adafreeze] Step 0 of 128: 3 of 6 units are frozen (freeze_at_start)" in text
    assert text.count("(freeze_at_start)") == 1
    assert trained_blocks(folder / "runs/tiny_llama", output) == {3, 4, 5}


def test_packed_documents_are_found_again_in_the_next_epoch(train):
    output, text = train(sample_packing=True, multipack_real_batches=False)
    assert "Prefix cache on: 3.33 epochs" in text
    assert "no attention_mask" not in text
    from adafreeze.journal import read_journal

    assert next(e for e in read_journal(output / "journal.jsonl") if e["event"] == "cache")["hits"] > 100


def test_an_empty_key_means_the_defaults_and_a_callback_of_another_plugin_is_used(train, folder):
    (folder / "other_plugin.py").write_text(OTHER)
    plugins = ["adafreeze.integrations.axolotl.AdafreezePlugin", "other_plugin.Other"]
    output, text = train(adafreeze={}, plugins=plugins, max_steps=2)
    assert "[axolotl.adafreeze] The Trainer already has a SafeCallback, which is used" in text
    assert "1 of 6 units are frozen" in text and "2 of 6 units" not in text
    assert (folder / "other.jsonl").exists() and not (output / "journal.jsonl").exists()


def test_an_unknown_field_is_refused_when_the_config_is_validated(train):
    _, text = train(fails=True, adafreeze={"freeze_at_strt": 0.5})
    assert "SafeConfig has no field 'freeze_at_strt'" in text and "Did you mean 'freeze_at_start'?" in text
    assert "Loading raw datasets" not in text and "Traceback" in text


@pytest.mark.parametrize("given", [None, {}, {"freeze_at_start": 0.5, "freeze": ["a"]}])
def test_the_key_takes_fields_of_safe_config(given):
    assert axolotl.AdafreezeArgs(adafreeze=given).adafreeze == given


@pytest.mark.parametrize("given", [{"freeze_at_start": 2}, {"nothing": 1}, 0.5, ["freeze"]])
def test_the_key_refuses_all_else(given):
    with pytest.raises(ValueError, match="adafreeze"):
        axolotl.AdafreezeArgs(adafreeze=given)


def test_a_version_that_was_not_tried_is_named(monkeypatch):
    monkeypatch.setattr(axolotl, "TRIED", ("0.1", "0.2"))
    with pytest.warns(AdafreezeWarning, match=r"Axolotl \S+ is installed.* tried with 0\.1, 0\.2 only"):
        axolotl.AdafreezePlugin().register({})
