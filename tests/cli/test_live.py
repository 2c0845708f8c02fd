"""The live view, in a pseudo-terminal."""

import io
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from adafreeze.train.live import LiveView, is_watched
from text_cases import reviews, write


def in_terminal(*call, **environment):
    """Exit code and output of a command in an interactive terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "CI": "", **environment}
    process = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(), shown.decode(errors="replace")


def test_a_run_in_a_terminal_shows_its_stack_and_restores_the_terminal(bert, tmp_path):
    data = write(tmp_path / "rows.csv", reviews(8))
    code, shown = in_terminal(
        sys.executable, "-m", "adafreeze", "train", "--model_name_or_path", bert, "--task", "text-classification",
        "--train_file", data, "--max_steps", "12", "--per_device_train_batch_size", "4", "--use_cpu",
        "--logging_steps", "2", "--report_to", "none", "--output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 0, shown
    assert "step 12 of 12" in shown
    assert "░█" in shown.replace("\x1b[33m", "").replace("\x1b[36m", "").replace("\x1b[0m", "")
    assert "1 of 2 blocks frozen" in shown
    assert "loss" in shown
    assert "it/s]" not in shown  # from tqdm's bar, which would break the view
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(
    ("terminal", "environment", "watched"),
    [(True, {}, True), (True, {"CI": "true"}, False), (True, {"TERM": "dumb"}, False), (False, {}, False)],
)
def test_pipes_and_ci_get_no_live_view(terminal, environment, watched, monkeypatch):
    for name, value in {"CI": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    assert is_watched(Console(force_terminal=terminal)) == watched


def test_it_restores_the_terminal_when_the_run_fails():
    shown = io.StringIO()
    view = LiveView(lambda: None, Console(force_terminal=True, width=80, file=shown))
    view.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=4, is_world_process_zero=True), None)
    view.close()
    view.close()
    assert shown.getvalue().count("\x1b[?25h") == shown.getvalue().count("\x1b[?25l") == 1
