"""The settings of a run: the flags of ``adafreeze train``, or the same names as keywords."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from ..config import SafeConfig
from ..errors import ConfigError, warn
from ..tasks import GLUE, TASKS
from .parser import Parser, build, flag

__all__ = ["AdapterArguments", "Arguments", "DataArguments", "build_parser", "contradiction", "parse"]


@dataclass
class ModelArguments:
    """What is fine-tuned; names as in the example scripts of transformers."""

    _argument_group_name = "model"

    model_name_or_path: str = flag("A folder, or a name on the Hub.", MISSING)
    tokenizer_name: str | None = flag("The tokenizer, if not the model's own.")
    model_revision: str | None = flag("Branch, tag or commit on the Hub.")
    cache_dir: str | None = flag("Folder for downloads.")
    token: str | None = flag("Access token for the Hub.")
    trust_remote_code: bool = flag("Run code that comes with the model.", False)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag(
        "Dtype of the loaded weights; auto: as saved.", "auto", aliases=["--torch_dtype"]
    )
    ignore_mismatched_sizes: bool = flag("Replace a saved head of another size by a new one.", False)


@dataclass
class DataArguments:
    """What it is fine-tuned on; names as in the example scripts of transformers."""

    _argument_group_name = "data"

    task: str | None = flag("What the model learns to do.", choices=TASKS)
    task_name: str | None = flag(
        "A GLUE task, instead of --task: its dataset, columns and official metrics.", choices=GLUE
    )
    dataset_name: str | None = flag("A dataset on the Hub (or --train_file).")
    dataset_config_name: str | None = flag("The configuration of the dataset.")
    train_split: str = flag("The split of the dataset to train on.", "train")
    validation_split: str | None = flag(
        "The split to evaluate on (default: validation), or a share of the training rows to hold out, such as 0.1."
    )
    train_file: str | None = flag("A .csv, .json, .jsonl, .parquet or .txt file.")
    validation_file: str | None = flag("The same, to evaluate on.")
    train_dir: str | None = flag("Image classification: a folder with one subfolder of images per class.")
    validation_dir: str | None = flag("The same, to evaluate on.")
    validation_mismatched_file: str | None = flag("MNLI: the rows of other genres, evaluated as _mm at the end.")
    text_column: list[str] | None = flag(
        "One column, or two for pairs. If not given, the first of: sentence1 and sentence2, premise and "
        "hypothesis, question and sentence, text, sentence."
    )
    label_column: str = flag("The column of the label.", "label")
    prompt_column: str | None = flag("Instruction tuning and text generation: the input.")
    completion_column: str | None = flag(
        "The output; the loss is on this alone. Rows with the same prompt are alternative references."
    )
    prompt_separator: str = flag("Text between prompt and completion: a new line by default.", "\n")
    messages_column: str | None = flag("Conversations of role and content; the loss is on the assistant's.")
    question_column: str | None = flag("Question answering; default: question.")
    context_column: str | None = flag("Question answering; default: context.")
    answers_column: str | None = flag("Question answering; default: answers, each with text and answer_start.")
    image_column: str | None = flag("Image classification; if not given: image or img.")
    max_seq_length: int | None = flag("Maximum tokens of a row; default: 128, language models 512, questions 384.")
    block_size: int | None = flag("Plain text: join all rows and cut them into rows of this many tokens, like run_clm.")
    generation_max_new_tokens: int | None = flag("Text generation: maximum new tokens in evaluation; default: 64.")
    generation_num_beams: int | None = flag("Text generation: beams of the search in evaluation; default: 1, greedy.")
    doc_stride: int | None = flag("Question answering: overlap of windows of a long context; default: a third.")
    n_best_size: int | None = flag("Question answering: number of starts and ends that are paired; default: 20.")
    max_answer_length: int | None = flag("Question answering: maximum tokens of an answer; default: 30.")
    null_score_diff_threshold: float | None = flag("SQuAD v2: score margin for no answer; default: 0.")
    pad_to_max_length: bool = flag("Pad all rows to max_seq_length.", False)
    max_train_samples: int | None = flag("Train on the first rows only.")
    max_eval_samples: int | None = flag("Evaluate on the first rows only.")
    skip_bad_rows: bool = flag("Leave out rows without text or label instead of stopping.", False)


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
        try:
            options = json.loads(self.adapter_kwargs or "{}")
            reason = "" if isinstance(options, dict) else "not an object with names of PEFT's config"
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg}, column {error.colno})"
        if reason:
            raise ConfigError(
                f"--adapter_kwargs is {reason}: {self.adapter_kwargs}", fix="--adapter_kwargs '{\"use_rslora\": true}'"
            )
        for entry in dataclasses.fields(self) if self.adapter_config is not None else ():
            if entry.name != "adapter_config" and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"--adapter_config and --{entry.name} are both given.",
                    fix=f"Leave out --{entry.name}, or change it in the folder's adapter_config.json.",
                )


@dataclass
class RunArguments:
    """What happens around the training."""

    _argument_group_name = "run"

    config: str | None = flag("A YAML file of these flags; flags on the command line override it.")
    overwrite_output_dir: bool = flag("Replace the run in --output_dir.", False)
    count_costs: bool = flag("Count FLOPs and the activation bytes saved for the backward pass.", True)


class _TrainingFlags(TrainingArguments):
    # Puts the hundred flags of Trainer into their own group, behind ours. --help shows those that most runs set.
    _argument_group_name = "training (transformers.TrainingArguments)"


_SHOWN = {
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "optim", "bf16", "gradient_checkpointing"),
    *("activation_checkpointing", "eval_strategy", "save_strategy", "logging_steps", "report_to", "seed", "use_cpu"),
    "resume_from_checkpoint",
}

# --seed and --cache_dir have another meaning in all of transformers' scripts: the run's seed, the Hub's downloads.
_CACHE = ("cache", "cache_budget", "cache_dir", "cache_dtype")
_RENAMED = {"seed": "probe_seed", **{name: f"prefix_{name}" for name in _CACHE}}
_SAFE_FLAGS = {entry.name: _RENAMED.get(entry.name, entry.name) for entry in dataclasses.fields(SafeConfig)}
# By annotation; SafeConfig reads all other fields from text.
_KINDS: dict[str, Any] = {"bool": bool, "int": int, "float": float, "float | None": float, "tuple[str, ...]": list[str]}


def _safe_arguments() -> type:
    """A dataclass with ``method`` and a flag for each field of SafeConfig, described by its docstring.

    A flag that was not given is None.
    """
    text = inspect.getdoc(SafeConfig) or ""
    fields: list[Any] = [
        (
            "method",
            Literal["safe", "safe-paper", "none"],
            flag("safe: freeze a prefix, needs no tuning; safe-paper: as published; none: plain.", "safe"),
        )
    ]
    for entry in dataclasses.fields(SafeConfig):
        found = re.search(rf"^ +{entry.name}: (.*?)(?=^ +\w+: |^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        described = " ".join(textwrap.dedent(found[1]).split()).replace("`", "") if found else ""
        kind = _KINDS.get(str(entry.type), str)
        hint = flag(f"{described} (SafeConfig: {entry.default!r})".replace("%", "%%"))
        fields.append((_SAFE_FLAGS[entry.name], kind | None, hint))
    return dataclasses.make_dataclass("SafeArguments", fields, namespace={"_argument_group_name": "freezing"})


SafeArguments = _safe_arguments()


def build_parser() -> Parser:
    """The parser of ``adafreeze train``."""
    groups = (ModelArguments, DataArguments, AdapterArguments, SafeArguments, RunArguments, _TrainingFlags)
    parser = Parser(
        *groups,
        prog="adafreeze train",
        description="Fine-tune a model with adapters that freeze themselves.",
        conflict_handler="resolve",  # transformers 4.57 still has overwrite_output_dir, which it does not use
    )
    parser.hide(_TrainingFlags._argument_group_name, _SHOWN)
    switches = {_SAFE_FLAGS[entry.name] for entry in dataclasses.fields(SafeConfig) if isinstance(entry.default, bool)}
    for action in parser._actions:
        if action.dest in switches:  # the flag alone means True, as for those with a default
            action.nargs, action.const = "?", True
    return parser


@dataclass(frozen=True)
class Arguments:
    """All settings of a run.

    Attributes:
        safe: None with ``method="none"``.
        freezing: the fields of SafeConfig that were given.
        resolved: the settings that differ from the defaults, without secrets; enough to repeat the run.
        words: the flags that this was parsed from.

    >>> arguments = Arguments.of(model_name_or_path="bert", task="regression", output_dir="out", adapter_r=4)
    >>> arguments.adapter.adapter_r, arguments.changed(seed=3).training.seed
    (4, 3)
    """

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    run: RunArguments
    training: TrainingArguments
    safe: SafeConfig | None
    freezing: dict[str, Any]
    method: str
    resolved: dict[str, Any]
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """``output_dir``."""
        return Path(str(self.training.output_dir)).expanduser()

    @classmethod
    def of(cls, **settings: Any) -> Arguments:
        """Settings by the names of the flags of ``adafreeze train``; raises as ``parse``."""
        return parse(build_parser().words(settings, "Arguments.of"))

    def changed(self, **settings: Any) -> Arguments:
        """The same with other ``settings``; raises as ``parse``."""
        return parse([*self.words, *build_parser().words(settings, "Arguments.changed")], read_file=False)


def parse(words: Sequence[str], *, read_file: bool = True) -> Arguments:
    """Flags, and the YAML file of ``--config``, to validated settings.

    Raises:
        ConfigError: a flag or key is unknown or has no such value, or settings contradict each other.
    """
    parser = build_parser()
    words = parser.with_file(words) if read_file else words
    values = vars(parser.parse_args(words))
    if not values["output_dir"]:
        raise ConfigError("--output_dir is missing.", fix="--output_dir runs/first")
    method = values["method"]
    given = {name: values[name_of_flag] for name, name_of_flag in _SAFE_FLAGS.items()}
    given = {name: value for name, value in given.items() if value is not None}
    safe = None
    if method != "none":
        safe = SafeConfig.paper(**given) if method == "safe-paper" else SafeConfig.from_dict(given)
    elif given.get("offload") in ("cpu", "disk"):
        warn(
            f"--offload {given['offload']} moves nothing with --method none, which freezes nothing.",
            fix="--method safe, or leave out --offload.",
        )
    try:
        training = build(TrainingArguments, values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # from its __post_init__
        raise contradiction(error) from error
    return Arguments(
        model=build(ModelArguments, values),
        data=build(DataArguments, values),
        adapter=build(AdapterArguments, values),
        run=build(RunArguments, values),
        training=training,
        safe=safe,
        freezing=given,
        method=method,
        resolved=_resolved(parser, values),
        words=tuple(words),
    )


def contradiction(error: Exception) -> ConfigError:
    """What transformers refuses, as an error of the flags."""
    return ConfigError(
        f"The training arguments do not go together: {str(error).strip().splitlines()[0]}",
        fix="Change the flag that this names; `adafreeze train --help-all` lists all flags.",
    )


# Secrets, and settings of this process rather than of the run.
_NOT_KEPT = {
    *("token", "hub_token", "push_to_hub_token"),
    *("config", "overwrite_output_dir", "resume_from_checkpoint", "local_rank"),
}


def _resolved(parser: Parser, values: dict[str, Any]) -> dict[str, Any]:
    # Parsed, not get_default(): the parser converts text defaults ("no" to False).
    defaults = vars(parser.parse_args(["--model_name_or_path="]))
    return {
        name: getattr(value, "value", value)
        for name, value in values.items()
        if name not in _NOT_KEPT and value is not None and value != defaults[name]
    }
