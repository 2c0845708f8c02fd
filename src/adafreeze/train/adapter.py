"""The flags of the adapter, shared by train, plan and doctor, and the PEFT config made from them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..tasks.adapters import config_for_task, make_config, saved_config
from .parser import flag

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["AdapterArguments", "peft_config"]


@dataclass
class AdapterArguments:
    """Which adapter, from PEFT.

    Raises:
        ConfigError: ``adapter_kwargs`` is not a JSON object, or ``adapter_config`` is given with another setting.
    """

    _argument_group_name = "adapter"

    adapter: str = flag("lora, dora, ia3, vera, adalora, oft, ...: any tuner of the installed PEFT.", "lora")
    adapter_r: int | None = flag("Its rank. If not given: PEFT's default.")
    adapter_alpha: float | None = flag("Its scaling. If not given: PEFT's default.")
    adapter_dropout: float | None = flag("Its dropout. If not given: PEFT's default.")
    target_modules: list[str] | None = flag(
        "Names of the layers to adapt, or all-linear, or one pattern. If not given: PEFT's default."
    )
    adapter_kwargs: str | None = flag("Any other field of the PEFT config, as JSON: '{\"use_rslora\": true}'.")
    adapter_config: str | None = flag(
        "Instead of these: a folder with PEFT's adapter_config.json, such as export-config writes."
    )

    def __post_init__(self) -> None:
        _options(self.adapter_kwargs)
        for entry in dataclasses.fields(self) if self.adapter_config is not None else ():
            if entry.name != "adapter_config" and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"--adapter_config and --{entry.name} are both given.",
                    fix=f"Leave out --{entry.name}, or change it in the folder's adapter_config.json.",
                )


def peft_config(given: AdapterArguments, task_type: str | None, total_steps: int | None = None) -> PeftConfig:
    """The PEFT config of ``--adapter_config``, or of ``--adapter`` and its settings.

    Args:
        given: the flags.
        task_type: PEFT's name of the task.
        total_steps: optimizer steps of the run, for adapters that schedule their ranks.

    Raises:
        ConfigError: the adapter or a setting does not exist, or PEFT refuses a value.
        RunError: the folder contains no adapter configuration, or one for another task.
    """
    if given.adapter_config is not None:
        return config_for_task(saved_config(Path(given.adapter_config)), task_type)
    return make_config(
        given.adapter,
        task_type,
        r=given.adapter_r,
        alpha=given.adapter_alpha,
        dropout=given.adapter_dropout,
        target_modules=given.target_modules,
        total_steps=total_steps,
        options=_options(given.adapter_kwargs),
    )


def _options(text: str | None) -> dict[str, Any]:
    """``--adapter_kwargs`` as a dict."""
    try:
        options = json.loads("{}" if text is None else text)
        reason = "" if isinstance(options, dict) else "not an object with names of PEFT's config"
    except json.JSONDecodeError as error:
        reason = f"not JSON ({error.msg}, column {error.colno})"
    if reason:
        raise ConfigError(f"--adapter_kwargs is {reason}: {text}", fix="--adapter_kwargs '{\"use_rslora\": true}'")
    return options
