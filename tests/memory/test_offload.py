"""The weights of the frozen prefix leave the device, and training, evaluation and everything saved stay the same."""

import copy
import io
import os
import shutil
import signal
import subprocess
import warnings
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import adafreeze
from adafreeze import AdafreezeWarning, ConfigError, ModelError, RunError, Safe, SafeConfig
from adafreeze.costs.memory import StorageTracker
from adafreeze.model import find_stacks
from adafreeze.model.offloaded import HostSource, Offloaded, bring_back, resident
from adafreeze.model.offloaded import offload as offload_one
from cached_run import BLOCKS, assert_same, command, config, epochs, train
from cases import FAMILIES, adapter, base_model, batch, collate, loader, lora_model, sample

HALF = BLOCKS // 2
SOME_FAMILIES = [f if f in ("bert", "llama", "t5") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


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


@pytest.mark.parametrize("family", SOME_FAMILIES)
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


def away_model(family, tmp_path, total_steps=12, **more):
    """A model whose prefix is away before step 0, and an optimizer, and its Safe."""
    model = untied(family, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = loader(family, 16)
    safe = Safe(
        model, settings(tmp_path, **{"fill": "before", **more}), optimizer=optimizer, probe=data,
        total_steps=total_steps, samples_per_step=4,
    )  # fmt: skip
    return model, optimizer, data, safe


def off(family, tmp_path, **more):
    return away_model(family, tmp_path, offload="off", **more)


@pytest.mark.parametrize("family", SOME_FAMILIES)
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
    model, optimizer, _, safe = away_model("bert", tmp_path)
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
    assert "not stored" in events(safe, "offload_off")[0]["reason"]
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
    with pytest.warns(AdafreezeWarning, match="changed or cannot be read"):
        safe.close()


def saved(folder, family="llama", **shards):
    model = untied(family) if family == "llama" else lora_model(family, BLOCKS)
    model.unload().save_pretrained(folder, **shards)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "auto_class", "shards"),
    [
        ("llama", "AutoModelForCausalLM", {}),
        ("llama", "AutoModelForCausalLM", {"max_shard_size": "40KB"}),
        ("gpt2", "AutoModelForCausalLM", {}),
        ("bert", "AutoModelForSequenceClassification", {}),
        ("t5", "AutoModelForSeq2SeqLM", {}),
    ],
)
def test_from_pretrained_trains_the_same(family, auto_class, shards, tmp_path):
    path = saved(tmp_path / "model", family, **shards)
    batches, runs, shares = list(epochs(family)), [], []

    def adapted(model):
        torch.manual_seed(1)
        return get_peft_model(model, adapter(family)).train()

    for offload in ("disk", "off"):
        if offload == "disk":
            model = adafreeze.from_pretrained(path, auto_class)
            assert resident_share(model) < (0.1 if family in ("llama", "bert") else 0.4)
            assert not any(hasattr(module, "_hf_hook") for module in model.modules())
        else:
            model = getattr(transformers, auto_class).from_pretrained(path)
        after = (lambda _, m: shares.append(resident_share(m))) if offload == "disk" else None
        runs.append(train(family, settings(tmp_path, offload), batches, model=adapted(model), after=after))
    assert max(shares) < 0.8
    assert_same(*runs)


def test_a_model_that_never_was_on_the_device_does_not_come_to_it(tmp_path):
    path = saved(tmp_path / "model")
    model = get_peft_model(adafreeze.from_pretrained(path), adapter("llama"))
    assert all(p.device.type == "cpu" for p in model.parameters())
    with StorageTracker() as tracker:
        safe = Safe(
            model, settings(tmp_path, fill="before"), probe=loader("llama", 16), total_steps=12, samples_per_step=4
        )
    assert tracker.peak
    blocks = find_stacks(model)[0].blocks
    assert all(blocks[index].mlp.up_proj.weight.is_meta == (index < HALF) for index in range(BLOCKS))
    safe.close()
    assert blocks[0].mlp.up_proj.weight.is_meta, "the device may be too small for it"
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(path), adapter("llama"))
    with torch.no_grad():
        one, other = (m.eval().base_model(**batch("llama")).logits for m in (model, reference))
    assert torch.equal(one, other)


