"""The adapter's flags, which train, plan and doctor share, and the PEFT config that they come to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["AdapterArguments", "peft_config"]


@dataclass
class AdapterArguments:
    """Which adapter, from PEFT.

    Raises:
        ConfigError: ``adapter_kwargs`` is no JSON object, or settings stand beside ``adapter_config``.
    """

    _argument_group_name = "adapter"

    adapter: str = field(
        default="lora",
        metadata={"help": "lora, dora, ia3, vera, adalora, oft, ...: any tuner of the installed PEFT."},
    )
    adapter_r: int | None = field(default=None, metadata={"help": "Its rank. If not given: PEFT's default."})
    adapter_alpha: float | None = field(default=None, metadata={"help": "Its scaling. If not given: PEFT's default."})
    adapter_dropout: float | None = field(default=None, metadata={"help": "Its dropout. If not given: PEFT's default."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, or all-linear, or one pattern. Default: PEFT's."},
    )
    adapter_kwargs: str | None = field(
        default=None,
        metadata={"help": "Any other field of the PEFT config, as JSON: '{\"use_rslora\": true}'."},
    )
    adapter_config: str | None = field(
        default=None,
        metadata={"help": "Instead of these: a folder with PEFT's adapter_config.json, as export-config writes it."},
    )

    def __post_init__(self) -> None:
        _options(self.adapter_kwargs)
        if self.adapter_config is None:
            return
        for entry in dataclasses.fields(self):
            if entry.name != "adapter_config" and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"--adapter_config and --{entry.name} are both given.",
                    cause="The folder says all of the adapter.",
                    fix=f"Leave out --{entry.name}, or change it in the folder's adapter_config.json.",
                )


def peft_config(given: AdapterArguments, task_type: str | None, total_steps: int | None = None) -> PeftConfig:
    """What ``--adapter`` and its settings, or ``--adapter_config``, come to for a task that PEFT calls ``task_type``.

    Raises:
        ConfigError: there is no such adapter, it has no such setting, or PEFT refuses a value.
        RunError: the folder holds no configuration of an adapter, or one for another kind of task.
    """
    from ..tasks.adapters import config_for_task, make_config, saved_config

    if given.adapter_config is None:
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
    return config_for_task(saved_config(Path(given.adapter_config)), task_type)


def _options(text: str | None) -> dict[str, Any]:
    """``--adapter_kwargs`` as a dict.

    Raises:
        ConfigError: it is no JSON object.
    """
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--adapter_kwargs is not JSON ({error.msg}, column {error.colno}): {text}",
            cause="Names and texts need double quotes, and the shell single quotes around the whole.",
            fix="--adapter_kwargs '{\"use_rslora\": true}'",
        ) from error
    if not isinstance(options, dict):
        raise ConfigError(
            f"--adapter_kwargs is {text}, not an object.",
            cause="It must name the fields of the PEFT config.",
            fix="--adapter_kwargs '{\"use_rslora\": true}'",
        )
    return options
