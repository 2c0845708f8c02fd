"""The flags of ``adafreeze train``: one parser for the command line and for ``--config file.yaml``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from ..config import SafeConfig
from ..errors import ConfigError
from .adapter import AdapterArguments
from .config_file import flags_from_file

__all__ = [
    "Arguments",
    "DataArguments",
    "ModelArguments",
    "RunArguments",
    "parse",
    "parse_flags",
]


@dataclass
class ModelArguments:
    """What is fine-tuned; names as in the example scripts of transformers."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the Hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, if not the model's own."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Access token of the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto",
        metadata={
            "aliases": ["--torch_dtype"],
            "help": "Load the weights as this; auto: as they were saved.",
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a saved head of another size by a new one."}
    )


@dataclass
class DataArguments:
    """What it is fine-tuned on; names as in the example scripts of transformers."""

    _argument_group_name = "data"

    task: (
        Literal[
            "text-classification",
            "regression",
            "causal-lm",
            "text-generation",
            "question-answering",
            "image-classification",
        ]
        | None
    ) = field(default=None, metadata={"help": "What the model learns to do."})
    task_name: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"] | None = field(
        default=None,
        metadata={"help": "A task of GLUE, instead of --task: its dataset, columns and official metrics."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration."})
    train_split: str = field(default="train", metadata={"help": "The split of the dataset to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "The split to evaluate on (if not given: validation, where there is one), or a share "
            "such as 0.1 of the training rows to hold out."
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "A .csv, .json, .jsonl, .parquet or .txt file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Image classification: a folder with one sub-folder of images a class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    validation_mismatched_file: str | None = field(
        default=None, metadata={"help": "--task_name mnli: the rows of other genres, evaluated as _mm at the end."}
    )
    text_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "One column, or two for pairs. If not given, the usual names are looked for: sentence1 "
            "and sentence2, premise and hypothesis, question and sentence, text, sentence."
        },
    )
    label_column: str = field(default="label", metadata={"help": "The column of the label."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Instruction tuning and text generation: what is given."}
    )
    completion_column: str | None = field(
        default=None,
        metadata={
            "help": "What is learnt; the loss is on this alone. Rows of one prompt are references to choose from."
        },
    )
    prompt_separator: str = field(default="\n", metadata={"help": "Stands between the two; default: a new line."})
    messages_column: str | None = field(
        default=None,
        metadata={"help": "Conversations: lists of role and content; the loss is on what the assistant says."},
    )
    question_column: str | None = field(default=None, metadata={"help": "Question answering; default: question."})
    context_column: str | None = field(default=None, metadata={"help": "Question answering; default: context."})
    answers_column: str | None = field(
        default=None, metadata={"help": "Question answering; default: answers, each with text and answer_start."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Image classification; if not given: image, img."})
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a row, at most. If not given: 128, of language models 512, question-answering 384."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Plain text: join all rows and cut them into rows of so many tokens, as run_clm does."},
    )
    generation_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Text generation: tokens written in evaluation, at most; default: 64."}
    )
    generation_num_beams: int | None = field(
        default=None, metadata={"help": "Text generation: beams of the search in evaluation; default: 1, greedy."}
    )
    doc_stride: int | None = field(
        default=None,
        metadata={"help": "Question answering: tokens by which windows of a long context overlap; default: a third."},
    )
    n_best_size: int | None = field(
        default=None, metadata={"help": "Question answering: starts and ends that are paired; default: 20."}
    )
    max_answer_length: int | None = field(
        default=None, metadata={"help": "Question answering: tokens of an answer, at most; default: 30."}
    )
    null_score_diff_threshold: float | None = field(
        default=None,
        metadata={"help": "SQuAD v2: by how much no answer must beat the best span; default: 0."},
    )
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad all rows to that length."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows without text or label instead of stopping."}
    )