def test_autograd_keeps_no_data_of_offloaded_weights():
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    reference, x = weight.detach().clone(), torch.randn(4, 64, requires_grad=True)
    assert offload_one(weight, HostSource(weight.data))
    (own,) = torch.autograd.grad(nn.functional.linear(x, weight).square().sum(), x)
    (other,) = torch.autograd.grad(nn.functional.linear(x, reference).square().sum(), x)
    assert torch.equal(own, other)
    output = nn.functional.linear(x, weight)
    assert not any(
        isinstance(kept, torch.Tensor) and kept.numel() == weight.numel()
        for name in dir(output.grad_fn)
        if name.startswith("_raw_saved")
        for kept in [getattr(getattr(output.grad_fn, name), "data", None)]
    )
    bring_back(weight)
    output.square().sum().backward()
    assert torch.equal(x.grad, other)


@pytest.mark.parametrize("kind", ["file", pytest.param("config", marks=pytest.mark.slow)])
def test_memory_returns_to_the_system(kind, tmp_path):
    """The process's own memory falls by what left, also where transformers maps a whole file."""
    program = f"""
        import gc, sys, psutil, torch
        from pathlib import Path
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, LlamaConfig
        from adafreeze import Safe, SafeConfig
        torch.set_num_threads(1)
        folder = Path({str(tmp_path)!r})
        config = LlamaConfig(vocab_size=2000, hidden_size=512, intermediate_size=4000, num_hidden_layers=8,
            num_attention_heads=8, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False)
        if sys.argv[1] == "file":
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
            model = AutoModelForCausalLM.from_pretrained(folder / "model")
        else:
            model = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
        rows = [dict(input_ids=torch.arange(3, 11) + row, labels=torch.arange(8)) for row in range(8)]
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        settings = SafeConfig(freeze_at_start=0.5, freeze_share=0.0, offload="disk", cache_dir=folder, score="random")
        safe = Safe(model, settings, probe=loader, total_steps=12, samples_per_step=4)
        for _ in range(4):
            for batch in loader:
                model(**batch).loss.backward()
                gc.collect()
                before = psutil.Process().memory_info().rss
                safe.step()
                if moved := safe.freezing.offload.nbytes:
                    print((before - psutil.Process().memory_info().rss) / moved)
                    sys.exit()
    """
    done = subprocess.run(command(program, kind), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) > 0.9, done.stdout[-200:]


