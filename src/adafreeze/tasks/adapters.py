"""The adapter of a run by its name: whatever PEFT registers, without a table of our own that would age."""

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

if TYPE_CHECKING:
    from peft import PeftConfig, PeftMixedModel, PeftModel
    from torch import nn
    from transformers import PreTrainedModel, TrainingArguments

__all__ = [
    "CONFIG",
    "adapter_names",
    "add_adapter",
    "config_for_task",
    "head_names",
    "make_config",
    "optimizer_steps",
    "saved_config",
]

CONFIG = "adapter_config.json"


def adapter_names() -> list[str]:
    """Names for ``--adapter``: every tuner of the installed PEFT that puts weights into layers, and ``dora``.

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

    ``r``, ``alpha`` and ``dropout`` go to the fields that this method has for them (``lora_alpha``,
    ``alpha``, ``vera_dropout``, ``module_dropout``, ...; AdaLoRA's rank is ``init_r``); ``total_steps`` to a
    field ``total_step`` where there is one. ``options`` holds any other field, by PEFT's own name, and wins.

    Raises:
        ConfigError: there is no such adapter, or it has no such setting, or PEFT refuses a value.

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
            f"There is no adapter {name!r}.",
            cause="The installed PEFT has these with weights in each block: " + ", ".join(adapter_names()) + ".",
            fix=f"--adapter {close[0] if close else 'lora'}",
        )
    fields = [field.name for field in dataclasses.fields(classes[kind])]
    values: dict[str, Any] = {"peft_type": kind.upper(), "task_type": task_type}
    if name == "dora":
        values["use_dora"] = True
    given = {"r": ("rank", r), "alpha": ("scaling", alpha), "dropout": ("dropout", dropout)}
    for setting, (word, value) in given.items():
        if value is None:
            continue
        target = _field_for(setting, fields)
        if target is None:
            raise ConfigError(
                f"The adapter {name} has no {word}, so --adapter_{setting} {value} has no effect.",
                cause=f"Its settings are: {', '.join(_own(fields))}.",
                fix=f"Leave out --adapter_{setting}; other settings go into --adapter_kwargs '{{...}}'.",
            )
        values[target] = value
    if target_modules is not None:
        values["target_modules"] = _targets(target_modules)
    if "total_step" in fields and total_steps is not None:
        values["total_step"] = total_steps
    for key, value in (options or {}).items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            raise ConfigError(
                f"The adapter {name} has no setting {key!r} (--adapter_kwargs).",
                cause=f"Its settings are: {', '.join(_own(fields))}.",
                fix=f"Use {close[0]!r}." if close else f"Remove {key!r}.",
            )
        values[key] = value
    try:
        return get_peft_config(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"PEFT refuses the settings of the adapter {name}: {error}",
            cause=f"They were: {', '.join(f'{key}={value!r}' for key, value in values.items())}.",
            fix="Correct --adapter_r, --adapter_alpha, --adapter_dropout or --adapter_kwargs.",
        ) from error


def saved_config(folder: Path) -> PeftConfig:
    """The PEFT config in ``folder``, or in the file ``adapter_config.json`` itself.

    Raises:
        RunError: there is none, or one that is of no adapter with weights in layers.
    """
    from peft import PeftConfig

    folder = folder.expanduser()
    folder = folder.parent if folder.name == CONFIG else folder
    if not (folder / CONFIG).is_file():
        raise RunError(
            f"There is no {CONFIG} in {folder}.",
            cause="It is not a folder that PEFT's save_pretrained wrote.",
            fix="--adapter_config path/to/the/trained/adapter",
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise _no_peft(folder, f"{type(error).__name__}: {error}") from error
    if config.peft_type is None or not hasattr(config, "target_modules"):
        raise _no_peft(folder, "it names no method with weights in layers")
    config.inference_mode = False  # as PEFT saves a trained adapter; loaded so, the next would not train
    return config


def _no_peft(folder: Path, reason: str) -> RunError:
    return RunError(
        f"{folder / CONFIG} is no configuration of adapters of PEFT ({reason}).",
        cause="It is damaged, or of another library, or of a prompt method.",
        fix="--adapter_config path/to/the/trained/adapter",
    )


def config_for_task(config: PeftConfig, task_type: str | None) -> PeftConfig:
    """``config``, for a task that PEFT calls ``task_type``: set where the config names none.

    Raises:
        RunError: it names another: PEFT would wrap the model for that, and would not train this task's head.
    """
    given = getattr(config.task_type, "value", config.task_type)
    if given not in (None, task_type):
        raise RunError(
            f"The saved adapter is for PEFT's task {given}, and this run is for {task_type or 'one without a name'}.",
            cause="PEFT trains the head that belongs to its task.",
            fix=f'Another --task, or "task_type": {json.dumps(task_type)} and "modules_to_save": null in {CONFIG}.',
        )
    config.task_type = task_type
    return config


def _field_for(setting: str, fields: list[str]) -> str | None:
    if setting == "r":
        # AdaLoRA inherits LoRA's r and ignores it.
        return next((name for name in ("init_r", "r") if name in fields), None)
    # In PEFT a method names its own after itself (vera_dropout), LoRA's descendants after LoRA (lora_alpha).
    own = [name for name in fields if name.endswith(f"_{setting}") and name not in _OTHER]
    return next((name for name in (setting, *own, f"module_{setting}") if name in fields), None)


# They end in _alpha or _dropout, but mean something else than the scaling and the dropout of the adapter's
# input.
_OTHER = ("regularization_alpha", "rank_dropout", "module_dropout")


def _own(fields: list[str]) -> list[str]:
    from peft import PeftConfig

    general = {field.name for field in dataclasses.fields(PeftConfig)} | {"target_modules"}
    return [name for name in fields if name not in general]


def _targets(given: list[str] | str) -> list[str] | str:
    """PEFT matches a list by the end of the name, and a string as a pattern (or "all-linear")."""
    if isinstance(given, str):
        given = [given]
    if len(given) == 1 and (given[0] == "all-linear" or re.search(r"[*+?\[\](){}|^$\\]", given[0])):
        return given[0]
    return list(given)


def add_adapter(model: PreTrainedModel, config: PeftConfig, **options: Any) -> PeftModel | PeftMixedModel:
    """``peft.get_peft_model`` with its ``options``, and with an error that lists what may be adapted.

    Raises:
        ConfigError: ``target_modules`` matches no module, must be named for this model, or PEFT refuses it; or
            ``layers_to_transform`` names a block that the model does not have, which PEFT would pass over.
        ModelError: the adapter has no weights in the blocks.
    """
    from peft import get_peft_model

    from ..model.backends.peft import PeftBackend

    _check_depth(model, config)
    if config.target_modules == "all-linear" and config.task_type in (None, "QUESTION_ANS"):  # type: ignore[attr-defined]
        # PEFT leaves the heads of other tasks out by itself; a head trains in full, and has no adapter.
        config.exclude_modules = getattr(config, "exclude_modules", None) or head_names(model)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # IA3 and others say on creation what they will do at merge time: nobody merges here.
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            # transformers deprecates what PEFT asks it.
            warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
            peft_model = get_peft_model(model, config, **options)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, AssertionError) as error:
        targets = getattr(config, "target_modules", None)
        names = _linear_names(model)
        listed = ", ".join(names)
        if not targets:
            raise ConfigError(
                f"--target_modules is needed: PEFT has no default for {_kind(config)} on this model "
                f"({type(model).__name__}).",
                cause=f"The linear layers are: {listed}.",
                fix=f"--target_modules {' '.join(names[:2])}",
            ) from error
        shown = targets if isinstance(targets, str) else " ".join(sorted(targets))
        nothing = not _matches(model, targets)
        raise ConfigError(
            f"--target_modules {shown} matches no module of {type(model).__name__}."
            if nothing
            else f"PEFT cannot adapt the modules {shown} with {_kind(config)}: {str(error).splitlines()[0]}",
            cause=f"The linear layers are: {listed}."
            if nothing
            else "These modules, or the settings, do not go with this method.",
            fix=f"--target_modules {' '.join(names[:2])}" if nothing else "Choose others, or another --adapter.",
        ) from error
    PeftBackend(peft_model)  # refuses now, not after minutes of tokenizing, what cannot be frozen by block
    return peft_model


def _check_depth(model: PreTrainedModel, config: PeftConfig) -> None:
    wanted = getattr(config, "layers_to_transform", None)
    depth = max(getattr(model.config, name, None) or 0 for name in ("num_hidden_layers", "num_decoder_layers"))
    last = max([wanted] if isinstance(wanted, int) else wanted or [-1])
    if depth and last >= depth:
        raise ConfigError(
            f"layers_to_transform names block {last}, and the last of {type(model).__name__} is {depth - 1}.",
            cause="The settings of the adapter are for a deeper model.",
            fix="Use those of a run of this model, or leave out layers_to_transform and layers_pattern.",
        )


def head_names(model: PreTrainedModel) -> list[str]:
    """The modules beside the base model: what PEFT must train in full where it does not know the task."""
    base = model.base_model_prefix
    return [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def _matches(model: nn.Module, targets: Any) -> bool:
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        return targets == "all-linear" or any(re.fullmatch(targets, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names for target in targets)


def _linear_names(model: nn.Module) -> list[str]:
    """Last parts of the linear layers' names, each once, in the model's order: what one types."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    heads = {id(module) for module in (getattr(model, "get_output_embeddings", lambda: None)(),)}
    names = [
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in heads
    ]
    return list(dict.fromkeys(names))


def optimizer_steps(args: TrainingArguments, rows: int) -> int:
    """How many optimizer steps ``Trainer`` will take over ``rows`` samples, by its own rule."""
    if args.max_steps > 0:
        return args.max_steps
    per_batch = args.train_batch_size * args.world_size
    batches = rows // per_batch if args.dataloader_drop_last else math.ceil(rows / per_batch)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)
