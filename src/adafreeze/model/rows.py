"""The samples of one forward pass: their keys, and their inputs without padding."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from .batch import rows_of

__all__ = ["NotBySample", "PackedRows", "Rows", "Span", "samples_in"]

Span = tuple[int, int]
"""First position of a sample that is not padding, and the one after its last."""

# Of the whole batch: the number differs from batch to batch, so it cannot be part of a sample's key. Before any look-up
# a pass with another number (``otherwise``) shows that it does not reach the prefix.
OF_THE_BATCH = ("num_items_in_batch", "logits_to_keep")
# Texts whose padding the mask marks; in other inputs padding is removed only if all of it is one value.
_TEXTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask"),
    *("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask"),
}


# Where the documents of a packed row begin and end, for attention and convolutions.
_BOUNDS, _LONGEST, _INDEX = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k"), "seq_idx"


class NotBySample(Exception):
    """The inputs cannot be split by sample; the text is the reason."""


class Rows:
    """The inputs of one forward pass, sample by sample.

    Args:
        inputs: arguments of the model by name.
        encoder_decoder: the decoder has its own text, and labels for it.
        whole: treat padding as content, so that a sample is its whole row.

    Raises:
        NotBySample: an input does not have one entry per sample (packed rows, block masks, a key-value cache).
    """

    def __init__(self, inputs: Mapping[str, Any], *, encoder_decoder: bool = False, whole: bool = False) -> None:
        self.inputs = dict(inputs)
        self.count = rows_of(self.inputs)
        if not self.count:
            raise NotBySample("no input is a tensor with one entry per sample")
        self._encoder_decoder = encoder_decoder
        self._read_inputs()
        self._widths = (
            self._width("attention_mask", "input_ids", "inputs_embeds"),
            self._width("decoder_input_ids", "decoder_inputs_embeds", "labels") if encoder_decoder else 0,
        )
        if whole:
            self._spans = tuple([(0, width)] * self.count for width in self._widths)
        else:
            self._spans = (self._encoder_spans(), self._decoder_spans() if encoder_decoder else [])

    def _read_inputs(self) -> None:
        self._read: dict[str, Tensor] = {}
        self._context: list[str] = []
        self._flags: list[str] = []
        for name, value in self.inputs.items():
            self._sort(name, value)
        self._host = _on_host(self._read)

    def _sort(self, name: str, value: Any) -> None:
        """Everything the model receives is part of the key, whether it reaches the prefix or not."""
        if name in OF_THE_BATCH:
            return
        if isinstance(value, Tensor) and value.ndim and len(value) == self.count:
            self._read[name] = value.detach()
        elif isinstance(value, Tensor) and value.ndim:
            raise NotBySample(f"{name} has the shape {tuple(value.shape)}, which is not one entry per sample")
        elif isinstance(value, bool):
            self._flags.append(f"{name}={value}")
        elif isinstance(value, (int, float, str)):
            self._context.append(f"{name}={value}")
        elif isinstance(value, Tensor):
            self._context.append(f"{name}={value.item()}")
        elif value is not None:
            raise NotBySample(f"{name} is a {type(value).__name__}")

    def signature(self) -> tuple[Any, ...]:
        """Names, ranks and dtypes of the inputs, whether there are several samples, and whether any side is padded."""
        tensors = sorted((name, value.ndim, str(value.dtype)) for name, value in self._read.items())
        others = sorted(name for name in self.inputs if name not in self._read)
        plain = (*self._context, *self._flags)
        return tuple(tensors), tuple(others), plain, self.count > 1, tuple(map(self.is_padded, (0, 1)))

    is_packed = False
    """Whether the samples are documents in one row."""

    def positions(self, side: int, group: Sequence[int]) -> int:
        """Width of the tensors in a pass over these samples."""
        return self._widths[side]

    def width(self, side: int) -> int:
        """Positions of a row in the encoder (side 0) or decoder (side 1); 0: unknown."""
        return self._widths[side]

    def spans(self, side: int) -> Sequence[Span]:
        """The unpadded part of each sample."""
        return self._spans[side]

    def length(self, row: int) -> int:
        """Positions of a sample without its padding, in the encoder."""
        first, last = self._spans[0][row]
        return last - first

    def is_padded(self, side: int) -> bool:
        """Whether any position is padding."""
        return any(span != (0, self._widths[side]) for span in self._spans[side])

    def keys(self, salt: str = "", *, flags: bool = True) -> list[bytes]:
        """A 128-bit hash per sample of its unpadded inputs, their names, shapes and dtypes, and ``salt``.

        Args:
            salt: whatever else tells samples apart.
            flags: arguments that are True or False (``use_cache``) tell them apart, too.
        """
        context = f"{salt};{';'.join([*self._context, *(self._flags if flags else [])])}"
        return [self._key(row, context) for row in range(self.count)]

    def _key(self, row: int, context: str) -> bytes:
        digest = xxhash.xxh3_128(context.encode())
        for name, (shape, data) in sorted(self._host.items()):
            side = 1 if self._encoder_decoder and (name == "labels" or name.startswith("decoder_")) else 0
            width = self._widths[side]
            row_bytes = data[row]
            if width and shape[:1] == (width,):
                first, last = self._spans[side][row]
                each = len(row_bytes) // width
                inside, outside = row_bytes[first * each : last * each], row_bytes.reshape(width, -1)
                outside = np.concatenate((outside[:first], outside[last:]))
                if name in _TEXTS or bool((outside == outside[:1]).all()):
                    row_bytes, shape = inside, (last - first, *shape[1:])
            digest.update(f";{name}{shape}{self._read[name].dtype};".encode())
            digest.update(row_bytes.data)
        return digest.digest()

    def otherwise(self) -> dict[str, Any]:
        """The inputs with other values for those in ``OF_THE_BATCH``."""
        numbers = {name: self.inputs.get(name) for name in OF_THE_BATCH}
        return self.inputs | {name: n + 1 for name, n in numbers.items() if isinstance(n, (int, float, Tensor))}

    def without_flags(self) -> dict[str, Any] | None:
        """The inputs without those that are True or False; None if there are none."""
        if not self._flags:
            return None
        return {name: value for name, value in self.inputs.items() if not isinstance(value, bool)}

    def take(self, rows: Sequence[int], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The inputs (default: the batch's own) of these samples, at the width of the batch."""
        inputs = self.inputs if inputs is None else inputs
        if list(rows) == list(range(self.count)):
            return dict(inputs)
        index: dict[torch.device, Tensor] = {}
        taken = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == self.count:
                if value.device not in index:
                    index[value.device] = torch.tensor(rows, device=value.device)
                value = value[index[value.device]]
            taken[name] = value
        return taken

    def some(self, rows: Sequence[int]) -> Rows:
        """These samples, at the width of the batch."""
        return Rows(self.take(rows), encoder_decoder=self._encoder_decoder)

    def alone(self, row: int) -> dict[str, Any]:
        """The inputs of one sample without its padding; those of a decoder stay as they are."""
        taken = self.take([row]) if self.count > 1 else dict(self.inputs)
        first, last = self._spans[0][row]
        for name, value in taken.items():
            inside = name in self._read and name != "labels" and not name.startswith("decoder_")
            if inside and value.ndim > 1 and value.shape[1] == self._widths[0]:
                taken[name] = value[:, first:last]
        return taken

    def _width(self, *names: str) -> int:
        """Positions of the first of these inputs that has any; 0 without one."""
        found = (self._read[name].shape[1] for name in names if name in self._read and self._read[name].ndim > 1)
        return next(found, 0)

    def _encoder_spans(self) -> list[Span]:
        mask = self._read.get("attention_mask")
        width = self._widths[0]
        if mask is None or mask.ndim != 2 or not width:
            return [(0, width)] * self.count
        real = self._values("attention_mask") != 0
        first = real.argmax(1)
        last = width - real[:, ::-1].argmax(1)
        return [(int(a), int(b)) if some else (0, width) for a, b, some in zip(first, last, real.any(1), strict=True)]

    def _decoder_spans(self) -> list[Span]:
        # Right padding only: a decoder is causal, so positions before the padding do not depend on it.
        width = self._widths[1]
        labels = self._read.get("labels")
        if "decoder_attention_mask" in self._read:
            real = self._values("decoder_attention_mask") != 0
        elif labels is not None and labels.ndim == 2:
            real = self._values("labels") != -100
        else:
            return [(0, width)] * self.count
        last = real.shape[1] - real[:, ::-1].argmax(1)
        return [(0, int(b)) if some else (0, width) for b, some in zip(last, real.any(1), strict=True)]

    def _values(self, name: str) -> np.ndarray:
        """A 2-D integer input on the host."""
        tensor = self._read[name]
        flat = torch.from_numpy(self._host[name][1]).view(tensor.dtype)
        return flat.reshape(tensor.shape).to(torch.int64).numpy()


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """For each input the shape of one sample, and bytes as (samples, bytes); one transfer per accelerator."""
    flat = {name: tensor.contiguous().view(torch.uint8).reshape(-1) for name, tensor in tensors.items()}
    for device in {data.device for data in flat.values() if data.device.type != "cpu"}:
        names = [name for name, data in flat.items() if data.device == device]
        names.sort(key=lambda name: -tensors[name].element_size())  # keeps each aligned for its dtype
        together = torch.cat([flat[name] for name in names]).cpu()
        pieces = together.split([len(flat[name]) for name in names])
        flat.update(zip(names, pieces, strict=True))
    return {
        name: (tuple(tensors[name].shape[1:]), data.numpy().reshape(len(tensors[name]), -1))
        for name, data in flat.items()
    }


