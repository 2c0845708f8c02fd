"""A model under adafreeze can be copied, pickled and saved; the copy is an ordinary model."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adafreeze import Safe, SafeConfig
from adafreeze.model.patches import forward_pre_hook, patched, replaced_child
from cached_run import BLOCKS, config, epochs
from cases import TARGETS, base_model, batch, lora_model


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "AveragedModel": lambda model: AveragedModel(model).module,
}


def frozen_and_filled(family, **more):
    model = lora_model(family, BLOCKS, dropout=0.0, lora_dropout=0.1)
    inputs = batch(family)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    safe = Safe(model, config(**more), optimizer=optimizer, probe=inputs, total_steps=100, samples_per_epoch=40)
    safe.freeze(list(safe.units)[:2])
    for _ in range(3):
        model(**inputs).loss.backward()
    return model, inputs, safe, optimizer


def described(model):
    """Everything in each module except the values of tensors, and the number of hooks."""
    return [
        (
            name, type(module), module.training, sorted(module.__dict__), len(module._forward_hooks),
            len(module._forward_pre_hooks), [(n, p.requires_grad) for n, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_a_copy_made_during_training_is_an_ordinary_model(family, how):
    ordinary = described(lora_model(family, BLOCKS, dropout=0.0, lora_dropout=0.1))
    model, inputs, safe, _ = frozen_and_filled(family)
    twin = COPIES[how](model)
    assert [row[:3] + row[4:] for row in described(twin)] == [row[:3] + row[4:] for row in ordinary]
    assert not any(
        name in module.__dict__ for module in twin.modules() for name in ("forward", "train", "merge", "__deepcopy__")
    )
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in twin.named_parameters())
    # The copy trains like a model without adafreeze, and the original is unchanged.
    twin.eval(), model.eval()
    torch.testing.assert_close(twin(**inputs).loss, model(**inputs).loss)
    twin.train(), model.train()
    twin(**inputs).loss.backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert safe.cache.prefix_cache.off is None and safe.prefixes and len(safe.frozen) == 2
    safe.close()


def test_copies_do_not_change_the_run():
    def run(copies):
        model, batches = lora_model("bert", BLOCKS), list(epochs("bert"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        safe = Safe(model, config(), optimizer=optimizer, probe=batches[:2], total_steps=12, samples_per_epoch=14)
        average = AveragedModel(model) if copies else None
        losses = []
        torch.manual_seed(5)
        for one in batches:
            loss = model(**one).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            safe.step()
            losses.append(loss.item())
            if copies:
                average.update_parameters(model)
                copy.deepcopy(model)
        safe.close()
        return losses

    assert run(True) == run(False)


def test_tied_weights_stay_tied_in_a_copy():
    model = get_peft_model(base_model("bert"), LoraConfig(r=4, target_modules=TARGETS["bert"]))
    model.train()
    sites = [m for m in model.modules() if hasattr(m, "lora_A")]
    sites[1].lora_A["default"].weight = sites[0].lora_A["default"].weight
    safe = Safe(model, SafeConfig(freeze_at_start=0), probe=batch("bert"), total_steps=9)
    safe.freeze(list(safe.units)[:2])
    for how in ("deepcopy", "torch.save"):
        twin = [m for m in COPIES[how](model).modules() if hasattr(m, "lora_A")]
        assert twin[1].lora_A["default"].weight is twin[0].lora_A["default"].weight
        assert twin[0].lora_A["default"].weight is not sites[0].lora_A["default"].weight
    safe.close()


def test_patches_come_off_in_any_order_without_a_trace():
    module = nn.Linear(2, 2)
    before = dict(module.__dict__)
    first, second = patched(module, "forward", len), patched(module, "forward", max)
    first.__enter__()
    second.__enter__()
    hook = forward_pre_hook(module, lambda *_: None)
    assert module.forward is max and copy.deepcopy(module).forward.__self__ is not module
    first.__exit__()
    assert module.forward is max
    second.__exit__()
    hook.remove()
    assert module.__dict__ == before
    parent = nn.Sequential(module)
    with replaced_child(parent, "0", nn.Identity()):
        assert isinstance(parent[0], nn.Identity) and isinstance(copy.deepcopy(parent)[0], nn.Linear)
    assert parent[0] is module and "__deepcopy__" not in parent.__dict__


def test_an_exit_during_training_prints_nothing():
    script = (
        "import torch, logging; logging.disable()\n"
        "from cached_run import config; from cases import batch, lora_model; from adafreeze import Safe\n"
        "model = lora_model('bert'); inputs = batch('bert')\n"
        "safe = Safe(model, config(), probe=inputs, total_steps=9, samples_per_epoch=4)\n"
        "safe.freeze(list(safe.units)[:2])\n"
        "model(**inputs).loss.backward(); model(**inputs).loss.backward()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert not ended.stdout and not ended.stderr
