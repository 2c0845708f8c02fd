"""Stacks are found in any list of blocks, and a refusal names the reason."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

import cases
from adafreeze import ModelError, Safe
from adafreeze.model import find_stacks

TEXT = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 2}


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Like timm's models: patches, blocks in an nn.Sequential, a head."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16))
        self.blocks = blocks
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))

    def forward(self, pixel_values, labels=None):
        hidden = self.patches(pixel_values)
        if isinstance(self.blocks, nn.ModuleList):
            for block in self.blocks:
                hidden = block(hidden)
        else:
            hidden = self.blocks(hidden)
        logits = self.head(hidden.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def adapted(model, *targets, **lora):
    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), **lora))


def found(model):
    return {stack.path: len(stack) for stack in find_stacks(model)}


@pytest.mark.parametrize("kind", [lambda blocks: nn.Sequential(*blocks), nn.ModuleList], ids=["sequential", "list"])
def test_any_list_of_blocks_with_adapters_is_a_stack_and_trains_like_one(kind):
    torch.manual_seed(0)
    model = adapted(Net(kind([Block() for _ in range(6)])), "fc1", "fc2")
    assert found(model) == {"blocks": 6}
    batch = {"pixel_values": torch.randn(4, 5, 8), "labels": torch.tensor([0, 1, 0, 1])}

    def gradients():
        model.zero_grad(set_to_none=True)
        loss = model(**batch)["loss"]
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, plain = gradients()
    safe = Safe(model, probe=batch, total_steps=30)
    assert safe.prefixes == {"blocks": 2}
    served, live = gradients()
    assert served == loss and 0 < len(live) < len(plain)
    assert all(torch.equal(live[name], plain[name]) for name in live)
    safe.close()


def test_blocks_without_a_norm_are_accepted_if_there_is_nothing_else():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
    assert found(adapted(Net(layers), "blocks.0.0", "blocks.1.0")) == {"blocks": 3}


def test_torchs_encoder_is_a_stack():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False)
    assert found(adapted(Net(encoder), "linear1")) == {"blocks.layers": 3}


def rt_detr():
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic", "embedding_size": 8}
    backbone = hf.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    config = hf.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8], encoder_layers=2,
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16, decoder_layers=3, decoder_attention_heads=2, num_queries=10, num_denoising=0,
        decoder_n_points=2,
    )  # fmt: skip
    return hf.RTDetrForObjectDetection(config)


def detr():
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic", "embedding_size": 8}
    config = hf.DetrConfig(
        backbone_config=hf.ResNetConfig(**sizes, out_features=["stage4"]), encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, d_model=16,
        num_queries=5,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def swin():
    sizes = {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]}
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes, window_size=4))


def pvt():
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [2, 2, 2, 2], "num_attention_heads": [1, 2, 2, 2]}
    return hf.PvtForImageClassification(hf.PvtConfig(image_size=64, **sizes))


def segformer():
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    return hf.SegformerForImageClassification(hf.SegformerConfig(**sizes))


def funnel():
    sizes = {"block_sizes": [2, 2, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 64}
    return hf.FunnelForSequenceClassification(hf.FunnelConfig(**sizes))


def luke():
    return hf.LukeForSequenceClassification(
        hf.LukeConfig(**TEXT, num_hidden_layers=3, entity_vocab_size=20, entity_emb_size=16)
    )


@pytest.mark.parametrize(
    ("make", "stacks"),
    [
        (rt_detr, {"model.encoder.aifi.0.layers": 2, "model.decoder.layers": 3}),
        (detr, {"model.encoder.layers": 3, "model.decoder.layers": 2}),
        (swin, {"swin.encoder.layers": 4}),
        (pvt, {f"pvt.encoder.block.{stage}": 2 for stage in range(4)}),
        (segformer, {f"segformer.stages.{stage}.blocks": 2 if stage == 1 else 1 for stage in range(4)}),
        (funnel, {f"funnel.encoder.blocks.{stage}": 2 for stage in range(2)}),
        (luke, {"luke.encoder.layer": 3}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stacks_are_blocks_and_not_heads_or_convolutions(make, stacks):
    assert found(get_peft_model(make(), LoraConfig(r=2, target_modules="all-linear"))) == stacks


def test_a_decoders_encoder_counts_without_adapters():
    model = get_peft_model(cases.base_model("t5"), LoraConfig(r=2, target_modules=r".*decoder.*\.q"))
    assert found(model) == {"encoder.block": 4, "decoder.block": 4}


@pytest.mark.parametrize(
    ("groups", "inner", "shared"), [(1, 1, "1 block"), (2, 1, "2 blocks"), (1, 2, "2 blocks")], ids=str
)
def test_albert_is_refused_because_its_layers_share_weights(groups, inner, shared):
    sizes = {"num_hidden_layers": 6, "num_hidden_groups": groups, "inner_group_num": inner, "embedding_size": 8}
    model = adapted(hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, **sizes)), "query")
    with pytest.raises(ModelError, match=f"All 6 layers of AlbertFor.* share the weights of {shared},") as caught:
        Safe(model, probe=cases.loader("bert"), total_steps=10)
    assert "no layer can freeze alone" in caught.value.fact


def test_albert_without_shared_layers_is_like_any_other():
    sizes = {"num_hidden_layers": 4, "num_hidden_groups": 4, "embedding_size": 8}
    model = adapted(hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, **sizes)), "query")
    assert found(model) == {"albert.encoder.albert_layer_groups": 4}


class SetFitModel:
    """Like setfit's: a plain object around a module and a head."""

    def __init__(self, model_body) -> None:
        self.model_body, self.model_head = model_body, None

    def __call__(self, texts): ...


@pytest.mark.parametrize("model", [SetFitModel(cases.lora_model("bert")), "bert-base-uncased", None])
def test_an_object_around_a_module_is_refused_and_the_module_named(model):
    with pytest.raises(ModelError, match=r"not the nn\.Module") as caught:
        Safe(model, probe=cases.loader("bert"), total_steps=10)
    assert ("model.model_body" in caught.value.fix) == isinstance(model, SetFitModel)
