"""Rows for a tiny model, made from the argument names of its forward pass, with and without padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .case import BOS, EOS, FIRST_WORD, IMAGE, MASK, ROWS, VOCABULARY, Row

CHOICES = 3
# Text lengths including special tokens: in any order, three batches of four rows have padding.
LENGTHS = (9, 12, 10, 12, 8, 12, 11, 12, 7, 12, 10, 9)
FIXED = 16


def candidates(model: nn.Module, head: str) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
    """Candidate rows, most realistic first."""
    names = set(inspect.signature(model.forward).parameters)
    maker = _MAKERS[head]
    yield from maker(model, names)


class Draw:
    """Random values from its own generator."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def words(self, length: int) -> torch.Tensor:
        """Token ids from BOS to EOS."""
        ids = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=self.generator)
        ids[0], ids[-1] = BOS, EOS
        return ids

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


def _lengths() -> Iterator[tuple[int, ...]]:
    yield LENGTHS
    for fixed in (FIXED, 32, 64):
        yield (fixed,) * ROWS


def _text(draw: Draw, names: set[str], length: int) -> Row:
    ids = draw.words(length)
    row: Row = {"input_ids": ids}
    if "attention_mask" in names:
        row["attention_mask"] = torch.ones_like(ids)
    return row


def _of_text(label: Any) -> Any:
    def make(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
        if label is _target and "input_features" in names:
            from .media import sounds

            yield from sounds(model, names)
        for lengths in _lengths():
            draw = Draw()
            rows = []
            for index, length in enumerate(lengths):
                row = _text(draw, names, length)
                if "bbox" in names:
                    corner = torch.randint(0, 500, (length, 2), generator=draw.generator)
                    row["bbox"] = torch.cat([corner, corner + 100], dim=1)
                rows.append(label(row, draw, index))
            if "attention_mask" not in names and len(set(lengths)) > 1:
                continue
            yield rows, ()
            if "pixel_values" in names:
                for row in rows:
                    row["pixel_values"] = draw.normal(3, IMAGE, IMAGE)
                yield rows, ()

    return make


def _class(row: Row, draw: Draw, index: int) -> Row:
    return row | {"labels": torch.tensor(index % 2)}


def _next_words(row: Row, draw: Draw, index: int) -> Row:
    return row | {"labels": row["input_ids"].clone()}


def _masked(row: Row, draw: Draw, index: int) -> Row:
    ids, labels = row["input_ids"].clone(), torch.full_like(row["input_ids"], -100)
    for place in (1 + index % 3, 5):
        labels[place], ids[place] = ids[place], MASK
    return row | {"input_ids": ids, "labels": labels}


def _answer(row: Row, draw: Draw, index: int) -> Row:
    return row | {"start_positions": torch.tensor(1 + index % 3), "end_positions": torch.tensor(4 + index % 2)}


def _tags(row: Row, draw: Draw, index: int) -> Row:
    return row | {"labels": row["input_ids"] % 2}


def _target(row: Row, draw: Draw, index: int) -> Row:
    return row | {"labels": draw.words(5 + index % 3)}


def _choices(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
    for rows, _ in _of_text(lambda row, draw, index: row)(model, names):
        lengths = [len(row["input_ids"]) for row in rows]
        draw, made = Draw(1), []
        for index, length in enumerate(lengths):
            options = [_text(draw, names, length) for _ in range(CHOICES)]
            row = {name: torch.stack([option[name] for option in options]) for name in options[0]}
            if "bbox" in names:
                row["bbox"] = torch.stack([rows[index]["bbox"]] * CHOICES)
            made.append(row | {"labels": torch.tensor(index % CHOICES)})
        yield made, ()


def image_size(model: nn.Module) -> tuple[int, int, int]:
    config = model.config
    config = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(config, "image_size", IMAGE)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return channels if isinstance(channels, int) else 3, height, width


def _images(label: Any) -> Any:
    def make(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
        if "spatial_shapes" in names:
            from .media import pixels

            for images in pixels(model, names):
                yield [label(image, Draw(), index) for index, image in enumerate(images)], ()
        channels, height, width = image_size(model)
        name = "pixel_values" if "pixel_values" in names else "inputs"
        sizes = dict.fromkeys([(height, width), (IMAGE, IMAGE), (64, 64), (128, 128), (224, 224)])
        for height, width in sizes:
            draw = Draw()
            yield [label({name: draw.normal(channels, height, width)}, draw, index) for index in range(ROWS)], ()

    return make


def _map(row: Row, draw: Draw, index: int) -> Row:
    height, width = row["pixel_values"].shape[-2:]
    return row | {"labels": torch.randint(0, 2, (height, width), generator=draw.generator)}


def _hidden_patches(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
    for rows, together in _images(lambda row, draw, index: row)(model, names):
        patch = getattr(model.config, "patch_size", 8)
        count = (rows[0]["pixel_values"].shape[-1] // patch) ** 2
        for n in (count, count // 4, count // 16):
            masks = [torch.arange(n) % (2 + index % 2) == 0 for index in range(ROWS)]
            yield [row | {"bool_masked_pos": mask} for row, mask in zip(rows, masks, strict=True)], together


def _video(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
    channels, height, width = image_size(model)
    name = "pixel_values" if "pixel_values" in names else "pixel_values_videos"
    for frames in (getattr(model.config, "num_frames", 4), getattr(model.config, "frames_per_clip", 4), 2):
        draw = Draw()
        yield (
            [
                {name: draw.normal(frames, channels, height, width), "labels": torch.tensor(index % 2)}
                for index in range(ROWS)
            ],
            (),
        )


def sound(draw: Draw, model: nn.Module, names: set[str], kind: int, index: int) -> Row:
    """Waveforms of two lengths, or spectrograms in the model's order."""
    config = (
        getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", None) or model.config
    )
    bins = next(
        (
            value
            for name in ("num_mel_bins", "feature_projection_input_dim", "n_mels", "input_feat_per_channel")
            if isinstance(value := getattr(config, name, None), int)
        ),
        16,
    )
    if "input_values" in names and "input_features" not in names:
        if kind >= 2:
            return {"input_values": draw.normal((1024, 64)[kind - 2], bins)}
        length = (2400, 3200, 2800, 3200)[index % 4] if kind == 0 else 3200
        row = {"input_values": draw.normal(length)}
        if kind == 0 and "attention_mask" in names:
            row["attention_mask"] = torch.ones(length, dtype=torch.long)
        return row
    length = 2 * getattr(config, "max_source_positions", 64)
    shape = [(bins, length), (64, bins), (bins, 64), (128, bins)][kind]
    row = {"input_features": draw.normal(*shape)}
    if "attention_mask" in names and shape[1] == bins:
        row["attention_mask"] = torch.ones(shape[0], dtype=torch.long)
    return row


def _of_sound(label: Any) -> Any:
    def make(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
        if label is _target and "input_ids" in names:
            from .media import sounds

            yield from sounds(model, names)
        for kind in range(4):
            draw = Draw()
            yield [label(sound(draw, model, names, kind, index), draw, index) for index in range(ROWS)], ()

    return make


def _letters(row: Row, draw: Draw, index: int) -> Row:
    return row | {"labels": draw.words(3)[:2] % 16 + FIRST_WORD}


def _image_and_text(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
    from .media import pictures

    yield from pictures(model, names)


def _pairs(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
    """Pairs of picture and text for a contrastive loss."""
    from .media import pixels

    for images in pixels(model, names):
        for lengths in (LENGTHS, (FIXED,) * ROWS):
            draw = Draw()
            yield (
                [
                    _text(draw, names, length) | image | {"return_loss": True}
                    for length, image in zip(lengths, images, strict=True)
                ],
                (),
            )


def _series(model: nn.Module, names: set[str]) -> Iterator[tuple[list[Row], tuple[str, ...]]]:
    config, draw = model.config, Draw()
    if "past_time_features" in names:
        past = config.context_length + max(config.lags_sequence)
        features = config.num_time_features
        yield (
            [
                {
                    "past_values": draw.normal(past),
                    "past_time_features": draw.normal(past, features),
                    "past_observed_mask": torch.ones(past),
                    "future_values": draw.normal(config.prediction_length),
                    "future_time_features": draw.normal(config.prediction_length, features),
                }
                for _ in range(ROWS)
            ],
            (),
        )
    length, channels = getattr(config, "context_length", 32), getattr(config, "num_input_channels", 1)
    for past, future in ((draw.normal, draw.normal),):
        yield (
            [
                {"past_values": past(length, channels), "future_values": future(config.prediction_length, channels)}
                for _ in range(ROWS)
            ],
            (),
        )


_MAKERS: dict[str, Any] = {
    "sequence classification": _of_text(_class),
    "causal LM": _of_text(_next_words),
    "masked LM": _of_text(_masked),
    "seq2seq LM": _of_text(_target),
    "multiple choice": _choices,
    "token classification": _of_text(_tags),
    "question answering": _of_text(_answer),
    "image classification": _images(_class),
    "masked image modeling": _hidden_patches,
    "semantic segmentation": _images(_map),
    "video classification": _video,
    "audio classification": _of_sound(_class),
    "CTC": _of_sound(_letters),
    "speech seq2seq": _of_sound(_target),
    "image-text-to-text": _image_and_text,
    "image-text contrastive": _pairs,
    "time series prediction": _series,
}
