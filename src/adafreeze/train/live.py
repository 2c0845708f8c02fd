"""LiveView: a run in three lines of a terminal, while it trains."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["LiveView", "is_watched"]

TRAINS, FROZEN = "█", "░"
SHOWN = ("eval_accuracy", "eval_f1", "eval_perplexity", "eval_loss")


def is_watched(console: Console) -> bool:
    """Whether somebody sits before it: a terminal, and no CI. Elsewhere the Trainer's plain lines are better."""
    return (
        console.is_terminal and not console.is_dumb_terminal and os.environ.get("CI", "").lower() in ("", "false", "0")
    )


class LiveView(TrainerCallback):
    """Progress, the stack (which blocks train, which are frozen), loss and costs.

    Args:
        safe: the run's ``Safe``, once there is one; None of a plain run.
        console: where to.
    """

    def __init__(self, safe: Callable[[], Any], console: Console) -> None:
        self.safe = safe
        self.console = console
        self._live: Live | None = None
        self._logs: dict[str, float] = {}
        self._begun = self._from = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the lowest lines of the terminal; what others print scrolls above them."""
        if state.is_world_process_zero:
            self._begun, self._from = time.monotonic(), state.global_step
            self._live = Live(get_renderable=lambda: self.lines(state), console=self.console)  # 4 times a second
            self._live.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the newest of each number."""
        self._logs |= {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}

    def close(self) -> None:
        """Give the terminal back, also where the run failed."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def lines(self, state: TrainerState) -> Group:
        """What is shown now."""
        done, total = state.global_step, max(1, state.max_steps)
        bar = Table.grid(padding=(0, 1))
        spent = time.monotonic() - self._begun
        speed = (done - self._from) / spent if spent > 0 else 0.0
        left = f"{_clock((total - done) / speed)} left" if speed > 0 else ""
        bar.add_row(ProgressBar(total, done, width=30), f"step {done} of {total}", _clock(spent), left)
        return Group(bar, *self._stacks(), Text(" · ".join(self._numbers())))

    def _stacks(self) -> list[Text]:
        safe = self.safe()
        if safe is None:
            return []
        shown = []
        for stack in safe.stacks:
            depth = safe.prefixes.get(stack.path, 0)
            text = Text()
            text.append(FROZEN * depth, "cyan").append(TRAINS * (len(stack) - depth), "yellow")
            shown.append(text.append(f" {depth} of {len(stack)} blocks frozen"))
        return shown

    def _numbers(self) -> list[str]:
        found = [f"loss {self._logs['loss']:.4g}"] if "loss" in self._logs else []
        found += [f"{name} {self._logs[name]:.4g}" for name in SHOWN if name in self._logs][:2]
        if "safe/saved_mib" in self._logs:
            found.append(f"saved {self._logs['safe/saved_mib']:.0f} MiB")
        if "safe/cache_hit_rate" in self._logs:
            found.append(f"cache hits {self._logs['safe/cache_hit_rate']:.0%}")
        return found


def _clock(seconds: float) -> str:
    """Hours, minutes, seconds.

    >>> _clock(65), _clock(7300)
    ('1:05', '2:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
