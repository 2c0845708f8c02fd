"""A tiny vision transformer, saved as a folder, and folders of images of one color per class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

SIZE = 8
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def save_vit(folder: Path) -> str:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=4,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


def blocks_of(folder: str) -> list[str]:
    """The names of the blocks; they differ between versions of transformers."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    return [name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer"]


def images(folder: Path, count: int = 4, classes: tuple[str, ...] = ("blue", "red")) -> str:
    """``count`` noisy images of each class, in one sub-folder per class: one color each, several sizes."""
    draw = np.random.default_rng(0)
    for channel, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 60, (12 + index, 10, 3), dtype=np.uint8)
            pixels[..., -1 - channel] += 180
            Image.fromarray(pixels).save(folder / name / f"{index}.{('png', 'jpg')[index % 2]}")
    return str(folder)
