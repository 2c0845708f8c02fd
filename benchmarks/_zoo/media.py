"""Rows of text with a picture or a sound; the number of its tokens is found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .case import ROWS, Row
from .rows import LENGTHS, Draw, image_size, sound

# Candidate numbers of tokens for a picture or sound.
TOKENS = (16, 4, 1, 5, 17, 8, 9, 2, 3, 6, 12, 13, 18, 20, 24, 25, 32, 34, 36, 40, 48, 64, 65, 80, 96, 100, 128, 256)
Made = tuple[list[Row], tuple[str, ...]]


def pictures(model: nn.Module, names: set[str]) -> Iterator[Made]:
    """One picture before each text: patches with a grid, or whole pictures in a known order."""
    if "image_grid_thw" in names:
        yield from _grids(model, names)
    token = _token(model, "image_token_id", "image_token_index")
    for media in pixels(model, names):
        yield from _with_media(names, token, media, lengths=LENGTHS)
    for media in pixels(model, names):
        yield from _with_media(names, token, media, lengths=(12,) * ROWS)


def sounds(model: nn.Module, names: set[str]) -> Iterator[Made]:
    """One sound before each text."""
    token = _token(model, "audio_token_id", "audio_token_index")
    for kind in range(4):
        draw = Draw(1)
        media = [sound(draw, model, names, kind, index) for index in range(ROWS)]
        for one in media:
            mask = one.pop("attention_mask", None)
            shape = one[next(iter(one))].shape
            if "input_features_mask" in names:
                one["input_features_mask"] = torch.ones(shape[-1], dtype=torch.long) if mask is None else mask
            if "feature_attention_mask" in names:
                one["feature_attention_mask"] = torch.ones(shape[-1], dtype=torch.long)
        yield from _with_media(names, token, media, lengths=LENGTHS)


def _token(model: nn.Module, *names: str) -> int | None:
    found = (getattr(model.config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _with_media(names: set[str], token: int | None, media: list[Row], lengths: tuple[int, ...]) -> Iterator[Made]:
    for count in TOKENS if token is not None else (0,):
        draw, rows = Draw(), []
        for length, one in zip(lengths, media, strict=True):
            rows.append(_text(draw, names, length, token, count) | one)
        yield rows, ()


def _text(draw: Draw, names: set[str], length: int, token: int | None, count: int) -> Row:
    ids = draw.words(length)
    if token is not None:
        ids = torch.cat([ids[:1], torch.full((count,), token), ids[1:]])
    row: Row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if token is not None:
        row["labels"][ids == token] = -100
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names:
            row[name] = (ids == token).long()
    if "qformer_input_ids" in names:
        row["qformer_input_ids"] = draw.words(length)
    if "decoder_input_ids" in names and "labels" in names:
        row["labels"] = draw.words(6)
    return row


def pixels(model: nn.Module, names: set[str]) -> Iterator[list[Row]]:
    channels, height, width = image_size(model)
    draw = Draw(1)
    if "flattened_patches" in names:
        config = getattr(model.config, "vision_config", model.config)
        depth = config.patch_embed_hidden_size if hasattr(config, "patch_embed_hidden_size") else 768
        patches = [draw.normal(16, depth) for _ in range(ROWS)]
        yield [{"flattened_patches": one} for one in patches]
        return
    if "spatial_shapes" in names:
        patch = getattr(model.config, "vision_config", model.config).patch_size
        yield [
            {
                "pixel_values": draw.normal(16, channels * patch * patch),
                "pixel_attention_mask": torch.ones(16, dtype=torch.long),
                "spatial_shapes": torch.tensor([4, 4]),
            }
            for _ in range(ROWS)
        ]
        return
    if "image_position_ids" in names:
        patch, side = model.config.vision_config.patch_size, height // model.config.vision_config.patch_size
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
        yield [
            {"pixel_values": draw.normal(side * side, channels * patch * patch), "image_position_ids": places}
            for _ in range(ROWS)
        ]
        return
    for shape in ((channels, height, width), (1, channels, height, width), (2, channels, height, width)):
        images = [draw.normal(*shape) for _ in range(ROWS)]
        rows = [{"pixel_values": image} for image in images]
        yield rows
        if "image_sizes" in names:
            yield [row | {"image_sizes": torch.tensor([height, width])} for row in rows]


def _grids(model: nn.Module, names: set[str]) -> Iterator[Made]:
    """Concatenated patches of all pictures of a batch, and (frames, height, width) of each."""
    vision = model.config.vision_config
    merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
    merge = merge if isinstance(merge, int) else merge[0]
    patch = vision.patch_size
    frames = getattr(vision, "temporal_patch_size", 1) or 1
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    token = _token(model, "image_token_id", "image_token_index")
    for shape in ((channels * frames * patch * patch,), (channels, frames, patch, patch), (channels, patch, patch)):
        draw, rows = Draw(), []
        for index, length in enumerate(LENGTHS):
            height, width = (2 * merge, 2 * merge) if index % 2 else (merge, 2 * merge)
            row: dict[str, Any] = _text(draw, names, length, token, height * width // merge**2)
            row["pixel_values"] = draw.normal(height * width, *shape)
            row["image_grid_thw"] = torch.tensor([[1, height, width]])
            if "image_merge_sizes" in names:
                row["image_merge_sizes"] = torch.tensor([merge])
            rows.append(row)
        together = ("pixel_values", "image_grid_thw", "image_merge_sizes")
        yield rows, tuple(name for name in together if name in rows[0])