@dataclass
class RunArguments:
    """What is done around the training."""

    _argument_group_name = "run"

    config: str | None = field(
        default=None, metadata={"help": "A YAML file of these flags; flags on the command line win over it."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that is in --output_dir."})
    count_costs: bool = field(
        default=True, metadata={"help": "Count FLOPs and the activation bytes saved for the backward pass."}
    )


class _TrainingFlags(TrainingArguments):
    # Only so that the hundred flags of Trainer stand in a group of their own, behind ours, in --help.
    _argument_group_name = "training (transformers.TrainingArguments)"


# TrainingArguments has a seed of its own, and both must be settable.
# --seed is the run's, and --cache_dir the hub's downloads', as in all of transformers' scripts.
_CACHE = ("cache", "cache_budget", "cache_dir", "cache_dtype")
_RENAMED = {"seed": "probe_seed", **{name: f"prefix_{name}" for name in _CACHE}}
_SAFE_FLAGS = {field.name: _RENAMED.get(field.name, field.name) for field in dataclasses.fields(SafeConfig)}
# By annotation; what else there is SafeConfig reads from a text.
_KINDS: dict[str, Any] = {"bool": bool, "int": int, "float": float, "float | None": float, "tuple[str, ...]": list[str]}


def _safe_arguments() -> type:
    """A dataclass with ``method`` and a flag for each field of SafeConfig, None where it was not given."""
    text = inspect.getdoc(SafeConfig) or ""
    fields: list[Any] = [
        (
            "method",
            Literal["safe", "safe-paper", "none"],
            field(
                default="safe",
                metadata={"help": "safe: freeze a prefix, needs no tuning; safe-paper: as published; none: plain."},
            ),
        )
    ]
    for entry in dataclasses.fields(SafeConfig):
        found = re.search(rf"^ +{entry.name}: (.*?)(?=^ +\w+: |^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        described = " ".join(textwrap.dedent(found[1]).split()).replace("`", "") if found else ""
        kind = _KINDS.get(str(entry.type), str)
        hint = {"help": f"{described} (SafeConfig: {entry.default!r})".replace("%", "%%")}
        fields.append((_SAFE_FLAGS[entry.name], kind | None, field(default=None, metadata=hint)))
    return dataclasses.make_dataclass("SafeArguments", fields, namespace={"_argument_group_name": "freezing"})


SafeArguments = _safe_arguments()


class _Parser(HfArgumentParser):
    """Raises instead of printing the usage: two screens of flags would bury the one line that matters."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # one spelling of two
        raise ConfigError(
            message[0].upper() + message[1:].rstrip(".") + ".",
            cause="The flags do not parse.",
            fix=f"`{self.prog} --help` lists all flags and their values.",
        )


@dataclass(frozen=True)
class Arguments:
    """All of a run's settings.

    ``freezing`` are the fields of SafeConfig that were given; ``resolved`` is all that differs from the defaults, to
    repeat it.
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


def build_parser() -> _Parser:
    """The one parser."""
    groups = [ModelArguments, DataArguments, AdapterArguments, SafeArguments, RunArguments, _TrainingFlags]
    # No abbreviations: --max_step for --max_steps would be taken for whatever flag comes to start like it
    # later. "resolve": transformers 4.57 still has overwrite_output_dir, without a use for it.
    parser = _Parser(
        groups,  # type: ignore[arg-type]
        prog="adafreeze train",
        description="Fine-tune a model with adapters that freeze themselves.",
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    switches = {_SAFE_FLAGS[entry.name] for entry in dataclasses.fields(SafeConfig) if isinstance(entry.default, bool)}
    for action in parser._actions:
        if action.dest in switches:  # the flag alone means True, as for those with a default
            action.nargs, action.const = "?", True
    return parser


def parse(argv: Sequence[str]) -> Arguments:
    """Flags, and the YAML file that they may name, to validated settings.

    Raises:
        ConfigError: a flag or a key of the file is unknown or has no such value, or settings contradict each
            other.
    """
    parser = build_parser()
    values = _values(parser, [*flags_from_file(argv, parser), *argv])
    if not values["output_dir"]:
        raise ConfigError(
            "--output_dir is missing.",
            cause="The adapter, the journal and the results need a folder.",
            fix="--output_dir runs/first",
        )
    method = values["method"]
    given = {name: values[flag] for name, flag in _SAFE_FLAGS.items() if values[flag] is not None}
    safe = {"safe": SafeConfig.from_dict, "safe-paper": lambda given: SafeConfig.paper(**given)}.get(method)
    config = safe(given) if safe is not None else None
    try:
        training = _build(TrainingArguments, values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # what its __post_init__ raises
        raise ConfigError(
            f"The training arguments do not go together: {str(error).strip().splitlines()[0]}",
            cause="transformers.TrainingArguments refuses them.",
            fix="Change the flag that it names; `adafreeze train --help` lists all flags.",
        ) from error
    return Arguments(
        model=_build(ModelArguments, values),
        data=_build(DataArguments, values),
        adapter=_build(AdapterArguments, values),
        run=_build(RunArguments, values),
        training=training,
        safe=config,
        freezing=given,
        method=method,
        resolved=_resolved(parser, values),
    )


def parse_flags(groups: Sequence[type], argv: Sequence[str], *, prog: str, description: str) -> tuple[Any, ...]:
    """One object of each class in ``groups``, for a command without a file of settings.

    Raises:
        ConfigError: a flag is unknown or has no such value.
    """
    parser = _Parser(groups, prog=prog, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    values = _values(parser, argv)
    return tuple(_build(kind, values) for kind in groups)


def _values(parser: _Parser, tokens: Sequence[str]) -> dict[str, Any]:
    namespace, unknown = parser.parse_known_args(list(tokens))
    flags = [token.split("=")[0] for token in unknown if token.startswith("-")] or unknown
    if flags:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(flags[0], known, n=1)
        raise ConfigError(
            f"Unknown: {' '.join(flags)}.",
            cause="No flag of this command has that name."
            if flags[0].startswith("-")
            else "The word belongs to no flag.",
            fix=f"Did you mean {close[0]}?" if close else f"`{parser.prog} --help` lists all flags.",
        )
    return vars(namespace)


def _build(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{entry.name: values[entry.name] for entry in dataclasses.fields(kind) if entry.init})


# Secrets, and what belongs to one start of the program and not to the run.
_NOT_KEPT = {
    *("token", "hub_token", "push_to_hub_token"),
    *("config", "overwrite_output_dir", "resume_from_checkpoint", "local_rank"),
}


def _resolved(parser: _Parser, values: dict[str, Any]) -> dict[str, Any]:
    # Parsed, not get_default(): the parser converts what stands as text in a dataclass ("no" to False).
    defaults = vars(parser.parse_args(["--model_name_or_path="]))
    kept = {}
    for name, value in values.items():
        if name not in _NOT_KEPT and value is not None and value != defaults[name]:
            kept[name] = getattr(value, "value", value)
    return kept
