"""Lean LoRA layers: bit-identical to PEFT's, with fewer saved bytes, and gone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import adafreeze
import cases
from adafreeze import ModelError, RunError
from adafreeze.costs import SavedBytes, StorageTracker
from adafreeze.memory.lean import lean_layers
from cached_run import train

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def base(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=224, num_key_value_heads=2))
    if family == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, **drops))
    return BertForSequenceClassification(BertConfig(**SHAPE, intermediate_size=256, **NO_DROPOUT))


def adapted(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **lora: object) -> PeftModel:
    """With fp32 adapters that do something."""
    kind = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    settings = {"r": 8, "target_modules": "all-linear", "task_type": kind, **lora}
    model = get_peft_model(base(family).to(dtype), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def step(model: nn.Module, *, autocast: bool = False, call: nn.Module | None = None) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of one step, and its saved bytes."""
    ids = torch.arange(64).view(4, 16) % 100
    labels = torch.tensor([0, 1, 0, 1]) if isinstance(model.get_base_model(), BertForSequenceClassification) else ids
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), SavedBytes(model) as saved:
        loss = (model if call is None else call)(input_ids=ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], saved.total


def is_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_those_of_peft_to_the_bit(family, dtype, dropout, autocast):
    model = adapted(family, dtype, lora_dropout=dropout)
    (theirs, more), (again, _) = step(model, autocast=autocast), step(model, autocast=autocast)
    assert is_equal(theirs, again)
    with adafreeze.lean(model):
        ours, saved = step(model, autocast=autocast)
    assert is_equal(ours, theirs)
    gains = dropout or dtype == torch.bfloat16 or (autocast and dtype == torch.float32)
    assert saved < more if gains else saved == more  # PEFT saves x by reference, too


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_bias": True},
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 7}},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"lora_dropout": 0.999},
    ],
    ids=str,
)
def test_other_kinds_of_lora_compute_the_same(lora):
    model = adapted(**lora)
    theirs, _ = step(model)
    with adafreeze.lean(model):
        assert is_equal(step(model)[0], theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_recomputes_the_same(reentrant, dropout):
    model = adapted(lora_dropout=dropout)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    theirs, _ = step(model)
    with adafreeze.lean(model):
        assert is_equal(step(model)[0], theirs)


def test_scaled_gradients_of_half_precision_are_those_of_peft():
    model = adapted(dtype=torch.float32, lora_dropout=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def steps() -> list[torch.Tensor]:
        scaler, ids = torch.amp.GradScaler("cpu", init_scale=2.0**24), torch.arange(64).view(4, 16) % 100
        found: list[torch.Tensor] = []
        torch.manual_seed(1)
        for _ in range(3):  # the first overflows and is skipped
            with torch.autocast("cpu", torch.float16):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(scaler.get_scale() / 2.0**10)
            optimizer.zero_grad()
            found += [loss.detach(), *(p.detach().clone() for p in model.parameters() if p.requires_grad)]
        return found

    state = copy.deepcopy(model.state_dict())
    theirs = steps()
    model.load_state_dict(state)
    with adafreeze.lean(model):
        assert is_equal(steps(), theirs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
def test_quantized_bases(bits, dropout, autocast):
    model = cases.quantized(base("llama").to(torch.bfloat16), bits)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.02  # float32
    model.train()
    theirs, more = step(model, autocast=autocast)
    with adafreeze.lean(model) as layers:
        ours, saved = step(model, autocast=autocast)
    assert {type(layer).__name__ for layer in layers} == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert is_equal(ours, theirs)
    assert saved < more


def test_the_same_input_is_saved_once_for_all_layers_that_get_it():
    model = adapted()
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    with adafreeze.lean(model), SavedBytes(model) as saved:
        outputs = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    assert saved.total == x.nbytes
    assert len(outputs) == 3


def test_under_autocast_one_narrow_copy_is_saved_for_all_layers_that_get_the_same_input():
    model = adapted(dtype=torch.float32)
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 16, 64)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.autocast("cpu", torch.bfloat16), adafreeze.lean(model):
        with SavedBytes(model) as saved:
            outputs = [layer(x) for layer in layers]
        with torch.no_grad():
            x.add_(1)  # another input now
        changed = attention.q_proj(x)
    assert saved.total == x.nbytes // 2
    assert len(outputs) == 3 and not torch.equal(changed, outputs[0])


def test_nothing_keeps_the_narrow_copy_once_the_graph_is_gone():
    model = adapted(dtype=torch.float32)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 16, 64)
    with torch.autocast("cpu", torch.bfloat16), adafreeze.lean(model), StorageTracker() as tracker:
        layer(x).sum().backward()
        held = tracker.now
        output = layer(x)
        assert tracker.now == held + x.nbytes // 2 + output.nbytes
        del output
        assert tracker.now == held


def test_an_input_that_is_a_small_part_of_a_tensor_does_not_keep_the_tensor():
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    hidden = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True) * 1
    with adafreeze.lean(model), SavedBytes(model) as saved:
        layer(hidden[:, 0])
    assert saved.total < hidden.nbytes


