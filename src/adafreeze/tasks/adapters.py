"""The adapter of a run: any tuner of the installed PEFT by its name, or a saved ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, RunError
from .data import first_line

if TYPE_CHECKING:
    from peft import PeftConfig, PeftMixedModel, PeftModel
    from transformers import PreTrainedModel, TrainingArguments

__all__ = [
    "CONFIG",
    "adapter_names",
    "add_adapter",
    "config_from_flags",
    "head_names",
    "make_config",
    "optimizer_steps",
    "saved_config",
]

CONFIG = "adapter_config.json"


def adapter_names() -> list[str]:
    """Values of ``--adapter``: every tuner of the installed PEFT with weights in layers, and ``dora``.

    >>> {"lora", "dora", "ia3", "vera"} <= set(adapter_names())
    True
    >>> "prompt_tuning" in adapter_names()
    False
    """
    return sorted([*_config_classes(), "dora"])


def _config_classes() -> dict[str, type[PeftConfig]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    from ..model.backends.peft import NOT_PER_BLOCK

    return {
        kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if kind in PEFT_TYPE_TO_CONFIG_MAPPING and issubclass(tuner, BaseTuner) and kind.value not in NOT_PER_BLOCK
    }


def make_config(
    name: str,
    task_type: str | None,
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    target_modules: list[str] | str | None = None,
    total_steps: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> PeftConfig:
    """The PEFT config of adapter ``name``.

    ``r``, ``alpha`` and ``dropout`` set the method's own fields (``lora_alpha``, ``alpha``, ``vera_dropout``,
    ``module_dropout``, ...; AdaLoRA's rank is ``init_r``), ``total_steps`` sets ``total_step`` if it exists.
    ``options`` sets any field by PEFT's name and takes precedence.

    Raises:
        ConfigError: there is no such adapter, it has no such setting, or PEFT rejects a value.

    >>> config = make_config("dora", "CAUSAL_LM", r=4, alpha=8, target_modules=["q_proj"])
    >>> config.use_dora, config.r, config.lora_alpha
    (True, 4, 8)
    """
    from peft import get_peft_config

    classes = _config_classes()
    kind = "lora" if name == "dora" else name
    if kind not in classes:
        close = difflib.get_close_matches(name, adapter_names(), n=1)
        raise ConfigError(
            f"There is no adapter {name!r}; the installed PEFT has {', '.join(adapter_names())}.",
            fix=f"--adapter {close[0] if close else 'lora'}",
        )
    fields = [field.name for field in dataclasses.fields(classes[kind])]
    values: dict[str, Any] = {"peft_type": kind.upper(), "task_type": task_type}
    if name == "dora":
        values["use_dora"] = True
    for setting, word, value in (("r", "rank", r), ("alpha", "scaling", alpha), ("dropout", "dropout", dropout)):
        if value is None:
            continue
        target = _field_for(setting, fields)
        if target is None:
            raise ConfigError(
                f"The adapter {name} has no {word}, so --adapter_{setting} {value} has no effect.",
                fix=f"Leave out --adapter_{setting}, or use --adapter_kwargs '{{...}}' with {', '.join(_own(fields))}.",
            )
        values[target] = value
    if target_modules is not None:
        values["target_modules"] = _targets(target_modules)
    if "total_step" in fields and total_steps is not None:
        values["total_step"] = total_steps
    values |= options or {}
    try:
        return get_peft_config(values)
    except (ValueError, TypeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        raise ConfigError(
            f"PEFT rejects the settings {given} of {name}: {error}",
            fix=f"Correct --adapter_kwargs or other --adapter_ flags; the settings are {', '.join(_own(fields))}.",
        ) from error


def saved_config(folder: Path) -> PeftConfig:
    """The PEFT config in ``folder``, or in the file ``adapter_config.json`` itself.

    Raises:
        RunError: there is none, or it is not of an adapter with weights in layers.
    """
    from peft import PeftConfig

    folder = folder.expanduser()
    folder = folder.parent if folder.name == CONFIG else folder
    fix = "--adapter_config path/to/the/trained/adapter, a folder that PEFT's save_pretrained wrote"
    if not (folder / CONFIG).is_file():
        raise RunError(f"There is no {CONFIG} in {folder}.", fix=fix)
    fault = "it has no weights in layers"
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        config, fault = None, f"{type(error).__name__}: {error}"
    if config is None or config.peft_type is None or not hasattr(config, "target_modules"):
        raise RunError(f"{folder / CONFIG} is not the configuration of a PEFT adapter ({fault}).", fix=fix)
    config.inference_mode = False  # PEFT saves it as True, and then the next adapter would not train
    return config


def config_from_flags(flags: Mapping[str, Any], task_type: str | None, total_steps: int | None = None) -> PeftConfig:
    """The PEFT config of ``--adapter_config``, or of ``--adapter`` and its settings.

    Args:
        flags: of the adapter, as in ``adafreeze train``; those that were not given may be missing.
        task_type: PEFT's name of the task.
        total_steps: optimizer steps of the run, for adapters that schedule their ranks.

    Raises:
        ConfigError: the adapter or a setting does not exist, or PEFT refuses a value.
        RunError: the folder contains no adapter configuration, or one for another task.
    """
    if not flags.get("adapter_config"):
        return make_config(
            flags.get("adapter", "lora"),
            task_type,
            r=flags.get("adapter_r"),
            alpha=flags.get("adapter_alpha"),
            dropout=flags.get("adapter_dropout"),
            target_modules=flags.get("target_modules"),
            total_steps=total_steps,
            options=json.loads(flags.get("adapter_kwargs") or "{}"),
        )
    config = saved_config(Path(flags["adapter_config"]))
    given = getattr(config.task_type, "value", config.task_type)
    if given not in (None, task_type):  # PEFT would wrap the model for that, and would not train this task's head
        raise RunError(
            f"The saved adapter is for PEFT's task {given}, and this run is for {task_type or 'one without a name'}.",
            fix=f'Another --task, or "task_type": {json.dumps(task_type)} and "modules_to_save": null in {CONFIG}.',
        )
    config.task_type = task_type
    return config


# Fields that end in _alpha or _dropout, but are not the scaling or the dropout of the adapter's input.
_OTHER = ("regularization_alpha", "rank_dropout", "module_dropout")


def _field_for(setting: str, fields: list[str]) -> str | None:
    if setting == "r":  # AdaLoRA inherits LoRA's r and ignores it
        return next((name for name in ("init_r", "r") if name in fields), None)
    # Most methods use their own name as prefix (vera_dropout); descendants of LoRA use LoRA's (lora_alpha).
    own = [name for name in fields if name.endswith(f"_{setting}") and name not in _OTHER]
    return next((name for name in (setting, *own, f"module_{setting}") if name in fields), None)


def _own(fields: list[str]) -> list[str]:
    from peft import PeftConfig

    general = {field.name for field in dataclasses.fields(PeftConfig)} | {"target_modules"}
    return [name for name in fields if name not in general]


def _targets(given: list[str] | str) -> list[str] | str:
    """PEFT matches a list by the end of the name, and a string as a pattern (or "all-linear")."""
    given = [given] if isinstance(given, str) else given
    if len(given) == 1 and (given[0] == "all-linear" or re.search(r"[*+?\[\](){}|^$\\]", given[0])):
        return given[0]
    return list(given)


def add_adapter(model: PreTrainedModel, config: PeftConfig, **options: Any) -> PeftModel | PeftMixedModel:
    """``peft.get_peft_model`` with its ``options``; errors list the modules that can be adapted.

    Raises:
        ConfigError: ``target_modules`` matches no module or has no default for this model, ``layers_to_transform``
            names a block that the model does not have (PEFT ignores it), or PEFT rejects the adapter.
        ModelError: the adapter has no weights in the blocks.
    """
    from peft import get_peft_model

    from ..model.backends.peft import PeftBackend

    _check_depth(model, config)
    if config.target_modules == "all-linear" and config.task_type in (None, "QUESTION_ANS"):  # type: ignore[attr-defined]
        # PEFT excludes the heads of other tasks itself. A head trains in full and has no adapter.
        config.exclude_modules = getattr(config, "exclude_modules", None) or head_names(model)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # IA3 and others warn about merging.
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            # transformers deprecates an attribute that PEFT reads.
            warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
            peft_model = get_peft_model(model, config, **options)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, AssertionError) as error:
        names = _linear_names(model)
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        raise ConfigError(
            f"PEFT cannot add {kind} to {type(model).__name__} with target_modules {config.target_modules}: "  # type: ignore[attr-defined]
            f"{first_line(error)} Its linear layers are {', '.join(names)}.",
            fix=f"--target_modules {' '.join(names[:2])}, or another --adapter or other settings of it.",
        ) from error
    PeftBackend(peft_model)  # fails now, not after minutes of tokenizing, if the adapter cannot be frozen by block
    return peft_model


def _check_depth(model: PreTrainedModel, config: PeftConfig) -> None:
    wanted = getattr(config, "layers_to_transform", None)
    depth = max(getattr(model.config, name, None) or 0 for name in ("num_hidden_layers", "num_decoder_layers"))
    last = max([wanted] if isinstance(wanted, int) else wanted or [-1])
    if depth and last >= depth:
        raise ConfigError(
            f"layers_to_transform names block {last}, and the last of {type(model).__name__} is {depth - 1}.",
            fix="Use the settings of a run of this model, or leave out layers_to_transform and layers_pattern.",
        )


def head_names(model: PreTrainedModel) -> list[str]:
    """The modules outside the base model, which PEFT must train in full if it does not know the task."""
    base = model.base_model_prefix
    return [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]


def _linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the linear layers' names, in the model's order, without the language-model head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    return list(dict.fromkeys(names))


def optimizer_steps(args: TrainingArguments, rows: int) -> int:
    """The number of optimizer steps that ``Trainer`` takes over ``rows`` samples."""
    if args.max_steps > 0:
        return args.max_steps
    per_batch = args.train_batch_size * args.world_size
    batches = rows // per_batch if args.dataloader_drop_last else math.ceil(rows / per_batch)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)
