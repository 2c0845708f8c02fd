"""Batches: the number of samples, which tensors can be cut, and the names of arguments."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PatchTSTConfig, PatchTSTForClassification

import cases
from adafreeze import ProbeError
from adafreeze.measure import Probe
from adafreeze.measure.draw import MOST_SAMPLES, collect
from adafreeze.model.batch import arguments, by_sample, packed, padded_tokens, real_tokens, repeated, rows_of, unpacked

IDS, MASK = torch.arange(3, 15).reshape(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
CPU = torch.device("cpu")


def same(one, other):
    return one.keys() == other.keys() and all(
        same(value, other[name]) if isinstance(value, dict) else torch.equal(value, other[name])
        for name, value in one.items()
    )


@pytest.mark.parametrize(
    ("batch", "rows", "padded", "real"),
    [
        ({"input_ids": IDS, "attention_mask": MASK}, 2, 12, 10),
        ({"labels": torch.ones(3), "input": {"input_ids": IDS, "attention_mask": MASK}}, 2, 12, 10),
        ({"anchor_input_ids": IDS, "anchor_attention_mask": MASK, "positive_input_ids": IDS}, 2, 24, 22),
        ({"labels": torch.ones(5), "token_ids": IDS}, 2, 12, 12),
        ({"past_values": torch.rand(3, 32, 2)}, 3, 3 * 64, 3 * 64),
        ({"input_features": torch.rand(2, 8, 20), "decoder_input_ids": IDS}, 2, 2 * 64, 2 * 64),
        ({"inputs_embeds": torch.rand(2, 6, 4), "attention_mask": MASK}, 2, 12, 10),
        ({"labels": torch.ones(5)}, 0, 0, 0),
    ],
)
def test_samples_and_tokens_of_a_batch(batch, rows, padded, real):
    assert (rows_of(batch), padded_tokens(batch), real_tokens(batch)) == (rows, padded, real)


@pytest.mark.parametrize(
    "extra",
    [
        {"pixel_values": torch.rand(24, 8), "image_grid_thw": torch.ones(2, 3)},  # two images, by accident
        {"pixel_values": torch.rand(2, 3, 4, 4)},  # maybe two of the first sample and none of the second
        {"position_ids": torch.ones(2, 3, 6)},  # the batch is the second dimension
        {"position_ids": torch.arange(6)[None]},
        {"images": [torch.rand(3, 4, 4), torch.rand(3, 5, 5)]},
        {"features": {"patches": torch.rand(7, 2)}},
    ],
)
def test_a_batch_without_one_entry_per_sample_is_not_cut(extra):
    batch = {"input_ids": IDS, "labels": torch.ones(2), **extra}
    assert by_sample({"input_ids": IDS, "labels": torch.ones(2)}) and not by_sample(batch)
    probe = Probe([batch])
    for whole in (probe, probe.shrunk(1), probe.head(1), probe.one_by_one()):
        assert whole.samples == 2 and len(whole.chunks) == 1 and whole.chunks[0].keys() == batch.keys()
        assert whole.chunks[0]["input_ids"].shape == IDS.shape
    assert probe.kinds(CPU)[0]["input_ids"].shape == IDS.shape


def images(samples):
    """Like Qwen-VL's: patches of all images in one tensor, and the grid of each image."""
    batch = {"input_ids": torch.stack([sample["input_ids"] for sample in samples])}
    with_image = [sample for sample in samples if "patches" in sample]
    if with_image:
        batch["pixel_values"] = torch.cat([sample["patches"] for sample in with_image])
        batch["image_grid_thw"] = torch.cat([sample["grid"] for sample in with_image])
    return batch


def mixed(index, images_of=lambda index: index % 2):
    count = images_of(index)
    sample = {"input_ids": torch.full((6,), index)}
    if count:
        sample |= {"patches": torch.full((4 * count, 8), float(index)), "grid": torch.tensor([[1, 2, 2]] * count)}
    return sample


@pytest.mark.parametrize("images_of", [lambda index: index % 2, lambda index: 2 * (index % 2), lambda index: 1])
def test_samples_with_images_are_drawn_one_by_one(images_of):
    loader = DataLoader([mixed(index, images_of) for index in range(40)], batch_size=2, collate_fn=images)
    probe = Probe.draw(loader)
    assert probe.samples == 40
    for chunk in probe.chunks:
        if "pixel_values" in chunk:
            index = int(chunk["input_ids"][0, 0])
            assert same(chunk, images([mixed(index, images_of)]))
    shrunk = probe.shrunk(7)
    assert shrunk.samples == 7 and shrunk.shrunk(7).digest() == shrunk.digest()