def test_an_input_that_is_changed_in_place_afterwards_is_an_error_that_names_the_fix():
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with adafreeze.lean(model):
        x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True) * 1
        loss = layer(x).sum()
        x.add_(1)
        with pytest.raises(RunError, match=r"in place.*\n.*lean=False"):
            loss.backward()


def test_an_input_made_in_inference_mode():
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.inference_mode():
        x = torch.randn(2, 16, 64, dtype=torch.bfloat16)
    with adafreeze.lean(model):
        layer(x).sum().backward()


def test_of_the_dropout_one_bit_per_element_is_saved():
    model = adapted(dtype=torch.float32, lora_dropout=0.1)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 64, requires_grad=True)  # 120 bytes of bits
    with adafreeze.lean(model), SavedBytes(model) as saved:
        layer(x)
    assert saved.total == x.nbytes + x.numel() // 8


@pytest.mark.parametrize("change", ["merged", "off", "two", "hook", "global hook", "frozen", "eval", "no grad in x"])
def test_peft_s_own_forward_runs_where_another_formula_applies(change):
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    seen: list[object] = []
    undo = None
    if change == "two":
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
    elif change == "hook":
        layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    elif change == "global hook":
        inner = layer.lora_A["default"]
        undo = register_module_forward_hook(lambda module, *_: seen.append(1) if module is inner else None)
    elif change == "frozen":
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
    elif change == "merged":
        layer.merge()
    elif change == "off":
        layer.enable_adapters(False)
    elif change == "eval":
        model.eval()
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=change != "no grad in x")
    try:
        theirs = layer(x)
        count = len(seen)
        with adafreeze.lean(model):
            ours = layer(x=x)
        assert torch.equal(ours, theirs)
        assert len(seen) == 2 * count
        assert count == int("hook" in change)
    finally:
        if undo is not None:
            undo.remove()


def test_an_empty_batch_and_a_single_row():
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with adafreeze.lean(model):
        assert layer(torch.randn(0, 16, 64, dtype=torch.bfloat16)).shape == (0, 16, 64)
        assert layer(torch.randn(64, dtype=torch.bfloat16)).shape == (64,)
        assert layer(torch.randn(1, 64, dtype=torch.bfloat16)).requires_grad


def test_rows_with_different_adapters_run_peft_s_forward():
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x, names = torch.randn(2, 16, 64, dtype=torch.bfloat16), ["default", "__base__"]
    with adafreeze.lean(model):
        mixed = layer(x, adapter_names=names)
        assert torch.equal(mixed[1], layer.base_layer(x)[1]) and not torch.equal(mixed[0], layer.base_layer(x)[0])


def test_on_the_meta_device():
    model = adapted().to("meta")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.empty(2, 16, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with adafreeze.lean(model):
        layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.lora_B["default"].weight.grad.shape == (64, 8)


def test_only_peft_s_own_layers_are_lean():
    class Own(Linear):
        pass

    model = adapted()
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj.__class__ = Own
    attention.k_proj.forward = attention.k_proj.forward
    with adafreeze.lean(model) as layers:
        assert attention.v_proj in layers
        assert attention.q_proj not in layers and attention.k_proj not in layers


def test_nothing_is_left_and_copies_are_clean():
    model = adapted()
    before = [set(vars(module)) for module in model.modules()]
    with adafreeze.lean(model):
        twin = copy.deepcopy(model)
        assert any("forward" in vars(module) for module in model.modules())
    assert [set(vars(module)) for module in model.modules()] == before
    assert [set(vars(module)) for module in twin.modules()] == before
    assert is_equal(step(twin)[0], step(model)[0])


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("lora", [{}, {"dtype": torch.float32, "lora_dropout": 0.1}], ids=str)
def test_second_derivatives_are_those_of_peft(family, lora):
    model = adapted(family, **lora)
    ids = torch.arange(64).view(4, 16) % 100
    labels = torch.tensor([0, 1, 0, 1]) if family == "bert" else ids
    parameters = [p for p in model.parameters() if p.requires_grad]

    def products() -> list[torch.Tensor]:
        torch.manual_seed(1)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = model(input_ids=ids, labels=labels).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return list(torch.autograd.grad(first, parameters, [torch.ones_like(one) for one in first]))

    theirs = products()
    with adafreeze.lean(model):
        ours = products()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_second_derivatives_under_autocast_are_refused():
    model = adapted(dtype=torch.float32)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 16, 64)
    weights = [layer.lora_A["default"].weight]
    with torch.autocast("cpu", torch.bfloat16), adafreeze.lean(model):
        torch.autograd.grad(layer(x).sum(), weights)
        with pytest.raises(RunError, match=r"differentiated again.*\n.*lean=False"):
            torch.autograd.grad(layer(x).pow(2).sum(), weights, create_graph=True)


