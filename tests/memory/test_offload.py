"""The weights of the frozen prefix leave the device, and training, evaluation and everything saved stay the same."""

import copy
import io

import pytest
import torch
from torch import nn

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from adafreeze import RunError, Safe
from adafreeze.model import find_stacks
from adafreeze.model.offloaded import Offloaded
from cached_run import BLOCKS, assert_same, config, epochs, train
from cases import FAMILIES, adapter, base_model, batch, collate, loader, lora_model, sample

HALF = BLOCKS // 2


def settings(tmp_path, offload="disk", **more):
    return config(
        {0: HALF}, cache_dir=tmp_path, **{"cache": "auto", "offload": offload, "freeze_at_start": 0.5, **more}
    )


def untied(family, **lora):
    model = lora_model(family, BLOCKS, **lora)
    head = model.get_output_embeddings() if family in ("llama", "qwen3", "gpt2", "t5") else None
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return model


def resident_share(model):
    sizes = [(p.nbytes, p.is_meta) for p in model.parameters()]
    return sum(size for size, away in sizes if not away) / sum(size for size, _ in sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_to_the_bit(family, tmp_path):
    batches, shares = list(epochs(family)), []
    away = train(
        family, settings(tmp_path), batches, model=untied(family), after=lambda _, m: shares.append(resident_share(m))
    )
    assert min(shares) < 0.75, shares
    assert max(shares) == 1.0
    assert [event["event"] for event in away[2].journal.events if event["event"].startswith("offload")] == ["offload"]
    assert_same(away, train(family, settings(tmp_path, "off"), batches, model=untied(family)))
    assert not any(path.name.startswith("offload-") for path in tmp_path.iterdir())


def away_model(family, tmp_path, **more):
    """A model whose prefix is away before step 0, and an optimizer, and its Safe."""
    model = untied(family, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = loader(family, 16)
    safe = Safe(
        model, settings(tmp_path, fill="before", **more), optimizer=optimizer, probe=data, total_steps=12,
        samples_per_step=4,
    )  # fmt: skip
    return model, optimizer, data, safe


def off(family, tmp_path, **more):
    return away_model(family, tmp_path, offload="off", **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_is_the_same(family, tmp_path):
    """Evaluation, generation, copies, what is saved, and the merged model."""
    model, _, _, safe = away_model(family, tmp_path)
    assert resident_share(model) < 0.75
    other, _, _, others = off(family, tmp_path)
    assert resident_share(other) == 1.0
    unseen = batch(family, 6, 14)

    def same(one, another):
        assert all(map(torch.equal, one.state_dict().values(), another.state_dict().values()))
        with torch.no_grad():
            assert torch.equal(one.eval()(**unseen).logits, another.eval()(**unseen).logits)

    same(model, other)
    if family in ("gpt2", "llama", "qwen3", "t5"):
        prompt = {"input_ids": unseen["input_ids"][:, :5], "attention_mask": unseen["attention_mask"][:, :5]}
        texts = [one.generate(**prompt, max_new_tokens=8, do_sample=False) for one in (model, other)]
        assert torch.equal(*texts)
    copied = copy.deepcopy(model)
    assert not any(isinstance(p, Offloaded) for p in copied.parameters())
    same(copied, other)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    same(torch.load(buffer, weights_only=False), other)
    model.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "two")
    saved = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert saved[0] == saved[1]
    assert model.device == other.device
    assert resident_share(model) < 0.75, "nothing of this brought the weights back for good"
    same(model.merge_and_unload(), other.merge_and_unload())
    safe.close()
    others.close()
    assert resident_share(model) == 1.0
    assert not any(isinstance(p, Offloaded) for p in model.parameters())


def test_after_close_the_parameters_are_the_same_objects(tmp_path):
    model = untied("llama", dropout=0.0)
    before = {name: (id(p), p.detach().clone(), p.requires_grad, type(p)) for name, p in model.named_parameters()}
    data = loader("llama", 16)
    safe = Safe(model, settings(tmp_path, fill="before"), probe=data, total_steps=12, samples_per_step=4)
    assert [id(p) for p in model.parameters()] == [one[0] for one in before.values()]
    safe.close()
    for name, p in model.named_parameters():
        key, value, trains, kind = before[name]
        assert (id(p), p.requires_grad, type(p)) == (key, trains, kind)
        assert torch.equal(p, value)


def events(safe, name):
    return [event for event in safe.journal.events if event["event"] == name]


def test_tied_embeddings_stay(tmp_path):
    model = lora_model("llama", BLOCKS)
    model.lm_head.weight = model.get_input_embeddings().weight
    safe = Safe(model, settings(tmp_path, fill="before"), probe=loader("llama", 16), total_steps=12, samples_per_step=4)
    assert not model.get_input_embeddings().weight.is_meta
    assert any("tied" in reason for reason in events(safe, "offload")[0]["stays"])
    safe.close()


def test_many_misses_bring_the_weights_back(tmp_path):
    model, optimizer, data, safe = away_model("bert", tmp_path)
    assert resident_share(model) < 0.75
    for index in range(20):
        one = collate([sample("bert", 100 + 8 * index + place) for place in range(8)])
        model(**one).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        safe.step()
        if safe.steps == 12:
            break
    assert resident_share(model) == 1.0
    assert "were not stored" in events(safe, "offload_off")[0]["reason"]
    safe.close()


def test_a_gradient_through_the_prefix_brings_the_weights_back(tmp_path):
    runs = []
    for make in (away_model, off):
        model, _, _, safe = make("bert", tmp_path)
        model.eval()
        embeddings = model.get_input_embeddings()
        inputs = batch("bert")
        embedded = embeddings(inputs.pop("input_ids")).detach().requires_grad_()
        model(inputs_embeds=embedded, **inputs).loss.backward()
        runs.append(embedded.grad)
        assert resident_share(model) == 1.0
        safe.close()
    assert torch.equal(*runs)


def test_a_write_to_weights_that_are_away_is_not_lost(tmp_path):
    models = []
    for make in (away_model, off):
        model, _, _, safe = make("llama", tmp_path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        model.get_input_embeddings().weight.data.add_(1.0)
        loss = model(**batch("llama")).loss
        loss.backward()
        safe.close()
        models.append((loss, model))
    assert models[0][0] == models[1][0]
    assert all(map(torch.equal, models[0][1].parameters(), models[1][1].parameters()))


def test_a_block_that_trains_again_is_back(tmp_path):
    model, _, _, safe = away_model("llama", tmp_path)
    block = find_stacks(model)[0].blocks[1]
    weight = block.mlp.up_proj.weight
    assert weight.is_meta
    weight.requires_grad_(True)
    model(**batch("llama")).loss.backward()
    assert not weight.is_meta
    assert weight.grad is not None
    assert find_stacks(model)[0].blocks[0].mlp.up_proj.weight.is_meta
    safe.close()


def test_a_file_that_vanishes_is_still_read_and_one_that_changes_is_an_error(tmp_path):
    folder = tmp_path / "model"
    base_model("llama", BLOCKS).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(model, adapter("llama"))
    safe = Safe(model, settings(tmp_path, fill="before"), probe=loader("llama", 16), total_steps=12, samples_per_step=4)
    weight = find_stacks(model)[0].blocks[0].mlp.up_proj.weight
    assert weight.is_meta
    assert not any(path.name.startswith("offload-") for path in tmp_path.iterdir()), "written again"
    file = folder / "model.safetensors"
    content = file.read_bytes()
    moved = file.rename(tmp_path / "elsewhere.safetensors")
    assert weight.sum().isfinite()
    moved.write_bytes(content[:-8] + b"\1" * 8)
    with pytest.raises(RunError, match="changed or cannot be read"):
        weight.sum()
    moved.write_bytes(content)
