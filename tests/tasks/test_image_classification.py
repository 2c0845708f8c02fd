from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from adafreeze.errors import ConfigError, DataError, ModelError
from adafreeze.tasks import ImageClassification, Source, load_splits
from adafreeze.tasks.adapters import head_names
from image_cases import SIZE, images, save_vit


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source(save_vit(tmp_path_factory.mktemp("vit")))


def refused(pattern: str, call) -> None:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert re.search(pattern, text, re.DOTALL) and "Fix: " in text, text


def test_pixels_equal_a_computation_by_hand(tmp_path, source):
    task = ImageClassification()
    rows, _ = load_splits(task, train_file=images(tmp_path / "a"))
    processor = task.load_processor(source)
    prepared = task.prepare(rows, processor)
    assert task.names == ["blue", "red"] and [prepared[i]["labels"] for i in range(8)] == [0] * 4 + [1] * 4
    # By hand: resized, scaled to [0, 1], then to mean and deviation of a half.
    image = Pillow.open(tmp_path / "a" / "blue" / "0.png").resize((SIZE, SIZE), Pillow.Resampling.BILINEAR)
    by_hand = torch.tensor(list(image.tobytes())).view(SIZE, SIZE, 3).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(prepared[0]["pixel_values"], by_hand.float(), rtol=0, atol=1e-6)
    batch = task.collator(processor)([prepared[0], prepared[5]])
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE) and batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, source, mode):
    folder = Path(images(tmp_path / "a", 1))
    suffix = "jpg" if mode == "CMYK" else "png"
    Pillow.new(mode, (9, 7)).save(folder / "blue" / f"other.{suffix}")
    task = ImageClassification()
    rows, _ = load_splits(task, train_file=str(folder))
    prepared = task.prepare(rows, task.load_processor(source))
    assert [prepared[i]["pixel_values"].shape for i in range(3)] == [(3, SIZE, SIZE)] * 3


def test_classes_of_two_folders_match_by_name(tmp_path):
    train, other = images(tmp_path / "a"), images(tmp_path / "b", classes=("red",))
    task = ImageClassification()
    _, rows = load_splits(task, train_file=train, validation_file=other)
    assert task.label_ids(rows) == [1] * 4
    other = images(tmp_path / "c", classes=("blue", "green"))
    pattern = r"green/0\.png: the label 'green' is not in the training data \(known: 'blue', 'red'\)"
    refused(pattern, lambda: load_splits(ImageClassification(), train_file=train, validation_file=other))


def test_images_in_a_parquet_file_or_on_the_hub(tmp_path, source, monkeypatch):
    files = sorted(Path(images(tmp_path / "a")).rglob("*.*"))
    features = Features({"img": Image(), "label": Value("string")})
    rows = [{"img": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name} for file in files]
    data = Dataset.from_list(rows, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    task = ImageClassification()
    found, _ = load_splits(task, train_file=str(tmp_path / "a.parquet"))
    assert task.image_column == "img"
    assert task.prepare(found, task.load_processor(source))[7]["pixel_values"].shape == (3, SIZE, SIZE)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(train=data, validation=data))
    assert len(load_splits(ImageClassification(), dataset_name="owner/images")[1]) == 8


def test_a_folder_that_cannot_be_used(tmp_path):
    def train(folder: Path):
        return lambda: load_splits(ImageClassification(), train_file=str(folder))

    refused(r"folder .*no does not exist", train(tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    refused(r"empty cannot be read as a folder of images.*one sub-folder per class", train(tmp_path / "empty"))
    refused(r"only one class", train(Path(images(tmp_path / "one", classes=("red",)))))
    refused(r"only one class", train(tmp_path / "one" / "red"))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_file_that_is_not_an_image_is_named(tmp_path, content):
    folder = Path(images(tmp_path / "a"))
    whole = (folder / "red" / "2.png").read_bytes()
    (folder / "red" / "2.png").write_bytes(whole[:-30] if content is None else content)
    refused(
        r"a, red/2\.png: the image cannot be read.*--skip_bad_rows",
        lambda: load_splits(ImageClassification(), train_file=str(folder)),
    )


def test_a_truncated_jpeg_is_named_on_access(tmp_path, source):
    # Its header is whole, and JPEG has no checksum.
    folder = Path(images(tmp_path / "a"))
    file = folder / "blue" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-40])
    task = ImageClassification()
    rows, _ = load_splits(task, train_file=str(folder))
    prepared = task.prepare(rows, task.load_processor(source))
    refused(r"blue/1\.jpg cannot be decoded.*truncated", lambda: prepared[1])


def test_a_column_without_images(tmp_path):
    Dataset.from_list([{"image": "a.png", "label": 0}, {"image": "b.png", "label": 1}]).to_parquet(
        tmp_path / "a.parquet"
    )
    file = str(tmp_path / "a.parquet")
    refused(r"row 1: column 'image' contains no image", lambda: load_splits(ImageClassification(), train_file=file))
    task = ImageClassification(image_column="photo")
    refused(r"no column 'photo'.*--image_column image", lambda: load_splits(task, train_file=file))


def test_a_model_without_a_processor(tmp_path):
    save_vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded by AutoImageProcessor: .*preprocessor_config\.json"):
        ImageClassification().load_processor(Source(str(tmp_path)))


def test_without_pillow_the_fix_is_a_line_to_paste(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"needs Pillow(.|\n)*pip install"):
        ImageClassification()


def test_the_head_is_outside_the_base_model(source):
    task = ImageClassification()
    task.names = ["a", "b", "c"]
    model = task.load_model(Source(source.name, ignore_mismatched_sizes=True))
    assert head_names(model) == ["classifier"] and model.classifier.out_features == 3
