"""Pre-trained models and tokenizers, from a folder or the Hub, with errors that say what to type instead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ModelError
from ._hub import first_line, hub_reason

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Source", "load_config", "load_image_processor", "load_model", "load_tokenizer"]

_FILES = {"configuration": "a complete config.json.", "preprocessor": "preprocessor_config.json too."}


@dataclass(frozen=True)
class Source:
    """Where the pre-trained weights come from: the arguments of ``from_pretrained``.

    Args:
        name: a folder, or a name on the Hub.
        tokenizer: the same for the tokenizer; None: as ``name``.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept.
        token: access token of the Hub.
        trust_remote_code: run code that comes with the model.
        dtype: ``"auto"`` (as saved), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        ignore_mismatched_sizes: replace a saved head of another size by a new one.
    """

    name: str
    tokenizer: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    ignore_mismatched_sizes: bool = False

    def _options(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


def load_model(auto_class: Any, source: Source, **config: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained`` of ``source``; ``config`` changes fields of the model's configuration.

    Raises:
        ModelError: the folder does not exist, the Hub cannot be reached or does not have it, or the files do
            not make a model of this class.
    """
    _check_folder(source.name, "--model_name_or_path")
    try:
        return auto_class.from_pretrained(
            source.name,
            dtype=source.dtype,
            ignore_mismatched_sizes=source.ignore_mismatched_sizes,
            **source._options(),
            **config,
        )
    # Any type can come out of here: OSError, ValueError, RuntimeError, safetensors' and pickle's own, remote
    # code's.
    except Exception as error:
        _refuse("model", source.name, error, "--model_name_or_path")


def load_config(source: Source) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Raises:
        ModelError: as for ``load_model``.
    """
    from transformers import AutoConfig

    _check_folder(source.name, "--model_name_or_path")
    try:
        return AutoConfig.from_pretrained(source.name, **source._options())
    except Exception as error:
        _refuse("configuration", source.name, error, "--model_name_or_path")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token: where it has none (Llama, GPT-2) the end-of-text token pads.

    Raises:
        ModelError: as for ``load_model``, or there is neither a padding nor an end-of-text token.
    """
    from transformers import AutoTokenizer

    name, flag = (
        source.tokenizer or source.name,
        "--tokenizer_name" if source.tokenizer else "--model_name_or_path",
    )
    _check_folder(name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source._options())
    except Exception as error:
        _refuse("tokenizer", name, error, flag)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"The tokenizer {name} has neither a padding nor an end-of-text token.",
                cause="Rows of different lengths cannot be put into one batch without padding.",
                fix='tokenizer.pad_token = "<pad>"; tokenizer.save_pretrained(DIR); --tokenizer_name DIR',
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(source: Source) -> Any:
    """What makes pixels of an image as the model was trained on them.

    Raises:
        ModelError: as for ``load_model``.
    """
    from transformers import AutoImageProcessor

    _check_folder(source.name, "--model_name_or_path")
    try:
        return AutoImageProcessor.from_pretrained(source.name, **source._options())
    except Exception as error:
        _refuse("preprocessor", source.name, error, "--model_name_or_path")


def _check_folder(name: str, flag: str) -> None:
    # A name on the Hub is "model" or "owner/model"; anything else can only be meant as a path. Asked first,
    # because transformers answers a mistyped path with the Hub's rules for repository names.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path and not Path(name).expanduser().is_dir():
        raise ModelError(
            f"The folder {name} does not exist.",
            cause=f"{flag} must be a folder written by save_pretrained, or a name on the Hub such as "
            "bert-base-uncased.",
            fix=f"Correct {flag}; `ls -d {Path(name).parent}/*` shows what is there.",
        )


def _refuse(what: str, name: str, error: Exception, flag: str) -> NoReturn:
    reason = None if Path(name).expanduser().is_dir() else hub_reason(error)
    if reason == "unreachable":
        raise ModelError(
            f"The {what} {name!r} cannot be fetched: the Hugging Face Hub is unreachable.",
            cause="There is no folder of that name here, it is not in the download cache, and there is no "
            "connection to huggingface.co (or HF_HUB_OFFLINE is set).",
            fix=f"Give a local folder: {flag} path/to/{name.split('/')[-1]}",
        ) from error
    if reason is not None:
        raise ModelError(
            f"The Hugging Face Hub does not give out a {what} {name!r}.",
            cause="There is none of that name or revision, or it is private or gated and needs your token.",
            fix=f"Correct {flag}, or pass --token hf_...",
        ) from error
    if "mismatch" in str(error):
        raise ModelError(
            f"The head that is saved with the {what} {name} does not fit the task.",
            cause="It has another number of outputs than the data has labels.",
            fix="Add --ignore_mismatched_sizes to start with a new head.",
        ) from error
    raise ModelError(
        f"The {what} {name} cannot be loaded: {first_line(error)}",
        cause=f"The files there are no {what} that transformers can use for this task.",
        fix=f"Point {flag} to a folder with " + _FILES.get(what, "config.json, weights and tokenizer files."),
    ) from error
