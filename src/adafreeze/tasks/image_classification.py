"""Image classification: predict the label of an image."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.data import Dataset as MapDataset

from ..errors import ConfigError, DataError
from .classification import Classification
from .data import Split, first_line, load_file, quiet
from .pretrained import Source, load

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ImageClassification", "Images"]


@dataclass
class ImageClassification(Classification):
    """Predict the label of an image.

    Images are read when needed, by the model's image processor. They are the same in every epoch (no random crop), so
    the prefix cache finds them.

    Args:
        image_column: None: ``image`` or ``img``.

    Raises:
        ConfigError: Pillow is not installed.
    """

    image_column: str | None = None

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    peft_task_type: ClassVar[None] = None

    def __post_init__(self) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--task {self.name} needs Pillow, which is not installed.", fix='pip install "adafreeze[vision]"'
            ) from error

    def read(self, path: str, cache_dir: str | None = None) -> Split:
        """Read a folder with one sub-folder of images per class, or a file with images (parquet)."""
        folder = Path(path).expanduser()
        return load_file(path, cache_dir) if folder.is_file() else _read_folder(folder, path, cache_dir)

    def columns(self, found: list[str]) -> tuple[str, str]:
        """The image column and the label column."""
        self.image_column = self.image_column or next((name for name in ("image", "img") if name in found), "image")
        return "image_column", "label_column"

    def faults(self, split: Split) -> dict[int, str]:
        """Rows without a readable image or without a usable label."""
        faults = self.label_faults(split)
        for index, image in enumerate(_undecoded(split.rows, self.image_column)):
            if not isinstance(image, dict):
                faults.setdefault(index, f"column {self.image_column!r} contains no image")
                continue
            try:
                with _open(image) as opened:
                    opened.verify()  # the header, and checksums if the format has them; decoding would take minutes
            except Exception as error:
                faults.setdefault(index, f"the image cannot be read: {first_line(error)}")
        return faults

    def load_processor(self, source: Source) -> Any:
        """Load the image processor of the model."""
        return load("AutoImageProcessor", source)

    def prepare(self, rows: Dataset, processor: Any) -> Images:
        """Pixels and label ids, read on access."""
        return Images(_undecoded(rows, self.image_column), self.label_ids(rows), processor)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Stacks images of one size."""
        from transformers import default_data_collator

        return default_data_collator


class Images(MapDataset):
    """``pixel_values`` (channels, height, width) and ``labels`` of each row.

    Not ``datasets.Dataset.with_transform``: Trainer would drop the image column, which the model does not take.

    Args:
        images: ``{"path": ..., "bytes": ...}`` of each row.
    """

    def __init__(self, images: Any, labels: list[int], processor: Any) -> None:
        self.images, self.labels, self.processor = images, labels, processor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode one image; raises ``DataError`` if it is damaged."""
        image = self.images[int(index)]
        try:
            with _open(image) as opened:
                pixels = self.processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        except Exception as error:
            raise DataError(
                f"The image {image['path'] or f'of row {index + 1}'} cannot be decoded: {first_line(error)}",
                fix="Replace or remove the file.",
            ) from error
        return {"pixel_values": pixels, "labels": self.labels[index]}


def _undecoded(rows: Dataset, column: Any) -> Any:
    from datasets import Image

    if not isinstance(rows.features[column], Image):
        return rows[column]
    return rows.cast_column(column, Image(decode=False))[column]


def _open(image: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


def _read_folder(folder: Path, name: str, cache_dir: str | None) -> Split:
    from datasets import load_dataset

    if not folder.is_dir():
        raise DataError(f"The folder {name} does not exist.", fix="Correct the path, or give a file of images.")
    # A metadata file contains the labels.
    options = {} if any(folder.rglob("metadata.*")) else {"drop_labels": False}
    try:
        with quiet():
            rows = load_dataset(
                "imagefolder", data_files={"train": f"{folder}/**"}, split="train", cache_dir=cache_dir, **options
            )
    except Exception as error:
        raise DataError(
            f"{name} cannot be read as a folder of images: {first_line(error)}",
            fix=f"Use one sub-folder per class: {folder / 'cat' / '1.jpg'}, {folder / 'dog' / '2.jpg'}",
        ) from error
    paths = [image["path"] for image in _undecoded(rows, "image")]
    return Split(rows, name, lambda index: str(Path(paths[index]).relative_to(folder.resolve())))