def test_kinds_has_the_smallest_sample_of_each_kind():
    lengths = {0: 9, 1: 7, 2: 4, 3: 8}

    def sample(index):
        one = mixed(index)
        return one | {"input_ids": torch.full((lengths[index],), index)}

    probe = Probe([images([sample(index)]) for index in range(4)])
    text, image = probe.kinds(CPU)
    assert same(text, images([sample(2)])) and same(image, images([sample(1)]))
    (only,) = Probe.draw(cases.loader("bert")).kinds(CPU)
    assert rows_of(only) == 1


def test_shrinking_twice_equals_shrinking_once():
    whole = [{"input_ids": torch.full((rows, 6), rows), "other": torch.ones(rows + 1)} for rows in (2, 5, 3, 4, 1)]
    free = [{"input_ids": torch.arange(8)[:, None].repeat(1, 6)}]
    probe = Probe([*whole, *free])
    for samples in range(1, 25):
        once = probe.shrunk(samples)
        assert once.samples <= max(samples, 2)
        assert probe.shrunk(once.samples).digest() == once.digest()


def test_a_micro_batch_has_the_shapes_of_a_batch():
    probe = Probe.draw(DataLoader([mixed(1), mixed(3)], collate_fn=images))
    real = images([mixed(1)] * 3)
    assert {n: v.shape for n, v in probe.micro_batch(3, CPU).items()} == {n: v.shape for n, v in real.items()}
    text = Probe([{"input": {"input_ids": IDS}}]).micro_batch(5, CPU)["input"]["input_ids"]
    assert text.shape == (5, 6) and text.stride(0) == 0, "no data"
    rotary = {"input_ids": IDS[:1], "position_ids": torch.ones(3, 1, 6), "pixel_values": torch.rand(4, 8)}
    assert repeated(rotary, 3)["position_ids"].shape == (3, 3, 6)
    together = {"input_ids": IDS, "position_ids": torch.arange(6)[None], "pixel_values": torch.rand(12, 8)}
    assert {n: len(v) for n, v in repeated(together, 3).items()} == {
        "input_ids": 4, "position_ids": 1, "pixel_values": 24,
    }  # fmt: skip


def test_tensors_with_unknown_names_are_cut_if_they_have_one_entry_per_sample():
    def collate(samples):
        ids = torch.stack([sample["input_ids"] for sample in samples])
        # Eight in all eight samples: two of every other one.
        nodes = [torch.full((2 * int(one["input_ids"][0] % 2), 3), 1.0) for one in samples]
        return {"input_ids": ids, "graph_nodes": torch.cat(nodes)}

    chunks = collect(DataLoader([mixed(index) for index in range(8)], collate_fn=collate), 100, 0, None)
    assert [len(chunk["input_ids"]) for chunk in chunks] == [1] * 8
    assert all(len(chunk["graph_nodes"]) == 2 * int(chunk["input_ids"][0, 0] % 2) for chunk in chunks)

    def regular(samples):
        return {"x": torch.stack([sample["input_ids"] for sample in samples])}

    chunks = collect(DataLoader([mixed(index) for index in range(8)], collate_fn=regular), 100, 0, None)
    assert [len(chunk["x"]) for chunk in chunks] == [8]


@dataclass
class AsDataclass:
    input_ids: torch.Tensor
    labels: torch.Tensor


AsTuple = namedtuple("AsTuple", ["input_ids", "labels"])


@pytest.mark.parametrize("kind", [dict, BatchEncoding, AsDataclass, AsTuple])
def test_collators_may_return_any_type_with_named_inputs(kind):
    def collate(samples):
        batch = cases.collate(samples)
        batch = {name: batch[name] for name in ("input_ids", "labels")}
        return kind(batch) if kind in (dict, BatchEncoding) else kind(**batch)

    loader = DataLoader(cases.Samples("bert", 40, length=8), collate_fn=collate)
    plain = DataLoader(cases.Samples("bert", 40, length=8), collate_fn=lambda some: dict(collate_dict(some)))
    assert Probe.draw(loader).digest() == Probe.draw(plain).digest()
    assert type(Probe.draw(collate([cases.sample("bert", 0, 8)])).chunks[0]) is dict