@pytest.mark.parametrize("hooks", ["checkpoint", "save_on_cpu"])
def test_an_input_that_is_changed_in_place_is_an_error_under_hooks_on_saved_tensors_too(hooks):
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj

    def block(h: torch.Tensor) -> torch.Tensor:
        h = h * 1.0
        q = layer(h)
        h += torch.tanh(q)
        return torch.tanh(h)

    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    with adafreeze.lean(model):
        if hooks == "checkpoint":
            loss = checkpoint(block, x, use_reentrant=False).sum()
        else:
            with torch.autograd.graph.save_on_cpu():
                loss = block(x).sum()
        with pytest.raises(RunError, match="in place"):
            loss.backward()


def test_peft_s_forward_runs_where_lean_would_save_more_or_round_otherwise():
    model = adapted(dtype=torch.float32, lora_dropout=0.1)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj

    def saved(x: torch.Tensor, *, autocast: bool = True) -> int:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), SavedBytes(model) as counted:
            layer(x)
        return counted.total

    x = torch.randn(2, 16, 64)
    cases = {"dropped, no gradient": x, "leaf": x.clone().requires_grad_()}
    theirs = {name: saved(given) for name, given in cases.items()}
    with adafreeze.lean(model):
        assert {name: saved(given) for name, given in cases.items()} == theirs
    layer.lora_A["default"].weight.requires_grad_(False)  # LoRA-FA
    given = (x * 1).requires_grad_() * 1
    without = saved(given, autocast=False)
    with adafreeze.lean(model):
        assert saved(given, autocast=False) == without


@pytest.mark.parametrize("adapter", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_three_data_types(adapter, autocast, given):
    model = adapted(dtype=torch.float32)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter)
    x = torch.randn(2, 16, 64).to(given) * 3

    def run() -> list[torch.Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", autocast):
            output = layer(x)
        output.float().pow(2).sum().backward()
        return [output.detach(), layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]

    theirs = run()
    with adafreeze.lean(model):
        assert is_equal(run(), theirs)


def test_lean_within_lean_and_within_a_run_of_safe():
    model = adapted("bert")
    batch = {"input_ids": torch.arange(64).view(4, 16) % 100, "labels": torch.tensor([0, 1, 0, 1])}

    def count() -> int:
        return sum("forward" in vars(module) for module in lean_layers(model.modules()))

    with adafreeze.lean(model):
        safe = adafreeze.Safe(model, adafreeze.SafeConfig(lean=True), probe=batch, total_steps=10)
        with adafreeze.lean(model):
            assert count()
    assert count()  # of the run
    safe.close()
    assert not count()


def test_gradients_in_batches_and_forward_derivatives():
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    gradients = torch.eye(8, 640).view(8, 2, 5, 64).to(torch.bfloat16)

    def run() -> list[torch.Tensor]:
        (batched,) = torch.autograd.grad(layer(x), x, gradients, is_grads_batched=True)
        with forward_ad.dual_level():
            dual = layer(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
            return [batched, forward_ad.unpack_dual(dual).tangent]

    theirs = run()
    with adafreeze.lean(model):
        for one, other in zip(run(), theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_functional_transforms_run_peft_s_forward():
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with adafreeze.lean(model):
        assert torch.equal(torch.func.vmap(layer)(x), torch.func.vmap(layer)(x))
        assert torch.func.jacrev(lambda one: layer(one).sum())(x).shape == x.shape


@pytest.mark.slow
def test_compiled_peft_s_forward_runs_without_a_graph_break():
    model = adapted()
    theirs, _ = step(model)
    with adafreeze.lean(model):
        torch._dynamo.reset()
        ours, _ = step(model, call=torch.compile(model, fullgraph=True))
    torch._dynamo.reset()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_without_such_layers_is_named():
    with pytest.raises(ModelError, match="has no LoRA layer"), adafreeze.lean(base("llama")):
        pass


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_of_safe_that_is_lean_has_the_same_losses(dropout):
    found = []
    for lean in (False, True):
        model = adapted("bert", lora_dropout=dropout)
        before = [set(vars(module)) for module in model.modules()]
        ids, labels = torch.arange(128).view(8, 16) % 100, torch.tensor([0, 1] * 4)
        batches = [{"input_ids": ids[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4)] * 6
        with SavedBytes(model) as counted:
            losses, *_ = train("bert", adafreeze.SafeConfig(freeze_at_start=0.5, lean=lean), batches, model, count=8)
        assert [set(vars(module)) for module in model.modules()] == before
        found.append((losses, counted.total))
    (theirs, more), (ours, less) = found
    assert ours == theirs
    assert less < more or not dropout


@pytest.mark.parametrize("lora", [{"use_dora": True}, {}], ids=str)
def test_a_run_that_cannot_be_lean_says_so(lora, caplog):
    model = adapted("bert", **lora)
    batch = {"input_ids": torch.arange(64).view(4, 16) % 100, "labels": torch.tensor([0, 1, 0, 1])}
    caplog.set_level("INFO")
    adafreeze.Safe(model, adafreeze.SafeConfig(lean=True), probe=batch, total_steps=10).close()
    assert ("lean=True changes nothing" in caplog.text) == bool(lora)
