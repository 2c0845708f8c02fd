"""Models patched in the ways of Unsloth, which needs a GPU: the same kinds of patches, on the CPU.

Unsloth (2026.10.9) gives transformers' classes other forwards, which call blocks with arguments of their own and get
tuples; gives instances of the MLP and of the attention a fused LoRA that reads PEFT's weights and never calls PEFT's
layers; writes gradients into the inputs of these; rewrites ``forward`` of PEFT's layers; and puts a reentrant
checkpoint that moves its input to the host in the place of torch's.
"""

from __future__ import annotations

import types
from functools import partial

import peft.tuners.lora.layer as lora
import pytest
import torch
import torch.utils.checkpoint
import transformers.modeling_utils
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama

from cached_run import assert_same, counts, epochs, pad_to, train
from cached_run import config as any_config
from cases import lora_model

OF_TORCH = torch.utils.checkpoint.checkpoint
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(depths, **more):
    return any_config(depths, **{"lr_scale": 1.0, **more})


def of_unsloth(function):
    """``function`` as if it came from a module of Unsloth."""
    function.__module__ = "unsloth.models.llama"
    return function


@of_unsloth
def model_forward(self, input_ids=None, causal_mask=None, attention_mask=None, packed_seq_lengths=None, **kwargs):
    hidden = self.embed_tokens(input_ids)
    width = input_ids.shape[1]
    positions = torch.arange(width)[None]
    seen = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool() | torch.eye(width, dtype=torch.bool)
    if packed_seq_lengths is not None:
        document = torch.repeat_interleave(packed_seq_lengths)
        positions = torch.cat([torch.arange(length) for length in packed_seq_lengths])[None]
        seen = seen & (document[:, None] == document)
    embeddings = self.rotary_emb(hidden, positions)
    more = {"causal_mask": causal_mask, "attention_mask": seen, "past_key_value": None, "use_cache": False}
    for layer in self.layers:
        run = partial(layer, position_embeddings=embeddings, **more)
        # Where transformers checkpoints in ``forward`` and not in ``__call__``, a forward put in its place does not.
        if layer.gradient_checkpointing and self.training and "__call__" not in vars(GradientCheckpointingLayer):
            run = partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=True)
        (hidden,) = run(hidden)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


@of_unsloth
def block_forward(
    self, hidden_states, causal_mask=None, attention_mask=None, position_embeddings=None, use_cache=False, **kwargs
):
    residual = hidden_states
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_embeddings=position_embeddings,
    )
    hidden_states = residual + attended
    return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


@of_unsloth
def attention_forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
    batch, width, _ = hidden_states.shape
    query, key, value = (
        x.view(batch, width, -1, self.head_dim).transpose(1, 2) for x in self.apply_qkv(self, hidden_states)
    )
    query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    key, value = (llama.repeat_kv(x, self.num_key_value_groups) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    return self.apply_o(self, out.transpose(1, 2).reshape(batch, width, -1)), None


class Fused(torch.autograd.Function):
    """y = x Wᵀ + s x Aᵀ Bᵀ for each of some layers; with ``inplace`` the gradient for x is written into x."""

    @staticmethod
    def forward(ctx, x, scaling, inplace, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.scaling, ctx.inplace = scaling, inplace
        base, a, b = weights[0::3], weights[1::3], weights[2::3]
        return tuple(
            x @ w.t() if left is None else x @ w.t() + scaling * (x @ left.t()) @ right.t()
            for w, left, right in zip(base, a, b, strict=True)
        )

    @staticmethod
    def backward(ctx, *gradients):
        x, *weights = ctx.saved_tensors
        flat, found, of_x = x.reshape(-1, x.shape[-1]), [], 0
        for place, gradient in enumerate(gradients):
            w, a, b = weights[3 * place : 3 * place + 3]
            outer = gradient.reshape(-1, gradient.shape[-1])
            inner = ctx.scaling * outer @ b
            found += [None, inner.t() @ flat, ctx.scaling * outer.t() @ (flat @ a.t())]
            of_x = of_x + outer @ w + inner @ a
        of_x = of_x.view_as(x)
        return x.copy_(of_x) if ctx.inplace else of_x, None, None, *found


def weights_of(layer):
    if layer.disable_adapters:
        return layer.base_layer.weight, None, None
    return layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def fused(x, *layers, inplace=False):
    weights = [weight for layer in layers for weight in weights_of(layer)]
    return Fused.apply(x, layers[0].scaling["default"], inplace, *weights)


@of_unsloth
def apply_lora_mlp(self, x):
    gate, up = fused(x, self.gate_proj, self.up_proj, inplace=True)
    return fused(F.silu(gate) * up, self.down_proj)[0]


@of_unsloth
def apply_lora_qkv(self, x):
    return fused(x, self.q_proj, self.k_proj, self.v_proj, inplace=True)


@of_unsloth
def apply_lora_o(self, x):
    return fused(x, self.o_proj)[0]


@of_unsloth
def unsloth_forward(self, x, *args, **kwargs):
    """In place of ``forward`` of PEFT's layer: one addmm in the data type of the base layer's result."""
    result = self.base_layer(x)
    if self.disable_adapters:
        return result
    a, b, dropout = self.lora_A["default"], self.lora_B["default"], self.lora_dropout["default"]
    inner = dropout(x).to(result.dtype) @ a.weight.to(result.dtype).t()
    outer = b.weight.to(result.dtype).t()
    flat = result.view(-1, result.shape[-1])
    added = torch.addmm(flat, inner.view(-1, inner.shape[-1]), outer, alpha=self.scaling["default"])
    return added.view(result.shape)


class Offloaded(torch.autograd.Function):
    """Reentrant checkpointing whose input waits in another storage."""

    runs = 0

    @staticmethod
    def forward(ctx, function, hidden, *rest):
        ctx.function, ctx.rest = function, rest
        ctx.save_for_backward(hidden.to("cpu", copy=True))
        with torch.no_grad():
            return function(hidden, *rest)

    @staticmethod
    def backward(ctx, *gradients):
        Offloaded.runs += 1
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden, *ctx.rest)
        torch.autograd.backward(output[0] if isinstance(output, tuple) else output, gradients[0])
        return None, hidden.grad, *(None for _ in ctx.rest)


@of_unsloth
def unsloth_checkpoint(function, *args, use_reentrant=None, preserve_rng_state=True, **kwargs):
    assert not kwargs
    return Offloaded.apply(function, *args)


@pytest.fixture
def patched(monkeypatch):
    """Patches of classes; the function that patches an instance as Unsloth's get_peft_model does."""
    monkeypatch.setattr(llama.LlamaModel, "forward", model_forward)
    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", block_forward)
    monkeypatch.setattr(llama.LlamaAttention, "forward", attention_forward)

    def make(checkpointed=False, **settings):
        model = lora_model("llama", target_modules=ALL, init_lora_weights=False, **settings)
        for block in model.base_model.model.model.layers:
            block.mlp.forward = types.MethodType(apply_lora_mlp, block.mlp)
            block.self_attn.apply_qkv, block.self_attn.apply_o = apply_lora_qkv, apply_lora_o
        if checkpointed:
            monkeypatch.setattr(torch.utils.checkpoint, "_unsloth_pristine_checkpoint", OF_TORCH, raising=False)
            monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", unsloth_checkpoint)
            monkeypatch.setattr(transformers.modeling_utils, "checkpoint", unsloth_checkpoint)
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        return model

    return make


def plain(model, batches, freezes):
    """The same loop without adafreeze; ``requires_grad_(False)`` for blocks after these steps."""
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=1e-2, weight_decay=0.1)
    losses, gradients = [], []
    torch.manual_seed(5)
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for block in model.base_model.model.model.layers[: freezes.get(step + 1, 0)]:
            block.requires_grad_(False)
    return losses, gradients, types.SimpleNamespace(weights=[p.detach().clone() for p in model.parameters()])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_are_those_of_a_plain_loop_with_the_same_freezes(patched, checkpointed):
    batches = list(epochs("llama", collator=pad_to(16)))
    depths = {1: 1, 4: 3}
    before = Offloaded.runs
    control = plain(patched(checkpointed), batches, depths)
    assert (Offloaded.runs > before) == checkpointed
    off = train("llama", config(depths, cache="off", lean=False), batches, model=patched(checkpointed))
    on = train("llama", config(depths), batches, model=patched(checkpointed))
    assert_same(off, control)
    assert_same(on, control)
    hits, advanced, _ = counts(on[2])
    assert hits and advanced