def collate_dict(samples):
    batch = cases.collate(samples)
    return {name: batch[name] for name in ("input_ids", "labels")}


@pytest.mark.parametrize("names", [False, True])
def test_collators_without_names_or_with_errors_are_refused(names):
    def collate(samples):
        if names:
            raise KeyError("text")
        return [sample["input_ids"] for sample in samples]

    with pytest.raises(ProbeError, match="KeyError: 'text'" if names else "A probe batch is a list") as caught:
        Probe.draw(DataLoader(cases.Samples("bert", 8), collate_fn=collate))
    assert "probe=[" in str(caught.value)


def test_a_dataset_with_changing_lengths_is_drawn_one_by_one():
    class Lengths(cases.Samples):
        asked = 0

        def __getitem__(self, index):
            self.asked += 1
            return cases.sample("bert", index, 5 + self.asked % 7)

    def stack(samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    probe = Probe.draw(DataLoader(Lengths("bert", 40), collate_fn=stack))
    assert probe.samples == 40 and len({chunk["input_ids"].shape[1] for chunk in probe.chunks}) > 1


def test_an_empty_last_batch_and_a_batch_of_one_are_accepted():
    batch = cases.batch("bert", 3)
    empty = {name: value[:0] for name, value in batch.items()}
    assert Probe([batch, {name: value[:1] for name, value in batch.items()}, empty]).samples == 4
    with pytest.raises(ProbeError, match="The probe is empty"):
        Probe([empty])


def test_a_loader_of_whole_batches_yields_its_batches():
    batches = [cases.batch("bert", rows) for rows in (3, 5)]
    probe = Probe.draw(DataLoader(batches, batch_size=None))
    assert sorted(rows_of(chunk) for chunk in probe.chunks) == [3, 5]


def test_only_the_samples_of_the_probe_are_drawn():
    class Counting(cases.Samples):
        asked = []  # noqa: RUF012

        def __getitem__(self, index):
            self.asked.append(index)
            assert len(self.asked) <= 32
            return super().__getitem__(index)

    assert Probe.draw(DataLoader(Counting("bert", MOST_SAMPLES), collate_fn=cases.collate), tokens=10).samples == 32


class Own(nn.Module):
    def forward(self, x, mask=None, *, scale=1.0):
        return x


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        return args


def test_positional_arguments_get_the_names_of_the_forward():
    assert same(arguments(Own(), (IDS, MASK), {"scale": IDS}), {"x": IDS, "mask": MASK, "scale": IDS})
    assert same(arguments(cases.lora_model("bert"), (IDS,), {"attention_mask": MASK}),
                {"input_ids": IDS, "attention_mask": MASK})  # fmt: skip
    assert same(arguments(Anything(), (IDS,), {}), {"input_ids": IDS})
    patched = Own()
    patched.forward = lambda *args, **kwargs: None
    assert same(arguments(patched, (IDS,), {}), {"x": IDS})


def test_a_wrapped_model_uses_the_names_of_its_inner_model():
    model = cases.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), cases.LoraConfig(target_modules=["0"])
    )  # PeftModel passes everything on
    assert same(arguments(model, (IDS,), {}), {"input": IDS})


def test_nested_features_survive_packing():
    batches = [{"input": {"input_ids": IDS, "mode": "query"}, "images": [torch.rand(2), torch.rand(3)]}]
    (again,) = unpacked(packed(batches))
    assert torch.equal(again["input"]["input_ids"], IDS) and again["input"]["mode"] == "query"
    assert all(torch.equal(a, b) for a, b in zip(again["images"], batches[0]["images"], strict=True))
    assert Probe([{"input": {"input_ids": IDS}}]).digest() != Probe([{"input": {"input_ids": IDS + 1}}]).digest()


def test_a_time_series_model_can_be_measured():
    config = PatchTSTConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16, num_hidden_layers=3,
        num_attention_heads=2, ffn_dim=32, num_targets=2,
    )  # fmt: skip
    model = cases.get_peft_model(
        PatchTSTForClassification(config), cases.LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    from adafreeze import Safe

    safe = Safe(model, probe=[{"past_values": torch.rand(4, 32, 2)}], total_steps=10)
    assert safe.decider.probe.samples == 4 and len(safe.units) == 3
    safe.close()