def test_a_kill_leaves_no_weights_on_the_disk(tmp_path):
    program = f"""
        import os, signal
        from pathlib import Path
        from test_offload import away_model
        model, *_ = away_model("llama", Path({str(tmp_path)!r}))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        command(program), env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_room_on_disk_the_weights_stay(tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10))
    with pytest.warns(AdafreezeWarning, match="stay on the device: they take"):
        model, _, _, safe = away_model("bert", tmp_path)
    assert resident_share(model) == 1.0
    safe.close()


@pytest.mark.parametrize(("offload", "fix"), [("somewhere", "must be one of"), ("disk", "every pass needs")])
def test_settings_that_contradict_each_other(offload, fix):
    with pytest.raises(ConfigError, match=fix):
        SafeConfig(offload=offload, cache="off" if offload == "disk" else "auto")


def test_a_budget_asks_for_it_before_it_recomputes_more(tmp_path):
    model = lora_model("llama", BLOCKS, dropout=0.0)
    data = loader("llama", 16, rows=8)
    plain = Safe(model, settings(tmp_path, "off", memory_budget="1GiB"), probe=data, total_steps=12, samples_per_step=8)
    peak = plain.budget._choice((), plain.budget._longest()).plain_peak - plain.budget.beside
    plain.close()
    for share, away in ((1.5, False), (0.95, True)):
        limit = int(share * peak)
        safe = Safe(
            model, settings(tmp_path, "auto", memory_budget=limit, fill="before"), probe=data,
            total_steps=12, samples_per_step=8,
        )  # fmt: skip
        assert (resident_share(model) < 1.0) is away
        safe.close()


def linear():
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    return module.requires_grad_(False)


def away_linear():
    module = linear()
    assert offload_one(module.weight, HostSource(module.weight.data))
    assert module.weight.is_meta
    return module


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.detach().mul_(2),
        lambda w: w[0].zero_(),
        lambda w: w.view(-1)[3].fill_(7),
        lambda w: w.numpy().fill(3),
        lambda w: w.data.add_(1),
        lambda w: w.T.copy_(torch.ones(8, 4)),
        nn.init.normal_,
        lambda w: torch._foreach_add_([w], 1.0),
        lambda w: torch.mul(w, 2, out=w),
        lambda w: w.copy_(torch.ones(4, 8)),
        lambda w: torch.from_dlpack(w).mul_(2),
        lambda w: torch.ops.aten._foreach_mul_.Scalar([w], 2),
        lambda w: torch.ops.aten.mul_(w, 3),
    ],
)
def test_every_way_to_write_to_a_weight_reaches_it(write):
    one, other = away_linear(), linear()
    for module in (one, other):
        torch.manual_seed(3)
        with torch.no_grad():
            write(module.weight)
    assert torch.equal(one.weight, other.weight)
    assert type(one.weight) is nn.Parameter


def test_a_weight_that_is_to_train_comes_back():
    for begin in (lambda w: w.requires_grad_(), lambda w: setattr(w, "requires_grad", True)):
        module = away_linear()
        begin(module.weight)
        module(torch.ones(2, 8)).sum().backward()
        assert module.weight.grad is not None


def test_what_is_put_on_a_weight_meanwhile_stays_on_it():
    module, called = away_linear(), []
    module.weight.tag = 5
    weak = weakref.ref(module.weight)
    module.weight.requires_grad_()
    module.weight.register_hook(called.append)
    module(torch.ones(2, 8)).sum().backward()
    assert (module.weight.tag, weak()) == (5, module.weight)
    assert len(called) == 1


def test_layout_type_and_device_are_those_of_the_weight():
    module = linear()
    module.weight.data = module.weight.data.T.contiguous().T
    assert offload_one(module.weight, HostSource(module.weight.data.contiguous()))
    assert module.weight.device.type == "cpu"
    strides = []
    nn.functional.linear(torch.ones(1, 8), module.weight)
    with resident([module.weight]):
        strides.append(module.weight.stride())
    bring_back(module.weight)
    assert [*strides, module.weight.stride()] == [(1, 4), (1, 4)]
    module = away_linear()
    identity = id(module.weight)
    module.double()
    assert (id(module.weight), module.weight.dtype) == (identity, torch.float64)


def test_an_adapter_that_is_added_while_weights_are_away_works(tmp_path):
    outputs = []
    for make in (away_model, off):
        model, _, _, safe = make("llama", tmp_path)
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("other")
        with torch.no_grad():
            outputs.append(model.eval()(**batch("llama")).logits)
        safe.close()
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_keeps_its_weights(whole, tmp_path):
    model = lora_model("llama", BLOCKS)
    if whole:
        model = torch.compile(model, backend="eager")
    for block in find_stacks(model)[0].blocks if not whole else ():
        block.compile(backend="eager")
    data = loader("llama", 16)
    with pytest.warns(
        AdafreezeWarning, match=r"torch.compile compiled the weights that would leave|torch.compile compiles"
    ):
        safe = Safe(model, settings(tmp_path, fill="before"), probe=data, total_steps=12, samples_per_step=4)
    assert resident_share(safe.model) == 1.0
    model(**batch("llama")).loss.backward()
    safe.close()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.clamp_(-0.01, 0.01),
        lambda w: w.data.clamp_(-0.01, 0.01),
        lambda w: setattr(w, "data", w.data * 0.5),
        lambda w: w.requires_grad_(True),
    ],
)
def test_a_hook_inside_the_prefix_may_write(write, tmp_path):
    found = []
    for make in (away_model, off):
        model, _, _, safe = make("llama", tmp_path)
        layer = model.base_model.model.model.layers[0].mlp.up_proj

        def hook(module, args):
            write(module.weight)

        handle = layer.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = model.eval()(**batch("llama")).logits
        handle.remove()
        safe.close()
        found.append((logits, layer.weight.detach().clone(), layer.weight.requires_grad))
    (logits, weight, trains), (other_logits, other, also) = found
    assert torch.equal(logits, other_logits) and torch.equal(weight, other) and trains == also


def test_code_that_makes_a_parameter_of_one_that_is_away():
    module, data = away_linear(), linear().weight.data
    assert torch.equal(nn.Parameter(module.weight), data)
    module = away_linear()
    made = type(module.weight)(torch.ones(2), requires_grad=False)
    assert type(made) is nn.Parameter and not made.requires_grad
    module.weight.grad = torch.ones_like(data)
    assert torch.equal(module.weight.grad, torch.ones_like(data)) and torch.equal(module.weight, data)


def test_loading_a_state_warns_of_nothing():
    module, other = away_linear(), linear()
    with torch.no_grad(), warnings.catch_warnings():
        other.weight.mul_(2)
        warnings.simplefilter("error")
        module.load_state_dict(other.state_dict())
    assert torch.equal(module.weight, other.weight)


def test_adapters_of_other_names_stay(tmp_path):
    model = untied("llama", dropout=0.0)
    model.add_adapter("reference", LoraConfig(r=2, target_modules=["q_proj"]))
    safe = Safe(model, settings(tmp_path, fill="before"), probe=loader("llama", 16), total_steps=12, samples_per_step=4)
    away = [name for name, p in model.named_parameters() if p.is_meta]
    assert away and not [name for name in away if "lora" in name]
    safe.close()


def test_without_filling_a_model_that_never_came_waits_for_the_first_epoch(tmp_path, caplog):
    untied("llama").unload().save_pretrained(tmp_path / "model")
    model = get_peft_model(adafreeze.from_pretrained(tmp_path / "model"), adapter("llama")).train()
    count = 96
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        _, _, safe = train("llama", settings(tmp_path), epochs("llama", count=count), model=model, count=count)
    kinds = [event["event"] for event in safe.journal.events]
    assert "offload" in kinds and "offload_off" not in kinds


def test_in_one_epoch_weights_leave_once_states_are_filled(tmp_path, caplog):
    def run(**more):
        model, optimizer, data, safe = away_model("llama", tmp_path, total_steps=4, **more)
        losses, shares = [], [resident_share(model)]
        for one in data:
            losses.append(model(**one).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            safe.step()
            shares.append(resident_share(model))
        safe.close()
        return losses, shares

    (losses, shares), (expected, _) = run(), run(offload="off", fill=None)
    assert max(shares) < 0.75 and losses == expected
    assert "no sample comes twice" in caplog.text.split("0 states were stored")[1], "for the run without filling"
    assert "no sample comes twice" not in caplog.text.split("0 states were stored")[0]


@pytest.mark.parametrize("more", [{"dry_run": True}, {"freeze_at_start": 0, "policy": lambda _: []}])
def test_a_run_from_which_nothing_leaves_says_so(more, tmp_path, caplog):
    train("llama", settings(tmp_path, **more), epochs("llama"), model=untied("llama"))
    assert "offload='disk' moved no weights: nothing froze." in caplog.text


@pytest.mark.parametrize(
    ("offload", "more"),
    [
        ("nowhere", {}),
        ("disk", {"device_map": "auto"}),
        ("disk", {"output_loading_info": True}),
        ("disk", {"auto_class": "LlamaForCausalLM"}),
        ("disk", {"auto_class": "AutoModelForCausalLm"}),
    ],
)
def test_from_pretrained_refuses_what_does_not_go_with_it(offload, more):
    with pytest.raises(ConfigError):
        adafreeze.from_pretrained("anything", offload=offload, **more)


def test_from_pretrained_names_a_weight_that_is_not_there(tmp_path):
    untied("llama").unload().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.4\..* is not in the files"):
        adafreeze.from_pretrained(tmp_path, num_hidden_layers=BLOCKS + 2)


def test_from_pretrained_needs_safetensors_to_leave_weights_on_disk(tmp_path):
    model = untied("llama").unload()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors file"):
        adafreeze.from_pretrained(str(tmp_path))
    assert resident_share(adafreeze.from_pretrained(str(tmp_path), offload="cpu", dtype=torch.float32)) <= 1.0