@pytest.mark.parametrize("positions", [False, True])
def test_packed_rows_are_not_cached_and_a_line_says_so(positions, patched, caplog):
    def packed(samples):
        lengths = torch.tensor([len(one["input_ids"]) for one in samples], dtype=torch.int32)
        row = {name: torch.cat([one[name] for one in samples])[None] for name in ("input_ids", "labels")}
        more = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]} if positions else {}
        return {**row, **more, "packed_seq_lengths": lengths}

    rows = list(epochs("llama", epochs=1, collator=packed))
    batches = rows * 3
    control = plain(patched(), batches, {1: 2})
    with caplog.at_level("INFO", logger="adafreeze"):
        on = train("llama", config({1: 2}), batches, model=patched(), count=len(rows))
    assert_same(on, control)
    assert "packed_seq_lengths has the shape" in caplog.text


def test_scores_are_those_of_an_unpatched_model(patched, monkeypatch):
    batches = list(epochs("llama", collator=pad_to(16)))
    settings = config({99: 0}, score="cka", cache="off", lean=False)
    scores = train("llama", settings, batches, model=patched())[2].scores
    monkeypatch.undo()
    own = lora_model("llama", target_modules=ALL, init_lora_weights=False)
    expected = train("llama", settings, batches, model=own)[2].scores
    assert scores.keys() == expected.keys() and any(scores.values())
    assert scores == pytest.approx(expected, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_another_forward_of_pefts_layers_is_the_one_that_runs(dropout, monkeypatch):
    monkeypatch.setattr(lora.Linear, "forward", unsloth_forward)
    batches = list(epochs("llama"))

    def run(lean):
        model = lora_model("llama", lora_dropout=dropout, init_lora_weights=False)
        for name, parameter in model.named_parameters():  # as PEFT does it for a model in bfloat16
            if "lora_" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        return train("llama", config({1: 1}, cache="off", lean=lean), batches, model=model)

    assert_same(run(lean=True), run(lean=False))


def test_a_memory_budget_uses_the_checkpoint_of_torch(patched):
    batches = list(epochs("llama"))
    roomy = train("llama", config({1: 2}, memory_budget="1GiB"), batches, model=patched())[2]
    peak = next(e["plain_peak"] for e in roomy.journal.events if e["event"] == "recompute")
    control = train("llama", config({1: 2}, cache="off"), batches, model=patched(True))
    before = Offloaded.runs
    on = train("llama", config({1: 2}, cache="off", memory_budget=int(0.9 * peak)), batches, model=patched(True))
    assert any(e["blocks"] or e["selective"] for e in on[2].journal.events if e["event"] == "recompute")
    assert_same(on, control)
    assert Offloaded.runs == before
