import platform
import subprocess
import sys
from importlib import metadata

import torch

from adafreeze import __version__
from adafreeze.env import environment


def test_what_is_installed_is_named_with_its_version():
    found = environment()
    assert found["adafreeze"] == __version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["peft"] == metadata.version("peft")
    assert found["device"]
    assert all(isinstance(value, str) for value in found.values())


def test_what_is_missing_is_left_out(monkeypatch):
    def version(name):
        if name == "torch":
            return "9.9"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert list(environment()) == ["adafreeze", "python", "platform", "torch", "device"]


def test_no_optional_package_is_imported_to_learn_its_version():
    code = (
        "import sys; from adafreeze.env import environment; before = set(sys.modules); environment();"
        "print({m.split('.')[0] for m in set(sys.modules) - before} & {'trl', 'lightning', 'deepspeed', 'lmdb'})"
    )
    assert _run("-c", code).strip() == "set()"


def test_the_command_prints_a_table():
    lines = _run("-m", "adafreeze.env").splitlines()
    assert lines[:2] == ["| what | version |", "|---|---|"]
    assert f"| adafreeze | {__version__} |" in lines


def _run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
