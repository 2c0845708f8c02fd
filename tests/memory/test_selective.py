"""Selective checkpointing keeps costly results, recomputes the rest, and what it keeps is counted."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import adafreeze
import cases
from adafreeze import ConfigError, SafeConfig
from adafreeze.costs import CountFlops, SavedBytes, StorageTracker
from adafreeze.memory import checkpointing
from adafreeze.memory.checkpointing import Checkpointing
from adafreeze.model import find_stacks
from cached_run import epochs, train

HIDDEN, BLOCKS, ROWS, TOKENS = 128, 3, 2, 64


def model_of(family: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "vocab_size": 100}
    if family == "llama":
        base = LlamaModel(LlamaConfig(**size, intermediate_size=448, num_key_value_heads=2, use_cache=False))
    else:
        drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = BertModel(BertConfig(**size, **drops, intermediate_size=512), add_pooling_layer=False)
    lora = LoraConfig(r=8, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(base.to(dtype), lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def step(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 100).last_hidden_state.float().pow(2).mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class selective:
    """Every block of ``model`` within the block."""

    def __init__(self, model: nn.Module) -> None:
        self.checkpointing = Checkpointing(model, find_stacks(model))

    def __enter__(self) -> None:
        self.checkpointing.recomputed = self.checkpointing.all_selective
        self.checkpointing.install()

    def __exit__(self, *_: object) -> None:
        self.checkpointing.restore()


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_loss_and_gradients_are_the_same(family, dropout):
    model, batch = cases.lora_model(family, dropout=dropout).train(), cases.batch(family)

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    theirs = gradients()
    with adafreeze.lean(model), selective(model):
        ours = gradients()
    for one, other in zip(ours, theirs, strict=True):  # gradients of an input are added up in another order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_less_for_few_flops(family, dtype, dropout):
    model = model_of(family, dtype, dropout)
    with SavedBytes(model) as saved, CountFlops() as count:
        theirs = step(model)
    with adafreeze.lean(model), selective(model), SavedBytes(model) as less, CountFlops() as more:
        ours = step(model)
    assert all(map(torch.equal, ours, theirs))
    assert less.total <= (0.72 if dtype == torch.float32 and not dropout else 0.55) * saved.total
    assert more.total <= 1.05 * count.total  # r is a larger part of a hidden size of 128


@pytest.mark.parametrize("lean", [False, True])
def test_what_is_kept_is_counted(lean):
    model = model_of("llama", torch.bfloat16)
    undo = adafreeze.lean(model) if lean else None
    if undo is not None:
        undo.__enter__()
    with selective(model), StorageTracker() as tracker:
        tracker.hold(*model.parameters(), *model.buffers())
        before = tracker.now
        ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 100
        tracker.hold(ids)
        with SavedBytes(model) as saved:
            output = model(input_ids=ids)
        alive = tracker.now - before - ids.nbytes
    assert output.last_hidden_state.requires_grad
    # Alive beside what is saved: the output, if nothing has saved it, and rotary tables that autograd does not need.
    assert saved.total == pytest.approx(alive, rel=0.05)
    if undo is not None:
        undo.__exit__(None, None, None)


def test_attention_scores_are_computed_again():
    model = model_of("bert")
    model.get_base_model().set_attn_implementation("eager")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket is torch.ops.aten.bmm:
                refs.append((tuple(result.shape), weakref.ref(result.untyped_storage())))
            return result

    refs: list[tuple[tuple[int, ...], weakref.ref]] = []
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 100
    with selective(model), Watch():
        output = model(input_ids=ids)
    kept = [shape for shape, reference in refs if reference() is not None]
    assert len(refs) == 2 * BLOCKS
    assert (ROWS * 4, TOKENS, TOKENS) not in kept  # scores: softmax and products with v are computed again from q and k
    output.last_hidden_state.sum().backward()


def test_a_run_of_safe_trains_the_same_and_leaves_no_trace():
    found, twins = [], []

    def after(_, model):
        twins.append(copy.deepcopy(model))

    for fields in ({}, {"checkpointing": "selective", "lean": True}):
        model = cases.lora_model("bert", dropout=0.0).train()
        before = [set(vars(module)) for module in model.modules()]
        losses, *_ = train("bert", SafeConfig(**fields), epochs("bert"), model, after=after)
        assert [set(vars(module)) for module in model.modules()] == before
        assert not any("forward" in vars(module) for module in twins[-1].modules())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_not_beside_a_budget():
    with pytest.raises(ConfigError, match="a budget chooses the checkpointed blocks"):
        SafeConfig(checkpointing="selective", memory_budget="1GiB")


@cases.refuses_changes_in_place
def test_a_model_that_changes_a_product_in_place_is_refused(monkeypatch):
    from transformers.models.bert.modeling_bert import BertIntermediate

    monkeypatch.setattr(BertIntermediate, "forward", lambda self, x: self.dense(x).mul_(1.0))
    monkeypatch.setattr(checkpointing, "LEAST_INNER", 8)  # so that products of this small model are kept
    model = cases.lora_model("bert")
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"in place.*\n.*Leave it out"):
        adafreeze.Safe(model, SafeConfig(checkpointing="selective"), probe=cases.batch("bert"), total_steps=9)
    assert [set(vars(module)) for module in model.modules()] == before
    assert model(**cases.batch("bert")).loss.requires_grad
