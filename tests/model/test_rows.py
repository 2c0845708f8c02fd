"""A sample's key depends on all its unpadded inputs, and on nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adafreeze.model.rows import NotBySample, Rows
from cases import batch, collate, sample


def key(rows: Rows, row: int) -> bytes:
    return rows.keys()[row]


def padded(one, left, right, **more):
    """One sample with padding on both sides."""
    fill = {"labels": -100}
    values = {
        name: torch.nn.functional.pad(value, (left, right), value=fill.get(name, 0)) if value.ndim else value
        for name, value in one.items()
    }
    return {name: value[None] for name, value in {**values, **more}.items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(0, 9), st.integers(0, 9), st.sampled_from(["bert", "llama", "gpt2"]))
def test_padding_and_other_samples_do_not_change_a_key(index, left, right, family):
    one = sample(family, index)
    alone = Rows(padded(one, 0, 0))
    among = Rows(collate([sample(family, index + 1, 15), one, sample(family, index + 2)]))
    assert key(alone, 0) == key(Rows(padded(one, left, right)), 0) == key(among, 1) != key(among, 0)
    length = len(one["input_ids"])
    assert Rows(padded(one, left, right)).spans(0) == [(left, left + length)]
    assert Rows(padded(one, left, right)).is_padded(0) == bool(left or right)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.data())
def test_any_change_of_the_sample_changes_its_key(index, data):
    one = sample("bert", index)
    length = len(one["input_ids"])
    one |= {"token_type_ids": torch.zeros(length, dtype=torch.long), "position_ids": torch.arange(length)}
    before = key(Rows(padded(one, 0, 3)), 0)
    name = data.draw(st.sampled_from(["input_ids", "token_type_ids", "position_ids", "attention_mask"]))
    place = data.draw(st.integers(1, length - 2))
    changed = one[name].clone()
    changed[place] = 1 - changed[place] if name == "attention_mask" else changed[place] + 1
    assert key(Rows(padded({**one, name: changed}, 0, 3)), 0) != before
    assert key(Rows(padded({**one, name: one[name].int()}, 0, 3)), 0) != before  # another dtype is another input


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("name", ["labels", "label_input_ids", "start_positions", "weights"])
def test_every_input_is_part_of_the_key(family, name):
    inputs = batch(family) | {name: torch.arange(4)}
    other = inputs | {name: inputs[name] + 4}
    rows = [Rows(one, encoder_decoder=family == "t5") for one in (inputs, other)]
    assert not {key(rows[0], n) for n in range(4)} & {key(rows[1], n) for n in range(4)}


def test_numbers_of_the_whole_batch_are_not_part_of_a_key():
    inputs = batch("llama") | {"num_items_in_batch": torch.tensor(7)}
    rows = Rows(inputs)
    assert [key(rows, n) for n in range(4)] == [key(Rows(batch("llama")), n) for n in range(4)]
    otherwise = rows.otherwise()
    assert int(otherwise["num_items_in_batch"]) == 8 and otherwise["input_ids"] is inputs["input_ids"]


def test_labels_beyond_the_text_are_padding_only_if_they_are_one_value():
    one = padded(sample("bert", 1) | {"labels": torch.arange(9)}, 0, 3)
    assert one["labels"].shape == one["input_ids"].shape
    other, longer = dict(one), dict(one)
    other["labels"] = one["labels"].clone()
    other["labels"][0, -1] = 7
    longer = padded(sample("bert", 1) | {"labels": torch.arange(9)}, 0, 5)
    assert key(Rows(one), 0) == key(Rows(longer), 0) != key(Rows(other), 0)


def test_labels_of_a_decoder_without_their_padding():
    one = batch("t5", rows=1)
    longer = one | {"labels": torch.nn.functional.pad(one["labels"], (0, 4), value=-100)}
    short, long = (Rows(inputs, encoder_decoder=True) for inputs in (one, longer))
    assert key(short, 0) == key(long, 0)
    assert (short.width(1), long.width(1), long.spans(1)) == (6, 10, [(0, 6)])


def test_whole_rows_include_padding():
    one = sample("bert", 1)
    rows = [Rows(padded(one, 0, right), whole=True) for right in (0, 2)]
    assert key(rows[0], 0) != key(rows[1], 0) and not rows[1].is_padded(0)


def test_images_and_embeddings():
    inputs = batch("vit")
    keys = {key(Rows(inputs), n) for n in range(4)}
    inputs["pixel_values"][2, 0, 5, 5] += 1e-6
    assert len(keys) == 4 and len(keys - {key(Rows(inputs), n) for n in range(4)}) == 1
    embedded = {"inputs_embeds": torch.randn(3, 7, 8).bfloat16(), "attention_mask": torch.ones(3, 7)}
    assert len({key(Rows(embedded), n) for n in range(3)}) == 3 and Rows(embedded).width(0) == 7


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "not one entry per sample"),
        ({"position_ids": torch.zeros(3, 4, 12)}, "not one entry per sample"),
        ({"attention_mask": {"full": torch.ones(4, 12)}}, "is a dict"),
    ],
)
def test_inputs_without_one_entry_per_sample_are_refused(more, reason):
    with pytest.raises(NotBySample, match=reason):
        Rows(batch("llama", rows=4) | more)


def test_calls_without_a_tensor_are_refused():
    with pytest.raises(NotBySample, match="no input is a tensor"):
        Rows({"use_cache": True})


def test_take_keeps_the_width_and_alone_removes_the_padding():
    inputs = collate([sample("bert", 0, 12), sample("bert", 1, 8)]) | {"num_items_in_batch": torch.tensor(2)}
    rows = Rows(inputs)
    taken = rows.take([1])
    assert taken["input_ids"].shape == (1, 12) and taken["num_items_in_batch"] == 2 and len(taken["labels"]) == 1
    alone = rows.alone(1)
    assert alone["input_ids"].shape == alone["attention_mask"].shape == (1, 8)
    assert all(rows.take([0, 1])[name] is value for name, value in inputs.items())


def test_without_a_mask_a_row_is_whole():
    rows = Rows({"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    assert rows.spans(0) == [(0, 5), (0, 5)] and rows.width(0) == 5
