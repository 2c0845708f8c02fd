"""ms-swift's own command with examples/ms_swift_plugin.py."""

from __future__ import annotations

import shlex

import pytest

from host_cases import EXAMPLES, frozen_at, losses, run, trained_blocks

pytest.importorskip("swift")

PLUGIN = (EXAMPLES / "ms_swift_plugin.py").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    run(folder, str(EXAMPLES / "tiny_llama.py"))
    return folder


def command() -> list[str]:
    """The words after ``swift`` in the example's docstring."""
    return shlex.split(PLUGIN.split("    swift ")[1].split("\n\n")[0].replace("\\\n", " "))


@pytest.fixture
def train(folder):
    """``train(name, plugin, *flags)``: ``swift sft`` with the example's flags; output folder and text."""

    def call(name: str, plugin: str | None, *flags: str):
        words = command()
        if plugin is None:
            words = [word for word in words if word not in ("--callbacks", "adafreeze")]
        (folder / "plugin.py").write_text(plugin or "")
        words[words.index("--external_plugins") + 1] = "plugin.py"
        words[words.index("--output_dir") + 1] = name
        return folder / name, run(folder, "-m", "swift.cli.main", *words, *flags)

    return call


def test_losses_are_those_of_swift_alone_until_the_first_freeze(train):
    alone = losses(train("alone", None)[0])
    output, _ = train("ours", PLUGIN.replace("SafeConfig()", "SafeConfig(freeze_at_start=0)"))
    ours, first = losses(output), min(frozen_at(output))
    assert 0 < first < len(alone) and ours[:first] == alone[:first] and ours != alone


def test_the_example_freezes_and_logs_and_peft_loads_its_adapter(train, folder):
    output, text = train("half", PLUGIN.replace("SafeConfig()", "SafeConfig(freeze_at_start=0.5)"))
    assert frozen_at(output)[0] == 3
    assert text.count("[adafreeze] Step 0 of 128: 3 of 6 units are frozen (freeze_at_start)") == 1
    assert trained_blocks(folder / "runs/tiny_llama", output / "checkpoint-128") == {3, 4, 5}
