"""Loading pre-trained models, configurations and processors, from a folder or the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .data import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Source", "load", "load_tokenizer"]


@dataclass(frozen=True)
class Source:
    """Arguments of ``from_pretrained``.

    Args:
        name: a folder, or a name on the Hub.
        tokenizer: the same for the tokenizer; None: ``name``.
        dtype: ``"auto"`` (as saved), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        ignore_mismatched_sizes: replace a saved head of another size by a new one.
        offload: where blocks and input embeddings stay until they are needed: ``"disk"`` or ``"cpu"``; None: nowhere.
    """

    name: str
    tokenizer: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    ignore_mismatched_sizes: bool = False
    offload: str | None = None


def load(auto_class: str, source: Source, **options: Any) -> Any:
    """``from_pretrained`` of a class of transformers, such as ``"AutoConfig"``.

    Raises:
        ModelError: the folder does not exist, the Hub cannot be reached or has no such model, or the files do not fit
            the class.
    """
    import transformers

    name, flag = source.name, "--model_name_or_path"
    if auto_class == "AutoTokenizer" and source.tokenizer is not None:
        name, flag = source.tokenizer, "--tokenizer_name"
    # Hub names are "model" or "owner/model". Check anything else here: for a mistyped path transformers would explain
    # the Hub's rules for names.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path and not Path(name).expanduser().is_dir():
        raise ModelError(
            f"The folder {name} does not exist.",
            fix=f"Correct {flag}; `ls -d {Path(name).parent}/*` shows the folders there.",
        )
    hub = {key: getattr(source, key) for key in ("revision", "cache_dir", "token", "trust_remote_code")}
    try:
        return getattr(transformers, auto_class).from_pretrained(name, **hub, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, and those of safetensors, pickle, remote code
        if "mismatch" in str(error):
            raise ModelError(
                f"The saved head of {name} has another number of outputs than the task needs.",
                fix="Add --ignore_mismatched_sizes to start with a new head.",
            ) from error
        raise ModelError(
            f"{name!r} cannot be loaded by {auto_class}: {first_line(error)}",
            fix=f"Point {flag} to a folder with config.json, weights and tokenizer files, or to a model on the Hub "
            "(private or gated models need --token hf_...).",
        ) from error


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load a tokenizer; if it has no padding token (Llama, GPT-2), the end-of-text token pads.

    Raises:
        ModelError: as for ``load``, or there is neither a padding nor an end-of-text token.
    """
    tokenizer = load("AutoTokenizer", source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"The tokenizer {source.tokenizer or source.name} has neither a padding nor an end-of-text token.",
                fix='tokenizer.pad_token = "<pad>"; tokenizer.save_pretrained(DIR); --tokenizer_name DIR',
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
