"""Batches of model inputs: their samples and tokens, how to cut and pack them; and the calls that pass them."""

from __future__ import annotations

import base64
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .blocks import base_model

__all__ = [
    "CHUNK", "INPUTS", "REAL_TOKENS", "Call", "Chunk",
    "arguments", "as_mapping", "by_sample", "called_by_column", "chunks_of", "columns_of", "cut", "forward_names",
    "leaves", "loss_in", "main_input", "masks", "packed", "padded_tokens", "real_tokens", "repeated", "rows_of",
    "tensors_as_text", "tensors_of_text", "unpacked", "with_features",
]  # fmt: skip

Chunk = dict[str, Any]
"""Keyword arguments of a model; one of them may be a dictionary of features."""

# Samples in one forward pass of the probe: enough to be efficient, few enough to cut finely.
CHUNK = 8

# A mask for the probe only. It has its own name because passing it to the model would change the result.
REAL_TOKENS = "real_tokens"

INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")

# Only the model knows the positions of an image, a sound or a time series; this estimate per sample is enough.
UNKNOWN_TOKENS = 64

# Marks a tensor among the plain values of a packed batch; no input has this name.
_TENSOR = "<tensor>"


def as_mapping(batch: Any) -> Chunk | None:
    """The inputs of a mapping, dataclass or named tuple by name; None for a batch without names."""
    if isinstance(batch, Mapping):
        return {str(name): as_mapping(value) if isinstance(value, Mapping) else value for name, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return as_mapping({field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)})
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return as_mapping(batch._asdict())
    return None


def arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Chunk:
    """The arguments of a call of ``model``, by the names of its forward's parameters.

    >>> arguments(nn.Linear(2, 2), ["x"], {})
    {'input': 'x'}
    """
    return {**dict(zip(forward_names(model), args, strict=False)), **kwargs} if args else dict(kwargs)


def forward_names(model: nn.Module) -> list[str]:
    """Names of the positional parameters of its forward."""
    # Of the class: the instance may have another forward.
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not names and base_model(model) is not model:  # PeftModel passes everything on
        return forward_names(base_model(model))
    return names or [INPUTS[0]]


def called_by_column(model: nn.Module) -> bool:
    """Whether ``model`` is of sentence-transformers, whose losses call it on each column of a batch."""
    return any(kind.__module__.partition(".")[0] == "sentence_transformers" for kind in type(base_model(model)).__mro__)


def with_features(batches: Any, model: nn.Module) -> Any:
    """A batch or list of batches for ``model``; of sentence-transformers' features as the one argument that it takes.

    So ``model.preprocess(texts)`` is a batch, as what a tokenizer returns is one for other models.
    """
    if isinstance(batches, list):
        return [with_features(batch, model) for batch in batches]
    features, argument = as_mapping(batches), forward_names(model)[0]
    return batches if features is None or argument in features else {argument: features}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of names, value) of all values in nested dictionaries."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    else:
        yield path, value


def _kind(name: str) -> str | None:
    """The known input that ``name`` ends with (``"anchor_input_ids"``); None for inputs of a decoder."""
    if name.startswith("decoder_"):
        return None
    return next((known for known in INPUTS if name == known or name.endswith(f"_{known}")), None)


def columns_of(batch: Mapping[str, Any]) -> list[Chunk]:
    """The inputs of each column of a batch whose names begin with that of the column.

    >>> columns_of({"a_input_ids": 1, "a_attention_mask": 2, "b_input_ids": 3, "label": 4})
    [{'input_ids': 1, 'attention_mask': 2}, {'input_ids': 3}]
    """
    kinds = {name: kind for name in batch if (kind := _kind(name)) not in (None, name)}
    prefixes = dict.fromkeys(name.removesuffix(str(kind)) for name, kind in kinds.items())
    return [
        {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}
        for prefix in prefixes
    ]


