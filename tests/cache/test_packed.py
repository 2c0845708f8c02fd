"""Documents of packed rows are found again in other rows, where attention keeps them apart."""

import random

import pytest
import torch
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adafreeze import SafeConfig
from adafreeze.model.rows import NotBySample, PackedRows, samples_in
from cached_run import BLOCKS, config, counts, train
from cases import lora_model, sample

DOCUMENTS = 24


def documents():
    return [sample("llama", index, length=5 + index % 7)["input_ids"].tolist() for index in range(DOCUMENTS)]


def trl_rows(chosen):
    """As TRL's ``packing=True``."""
    one = {"input_ids": [i for ids in chosen for i in ids], "seq_lengths": [len(ids) for ids in chosen]}
    return dict(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([one]))


def flattened(chosen):
    """As transformers' padding-free collator."""
    return dict(DataCollatorWithFlattening()([{"input_ids": ids} for ids in chosen]))


def epochs(collator, count=3, per_row=6):
    chance, found = random.Random(0), documents()
    for _ in range(count):
        chance.shuffle(found)
        for start in range(0, DOCUMENTS, per_row):
            # As TRL calls the model: with a key-value cache transformers does not look for documents.
            yield {**collator(found[start : start + per_row]), "use_cache": False}


@pytest.mark.parametrize("collator", [trl_rows, flattened])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_documents_are_found_in_other_rows(family, collator):
    batches, runs = list(epochs(collator)), []
    for cache in ("ram", "off"):
        model = lora_model(family, BLOCKS, dropout=0.0)
        runs.append(train(family, config({1: 2, 9: 3}, cache), batches, model=model, count=len(batches) // 3))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert runs[0][2].cache.off_because is None
    hits, advanced, misses = counts(runs[0][2])
    assert hits + advanced >= DOCUMENTS - 6 and misses <= DOCUMENTS  # the first row shows how it is packed


def test_attention_over_the_whole_row_is_noticed():
    class Whole(torch.nn.Module):
        def forward(self, hidden):
            return hidden + hidden.mean(1, keepdim=True)

    batches, runs = list(epochs(trl_rows)), []
    for cache in ("ram", "off"):
        model = lora_model("llama", BLOCKS, dropout=0.0)
        layer = model.base_model.model.model.layers[0]
        layer.input_layernorm = torch.nn.Sequential(layer.input_layernorm, Whole())
        runs.append(train("llama", config({1: 2}, cache), batches, model=model, count=len(batches) // 3))
    assert runs[0][0] == runs[1][0]
    assert "attend to each other" in runs[0][2].cache.off_because


def test_a_document_has_one_key_in_every_row():
    texts = documents()
    one, other = samples_in(trl_rows(texts[:4])), samples_in(trl_rows([texts[2], texts[0]]))
    assert isinstance(one, PackedRows) and one.count == 4 and one.length(2) == len(texts[2])
    assert [one.keys()[2], one.keys()[0]] == other.keys()
    assert len(set(one.keys())) == 4


@pytest.mark.parametrize("collator", [trl_rows, flattened])
def test_some_documents_are_packed_as_the_collator_does(collator):
    texts = documents()
    taken = samples_in(collator(texts[:5])).take([3, 1])
    expected = collator([texts[3], texts[1]])
    assert taken.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(taken[name]), torch.as_tensor(value)), name
        assert not isinstance(value, torch.Tensor) or taken[name].dtype == value.dtype


def test_a_document_that_is_cut_in_two_is_found_by_its_parts():
    texts = documents()
    parts = [texts[0][:3], texts[0][3:]]
    whole, apart = samples_in(trl_rows([texts[1], texts[0]])), samples_in(trl_rows([texts[1], *parts]))
    again = samples_in(trl_rows([parts[1], texts[2]]))
    assert apart.keys()[0] == whole.keys()[0] and apart.keys()[2] == again.keys()[0]
    assert not {*apart.keys()[1:]} & {*whole.keys()[1:]}


def test_bounds_that_contradict_the_positions_are_refused():
    batch = trl_rows(documents()[:3])
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"] + 1
    with pytest.raises(NotBySample, match="same positions"):
        samples_in(batch)


def test_kept_documents_are_not_served_where_attention_mixes_them(tmp_path):
    """With a key-value cache transformers does not look for documents, and attention runs over the whole row."""
    batches = [{name: value for name, value in one.items() if name != "use_cache"} for one in epochs(flattened)]
    runs = []
    for folder, use_cache in ((tmp_path, False), (tmp_path, True), (None, True)):
        model = lora_model("llama", BLOCKS, dropout=0.0)
        model.config.use_cache = use_cache
        kept = {"keep_cache": True, "cache_dir": folder} if folder is not None else {"cache": "off"}
        settings = SafeConfig(
            freeze_at_start=0.5, policy=lambda _: [], warmup=1.0, ramp_end=1.0, score="random", **kept
        )
        runs.append(train("llama", settings, batches, model=model, count=len(batches) // 3))
    assert runs[0][2].cache.off_because is None and counts(runs[0][2])[0] >= DOCUMENTS
    assert runs[1][0] == runs[2][0] and "attend to each other" in runs[1][2].cache.off_because
