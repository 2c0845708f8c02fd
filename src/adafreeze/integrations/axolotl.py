"""AdafreezePlugin: one line in the YAML file of an Axolotl run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..config import SafeConfig
from ..errors import note, warn
from ..journal import JOURNAL_FILE
from .transformers import SafeCallback, has_callback, output_folder

__all__ = ["TRIED", "AdafreezeArgs", "AdafreezePlugin"]

# The versions of Axolotl whose own command has trained with this plugin.
TRIED = ("0.19.0",)


class _Hooks:
    """Selective adapter freezing in Axolotl. In the YAML file:

        plugins:
          - adafreeze.integrations.axolotl.AdafreezePlugin
        adafreeze:  # optional
          freeze_at_start: 0.5

    ``adafreeze`` takes the fields of SafeConfig. The journal is ``journal.jsonl`` in ``output_dir``. A SafeCallback
    that the Trainer already has, from another plugin or from ``adafreeze run``, is used instead.
    """

    def register(self, cfg: Any) -> None:
        """Before the config is validated: make log lines visible, and warn if this Axolotl was not tried."""
        logger = logging.getLogger("adafreeze")
        if not any(isinstance(known, _NamedAxolotl) for known in logger.filters):
            # First: if Axolotl set up logging before this logger was made, the logger has Axolotl's filter too.
            logger.filters.insert(0, _NamedAxolotl())
        if (installed := version("axolotl")) not in TRIED:
            warn(
                f"Axolotl {installed} is installed. The plugin was tried with {', '.join(TRIED)} only.",
                fix="If it fails: adafreeze run -m axolotl.cli.train config.yaml, without the plugin",
            )

    def get_input_args(self) -> str:
        """The class that validates ``adafreeze:``, by name, as Axolotl imports it."""
        return f"{__name__}.AdafreezeArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Add the callback.

        Not in ``add_callbacks_post_trainer``: Axolotl collects what all plugins return there before it adds any, so a
        SafeCallback of another plugin could not be seen.
        """
        if has_callback(trainer):
            note("The Trainer already has a SafeCallback, which is used, with its own settings.")
            return
        journal = output_folder(trainer) / JOURNAL_FILE
        trainer.add_callback(SafeCallback(dict(cfg.adafreeze or {}), journal=journal))


class _NamedAxolotl(logging.Filter):
    """Renames records, because Axolotl's console shows info lines only of loggers whose names start with axolotl.

    So they appear once, in Axolotl's format, on the console and in debug.log, as ``AXOLOTL_LOG_LEVEL`` says.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.name = f"axolotl.{record.name}"
        return True


if TYPE_CHECKING:

    class AdafreezePlugin(_Hooks):
        """See ``_Hooks``."""

    class AdafreezeArgs:
        """See ``_args``."""


def _plugin() -> type:
    from axolotl.integrations.base import BasePlugin

    return type("AdafreezePlugin", (_Hooks, BasePlugin), {"__doc__": _Hooks.__doc__, "__module__": __name__})


def _args() -> type:
    from pydantic import BaseModel, field_validator

    class AdafreezeArgs(BaseModel):
        """The key ``adafreeze``. Axolotl's own config class inherits from it."""

        adafreeze: dict[str, Any] | None = None

        @field_validator("adafreeze")
        @classmethod
        def check_adafreeze(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
            """Refuse what SafeConfig refuses, before data and model are loaded."""
            SafeConfig.from_dict(value or {})
            return value

    return AdafreezeArgs


_MADE: dict[str, Callable[[], type]] = {"AdafreezePlugin": _plugin, "AdafreezeArgs": _args}


def __getattr__(name: str) -> Any:
    """Make the classes on first use: their base classes need Axolotl and pydantic, which are optional."""
    if name not in _MADE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _MADE[name]()
    return made