def main_input(chunk: Mapping[str, Any]) -> Tensor | None:
    """The input whose first dimension is the batch: a known name, else a known kind, else the first but labels."""
    tensors = {path: value for path, value in leaves(chunk) if isinstance(value, Tensor) and value.ndim}
    known = {path: _kind(path[-1]) for path in tensors}
    for paths in ([path for path in known if path[-1] in INPUTS], [path for path, kind in known.items() if kind]):
        if paths:
            return tensors[min(paths, key=lambda path: INPUTS.index(str(known[path])))]
    return next((value for path, value in tensors.items() if "label" not in path[-1]), None)


def rows_of(chunk: Mapping[str, Any]) -> int:
    """The number of samples: the first dimension of the main input.

    >>> rows_of({"labels": torch.ones(3), "input": {"token_ids": torch.ones(2, 5)}})
    2
    """
    found = main_input(chunk)
    return 0 if found is None else len(found)


def by_sample(chunk: Mapping[str, Any]) -> bool:
    """Whether every tensor has one entry per sample, so that the chunk can be cut.

    Equal lengths are not enough: one tensor may contain the images of all samples, two of one and none of another. So
    a chunk with media beside text, with a list, or with a tensor of another length stays whole.

    >>> by_sample({"input_ids": torch.ones(2, 5), "labels": torch.ones(2)})
    True
    >>> by_sample({"input_ids": torch.ones(2, 5), "labels": torch.ones(2), "image_grid_thw": torch.ones(1, 3)})
    False
    """
    rows, kinds = rows_of(chunk), set()
    for path, value in leaves(chunk):
        name = path[-1] if path else ""
        if isinstance(value, Tensor) and value.ndim:
            if len(value) != rows or _batch_dimension(name, value):
                return False
            kinds |= {kind for kind in INPUTS if kind in name and not name.startswith("decoder_")}
        elif not isinstance(value, (Tensor, bool, int, float, str, type(None))):
            return False
    return rows > 0 and len(kinds) < 2


def _batch_dimension(name: str, value: Tensor) -> int:
    # Multimodal rotary positions: one table each for time, height and width.
    return int(name == "position_ids" and value.ndim == 3)


def cut(chunk: Chunk, rows: Any) -> Chunk:
    """Some samples (indices or a slice) of a chunk that is ``by_sample``."""
    return tree_map_only(Tensor, lambda value: value[rows] if value.ndim else value, chunk)


def chunks_of(batch: Chunk) -> Iterator[Chunk]:
    """Cut a batch into chunks of CHUNK samples, if it can be cut."""
    rows = rows_of(batch)
    if rows <= CHUNK or not by_sample(batch):
        yield batch
        return
    for start in range(0, rows, CHUNK):
        yield cut(batch, slice(start, start + CHUNK))


