"""Every script of examples/, run as its reader would run it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
OF_HOSTS = {"axolotl.yaml", "ms_swift_plugin.py", "tiny_llama.py"}  # tests/hosts runs these
FILES = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
SCRIPTS = sorted(FILES - OF_HOSTS)
NEEDS = {
    "lightning_trainer.py": "lightning",
    "llamafactory_sft.py": "llamafactory",
    "sentence_transformers_pairs.py": "sentence_transformers",
    "setfit_texts.py": "setfit",
    "trl_sft.py": "trl",
}
LAUNCH = {"accelerate_loop.py": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs_and_something_freezes(script, tmp_path):
    if script in NEEDS and importlib.util.find_spec(NEEDS[script]) is None:
        pytest.skip(f"needs {NEEDS[script]}")
    call = [sys.executable, *LAUNCH.get(script, []), str(EXAMPLES / script)]
    done = subprocess.run(
        call, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = re.search(r"^frozen: \[(.+)\]$", done.stdout, re.MULTILINE)
    assert said, done.stdout
    assert 1 <= said[1].count(",") + 1 < 6
    if script in LAUNCH:
        assert "processes: 2" in done.stdout


def test_each_is_in_the_list():
    assert set(re.findall(r"^\| `(\w+\.\w+)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == FILES
