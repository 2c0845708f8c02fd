"""LLaMA-Factory: the example, its command line under ``adafreeze run``, and its adapter in PEFT alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from host_cases import EXAMPLES, frozen_at, losses, run

pytest.importorskip("llamafactory", reason="LLaMA-Factory has an environment of its own: nox -s llama-factory")

EXAMPLE = EXAMPLES / "llamafactory_sft.py"
COMMAND = str(Path(sys.executable).parent / "llamafactory-cli")
STEPS = 128


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that the example has run in, and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    return folder, run(folder, str(EXAMPLE))


def test_the_example_freezes_and_looks_up(ran):
    _, text = ran
    assert "frozen: ['model.layers.0', 'model.layers.1'" in text
    assert "Prefix cache on" in text and "Step 0 of 128: 2 of 6 units are frozen" in text


def test_peft_alone_loads_the_adapter(ran):
    folder, _ = ran
    base = AutoModelForCausalLM.from_pretrained(folder / "runs/llamafactory/model").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "runs/llamafactory/adapter").eval()
        assert (adapted(ids).logits - before).abs().max() > 0.1
    assert len({name.split("layers.")[1][0] for name in adapted.state_dict() if "lora_B" in name}) == 6


def test_until_the_first_freeze_losses_of_its_command_line_are_its_own(ran, tmp_path):
    settings = json.loads((ran[0] / "runs/llamafactory/train.yaml").read_text())
    for name in ("alone", "with"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**settings, "output_dir": str(tmp_path / name)}))
    (tmp_path / "adafreeze.yaml").write_text("freeze_at_start: 0\n")
    run(tmp_path, COMMAND, "train", "alone.yaml")
    run(tmp_path, "-m", "adafreeze", "run", "--config", "adafreeze.yaml", COMMAND, "train", "with.yaml")
    frozen = frozen_at(tmp_path / "with")
    alone, own = losses(tmp_path / "alone"), losses(tmp_path / "with")
    assert len(alone) == STEPS and 0 < min(frozen) < STEPS
    assert own[: min(frozen)] == alone[: min(frozen)] and own != alone
