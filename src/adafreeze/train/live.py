"""LiveView: a run in three lines of a terminal while it trains."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState

if TYPE_CHECKING:
    from ..loop.safe import Safe

__all__ = ["LiveView", "add_live_view", "is_watched"]

TRAINS, FROZEN = "█", "░"
SHOWN = ("eval_accuracy", "eval_f1", "eval_perplexity", "eval_loss")


def is_watched(console: Console) -> bool:
    """Whether output goes to an interactive terminal; in CI and in files the Trainer's plain lines are better."""
    in_ci = os.environ.get("CI", "").lower() not in ("", "false", "0")
    return console.is_terminal and not console.is_dumb_terminal and not in_ci


def add_live_view(trainer: Trainer, safe: Callable[[], Safe | None]) -> LiveView | None:
    """Replace the Trainer's progress bar if the terminal is interactive; close the returned view after training."""
    console = Console()
    if trainer.args.disable_tqdm or not is_watched(console):
        return None
    trainer.remove_callback(ProgressCallback)
    view = LiveView(safe, console)
    trainer.add_callback(view)
    return view


class LiveView(TrainerCallback):
    """Progress, the stacks with their frozen blocks, loss and costs.

    Args:
        safe: returns the run's ``Safe``, or None if there is none (yet).
        console: the terminal.
    """

    def __init__(self, safe: Callable[[], Safe | None], console: Console) -> None:
        self.safe, self.console = safe, console
        self._live: Live | None = None
        self._logs: dict[str, float] = {}
        self._start, self._first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Use the last lines of the terminal; other output scrolls above them."""
        if state.is_world_process_zero:
            self._start, self._first_step = time.monotonic(), state.global_step
            self._live = Live(get_renderable=lambda: self.lines(state), console=self.console)  # 4 times a second
            self._live.start()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the newest value of each number."""
        self._logs |= {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}

    def close(self) -> None:
        """Restore the terminal; also needed if the run fails."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def lines(self, state: TrainerState) -> Group:
        """The current view."""
        done, total = state.global_step, max(1, state.max_steps)
        spent = time.monotonic() - self._start
        speed = (done - self._first_step) / spent if spent > 0 else 0.0
        left = f"{_clock((total - done) / speed)} left" if speed > 0 else ""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total, done, width=30), f"step {done} of {total}", _clock(spent), left)

        safe = self.safe()
        stacks = [_stack(len(stack), safe.prefixes.get(stack.path, 0)) for stack in safe.stacks] if safe else []

        logs = self._logs
        numbers = [f"loss {logs['loss']:.4g}"] if "loss" in logs else []
        numbers += [f"{name} {logs[name]:.4g}" for name in SHOWN if name in logs][:2]
        if "safe/saved_mib" in logs:
            numbers.append(f"saved {logs['safe/saved_mib']:.0f} MiB")
        if "safe/cache_hit_rate" in logs:
            numbers.append(f"cache hits {logs['safe/cache_hit_rate']:.0%}")
        return Group(bar, *stacks, Text(" · ".join(numbers)))


def _stack(blocks: int, frozen: int) -> Text:
    text = Text().append(FROZEN * frozen, "cyan").append(TRAINS * (blocks - frozen), "yellow")
    return text.append(f" {frozen} of {blocks} blocks frozen")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
