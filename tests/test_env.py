import subprocess
import sys

import torch

from adafreeze.env import environment


def test_versions_are_those_installed():
    found = environment()
    assert found["torch"] == torch.__version__ and "peft" in found and "device" in found
    assert "not-a-package" not in found


def test_the_module_prints_a_list_to_paste():
    printed = subprocess.run([sys.executable, "-m", "adafreeze.env"], capture_output=True, text=True, check=True).stdout
    assert "- adafreeze: " in printed and "- torch: " in printed