def samples_in(inputs: Mapping[str, Any], *, encoder_decoder: bool = False, whole: bool = False) -> Rows:
    """The samples of one forward pass: its rows, or the documents of a packed row; arguments and errors as ``Rows``."""
    bounds = _documents(inputs) if not encoder_decoder else None
    return Rows(inputs, encoder_decoder=encoder_decoder, whole=whole) if bounds is None else PackedRows(inputs, bounds)


def _documents(inputs: Mapping[str, Any]) -> list[int] | None:
    """Where the documents of a packed row begin, and its end; None for rows that are not packed."""
    given: Any = next((inputs[name] for name in _BOUNDS if isinstance(inputs.get(name), Tensor)), None)
    positions: Any = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    if len(positions) != 1 or not positions.shape[1]:
        return None
    # As transformers finds them (find_packed_sequence_indices, 5.23).
    breaks = (positions[0].diff() != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), positions.shape[1]]
    if given is None:
        return bounds if len(bounds) > 2 else None
    if given.tolist() != bounds:
        raise NotBySample("cu_seq_lens and position_ids do not begin documents at the same positions")
    return bounds


class PackedRows(Rows):
    """The documents of a packed row (``position_ids`` begin again, no mask), as samples.

    Seen as rows, they are padded on the right to the longest one.

    Args:
        inputs: arguments of the model by name.
        bounds: first position of each document, and the end.

    Raises:
        NotBySample: an input has not one entry per position.
    """

    is_packed = True

    def __init__(self, inputs: Mapping[str, Any], bounds: Sequence[int]) -> None:
        self.inputs = dict(inputs)
        self.count, self._bounds = len(bounds) - 1, list(bounds)
        self._encoder_decoder = False
        self._read_inputs()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        self._widths = (max(lengths), 0)
        self._spans = ([(0, length) for length in lengths], [])

    def _sort(self, name: str, value: Any) -> None:
        if name in (*_BOUNDS, *_LONGEST, _INDEX):
            return  # as position_ids
        if isinstance(value, Tensor) and value.ndim:
            if value.shape[:2] != (1, self._bounds[-1]):
                raise NotBySample(f"{name} has the shape {tuple(value.shape)}, which is not one entry per position")
            self._read[name] = value.detach()
        elif name not in OF_THE_BATCH:
            super()._sort(name, value)

    def positions(self, side: int, group: Sequence[int]) -> int:
        """Width of the row into which these documents are packed."""
        return sum(map(self.length, group))

    def signature(self) -> tuple[Any, ...]:
        """As that of rows, and that they are packed."""
        return (*super().signature(), "packed")

    def is_padded(self, side: int) -> bool:
        """Never."""
        return False

    def _key(self, row: int, context: str) -> bytes:
        digest = xxhash.xxh3_128(context.encode())
        start, end = self._bounds[row : row + 2]
        for name, (shape, data) in sorted(self._host.items()):
            each = len(data[0]) // self._bounds[-1]
            digest.update(f";{name}{(end - start, *shape[1:])}{self._read[name].dtype};".encode())
            digest.update(data[0][start * each : end * each].data)
        return digest.digest()

    def take(self, rows: Sequence[int], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """These documents, in this order, packed into one row."""
        inputs = self.inputs if inputs is None else inputs
        if list(rows) == list(range(self.count)):
            return dict(inputs)
        spans = [(self._bounds[row], self._bounds[row + 1]) for row in rows]
        lengths = torch.tensor([end - start for start, end in spans])
        taken = {}
        for name, value in inputs.items():
            if name in self._read:
                value = torch.cat([value[:, start:end] for start, end in spans], 1)
            elif name in _BOUNDS and value is not None:
                value = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(value)
            elif name in _LONGEST and value is not None:
                value = type(value)(int(lengths.max())) if not isinstance(value, Tensor) else lengths.max().to(value)
            elif name == _INDEX and value is not None:
                value = torch.repeat_interleave(torch.arange(len(rows)), lengths)[None].to(value)
            taken[name] = value
        return taken

    def alone(self, row: int) -> dict[str, Any]:
        """The inputs of one document."""
        return self.take([row])