def repeated(chunk: Chunk, rows: int) -> Chunk:
    """Repeat the samples of a chunk up to at least ``rows``; one sample is expanded, without using memory."""
    count = rows_of(chunk)
    times = -(-rows // count)

    def longer(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: longer(inner, item) for inner, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([*value] * times)
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        dimension = _batch_dimension(name, value)
        if value.shape[dimension] == 1:
            return value if count > 1 else value.expand(*value.shape[:dimension], rows, *value.shape[dimension + 1 :])
        return torch.cat([value] * times, dimension)

    return {name: longer(name, value) for name, value in chunk.items()}


def _texts(chunk: Mapping[str, Any]) -> list[tuple[int, Tensor | None]]:
    """Positions of each text among the inputs, and its (samples, tokens) mask."""
    found = dict(leaves(chunk))
    texts: list[tuple[int, Tensor | None]] = []
    for path, value in found.items():
        kind = _kind(path[-1])
        if kind not in INPUTS[:2] or not isinstance(value, Tensor):
            continue
        mask = found.get((*path[:-1], path[-1].removesuffix(kind) + "attention_mask"))
        positions = value.numel() // (value.shape[-1] if kind == "inputs_embeds" else 1)
        texts.append((positions, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None))
    return texts


def masks(chunk: Mapping[str, Any]) -> list[Tensor]:
    """The padding masks of a chunk, the probe's own first."""
    own = chunk.get(REAL_TOKENS)
    every = {path: value for path, value in leaves(chunk) if path[-1].endswith("attention_mask")}
    named = [value for path, value in every.items() if not path[-1].startswith("decoder_")]
    return [mask for mask in (own, *named) if isinstance(mask, Tensor)]


def padded_tokens(chunk: Mapping[str, Any]) -> int:
    """Positions that the model computes, padding included."""
    texts = _texts(chunk)
    if texts:
        return sum(positions for positions, _ in texts)
    main = main_input(chunk)
    is_text = main is not None and main.ndim == 2 and not main.is_floating_point()
    return main.numel() if main is not None and is_text else UNKNOWN_TOKENS * rows_of(chunk)


def real_tokens(chunk: Mapping[str, Any]) -> int:
    """Positions that are not padding."""
    own = chunk.get(REAL_TOKENS)
    if isinstance(own, Tensor):
        return int(own.sum())
    texts = _texts(chunk)
    if texts:
        return sum(positions if mask is None else int(mask.sum()) for positions, mask in texts)
    return padded_tokens(chunk)


def tensors_as_text(tensors: Mapping[str, Tensor]) -> str:
    """Tensors by name, as base64 safetensors."""
    return base64.b64encode(save(dict(tensors))).decode()


def tensors_of_text(text: str) -> dict[str, Tensor]:
    """Undo ``tensors_as_text``."""
    return load(base64.b64decode(text))


def packed(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of tensors and JSON values as JSON values; tensors become base64 safetensors.

    >>> batch = {"input": {"input_ids": torch.tensor([[1, 2]])}, "use_cache": False}
    >>> unpacked(packed([batch]))
    [{'input': {'input_ids': tensor([[1, 2]])}, 'use_cache': False}]
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # safetensors refuses shared storages
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    rest = [plain(batch) for batch in batches]
    return {"tensors": tensors_as_text(tensors), "rest": rest}


def unpacked(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Undo ``packed``; tuples come back as lists."""
    tensors = tensors_of_text(state["tensors"])

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tensors[value[_TENSOR]] if _TENSOR in value else {name: whole(item) for name, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    return [whole(batch) for batch in state["rest"]]


@dataclass(frozen=True)
class Call:
    """One call of a module, with a name for every argument.

    Hosts call a model with keywords (Trainer), positional tensors, or one dictionary of features
    (sentence-transformers).

    Attributes:
        module: the called module.
        inputs: name to value; a value inside a dictionary has its key as its name.
        places: name to (position or keyword, key in the dictionary there or None).
        positions: number of positional arguments.
    """

    module: nn.Module
    inputs: dict[str, Any]
    places: dict[str, tuple[int | str, Any]]
    positions: int

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Name the arguments of a call of ``module``."""
        names = forward_names(module)
        inputs: dict[str, Any] = {}
        places: dict[str, tuple[int | str, Any]] = {}

        def add(name: str, place: int | str, value: Any) -> None:
            entries = [(name, None, value)]
            if isinstance(value, Mapping):
                entries = [(str(key), key, item) for key, item in value.items()]
            for short, key, item in entries:
                free = short if short not in inputs else f"{name}.{short}"
                inputs[free], places[free] = item, (place, key)

        for position, value in enumerate(args):
            add(names[position] if position < len(names) else f"argument {position}", position, value)
        for name, value in kwargs.items():
            add(name, name, value)
        return cls(module, inputs, places, len(args))

    def arguments(self, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other values; dictionaries are new, since a model may write into its inputs."""
        found: dict[int | str, Any] = {}
        for name, value in inputs.items():
            place, key = self.places[name]
            if key is None:
                found[place] = value
            else:
                found.setdefault(place, {})[key] = value
        args = tuple(found.pop(position, {}) for position in range(self.positions))
        return args, {str(name): value for name, value in found.items()}


def loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output: its ``loss``, or the first entry of a tuple."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", output)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None
