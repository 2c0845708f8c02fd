"""The tiny models and batches that all tests share: random weights, built from configs, no download."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

VOCABULARY = 64
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
FAMILIES = ("bert", "roberta", "gpt2", "llama", "qwen3", "t5", "vit")
ENCODERS = ("bert", "roberta", "vit")

# accelerate before 1.15 resets its epoch counter when it skips batches: a Trainer resumed in the middle of an epoch
# shuffles the later epochs differently, with or without adafreeze.
LOSES_THE_EPOCH = Version(accelerate.__version__) < Version("1.15")
resumes_in_an_epoch = pytest.mark.skipif(
    LOSES_THE_EPOCH, reason="accelerate before 1.15 loses the epoch of a Trainer that resumes in the middle of one"
)

# Later versions (2.15 was run) compute a kept product again that was changed in place, with the same gradients.
refuses_changes_in_place = pytest.mark.skipif(
    Version(torch.__version__) >= Version("2.14"), reason="torch after 2.13 checkpoints products that change in place"
)


def slow_but(brief: list, every: list) -> list:
    """``every`` case as parameters of a test, those that are not in ``brief`` marked slow."""
    return [case if case in brief else pytest.param(*case, marks=pytest.mark.slow) for case in every]


def base_model(family: str, blocks: int = 4, dropout: float | None = None) -> torch.nn.Module:
    """A tiny random model of ``family``; ``dropout`` sets all its dropouts where the family has them."""
    torch.manual_seed(0)
    p = 0.1 if dropout is None else dropout
    hf = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    if family in ("bert", "roberta"):
        kind = BertConfig if family == "bert" else RobertaConfig
        config = kind(**TEXT, **hf, num_hidden_layers=blocks, max_position_embeddings=40, num_labels=2)
        return AutoModelForSequenceClassification.from_config(config)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_head=4, n_layer=blocks, n_positions=40,
            bos_token_id=1, eos_token_id=1, pad_token_id=0,
            resid_pdrop=p, embd_pdrop=p, attn_pdrop=p,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config)
    if family in ("llama", "qwen3"):
        kind = LlamaConfig if family == "llama" else Qwen3Config
        config = kind(
            **TEXT, num_hidden_layers=blocks, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config)
    if family == "t5":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=blocks,
            num_decoder_layers=blocks, dropout_rate=p, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return AutoModelForSeq2SeqLM.from_config(config)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=blocks, image_size=16,
        patch_size=4, num_labels=2, **hf,
    )  # fmt: skip
    return AutoModelForImageClassification.from_config(config)


TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "vit": ["query", "value"] if transformers.__version__.startswith("4.") else ["q_proj", "v_proj"],
}


def lora_model(family: str, blocks: int = 4, dropout: float | None = None, **lora: object) -> torch.nn.Module:
    """``base_model`` with LoRA in every block; the adapters are not zero, so that each contributes."""
    torch.manual_seed(0)
    model = base_model(family, blocks, dropout)
    settings = {"r": 4, "target_modules": TARGETS[family], "init_lora_weights": True, **lora}
    model = get_peft_model(model, LoraConfig(**settings))
    model.train()
    return model


_IA3 = {
    **dict.fromkeys(("bert", "roberta"), (["key", "value", "output.dense"], ["output.dense"])),
    "gpt2": (["c_attn"], []),
    **dict.fromkeys(("llama", "qwen3"), (["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "t5": (["k", "v"], []),
    "vit": (["k_proj", "v_proj"], []),
}


def quantized(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """A Llama whose linear layers are bitsandbytes' in nf4 (4 bits) or int8."""
    bnb = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    sizes = linear.in_features, linear.out_features
                    if bits == 4:
                        stored = bnb.nn.Linear4bit(*sizes, False, linear.weight.dtype, quant_type="nf4")
                        stored.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    else:
                        stored = bnb.nn.Linear8bitLt(*sizes, False, has_fp16_weights=False)
                        stored.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
                    setattr(parent, name, stored.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def adapter(family: str, kind: str = "lora", dropout: float = 0.0) -> PeftConfig:
    """The configuration of a small LoRA, DoRA (``"dora"``) or IA3 (``"ia3"``) adapter."""
    if kind == "ia3":
        targets, feedforward = _IA3[family]
        return IA3Config(target_modules=targets, feedforward_modules=feedforward)
    return LoraConfig(r=4, target_modules=TARGETS[family], lora_dropout=dropout, use_dora=kind == "dora")


def sample(family: str, index: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """Sample ``index`` of a small fixed dataset; text has 8 to 15 tokens."""
    generator = torch.Generator().manual_seed(1000 + index)
    if family == "vit":
        pixels = torch.randn(3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor(index % 2)}
    length = length or 8 + index % 8
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
    ids[0] = 2
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in ("bert", "roberta"):
        one["labels"] = torch.tensor(index % 2)
    elif family == "t5":
        one["labels"] = torch.randint(3, VOCABULARY, (6,), generator=generator)
    else:
        one["labels"] = ids.clone()
    return one


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad to the longest on the right; labels with -100."""
    batch = {}
    for key in samples[0]:
        values = [s[key] for s in samples]
        if values[0].ndim == 1:
            fill = {"labels": -100, "attention_mask": 0}.get(key, 0)
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        else:
            batch[key] = torch.stack(values)
    return batch


class Samples(torch.utils.data.Dataset):
    """``count`` samples of ``family`` as a map-style dataset."""

    def __init__(self, family: str, count: int = 64, length: int | None = None) -> None:
        self.family, self.count, self.length = family, count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return sample(self.family, index, self.length)


def batch(family: str, rows: int = 4, length: int | None = 12) -> dict[str, torch.Tensor]:
    """One fixed batch."""
    return collate([sample(family, index, length) for index in range(rows)])


def loader(family: str, count: int = 64, rows: int = 4, length: int | None = None) -> DataLoader:
    """A shuffling dataloader, seeded by torch's global random state as users have it."""
    return DataLoader(Samples(family, count, length), batch_size=rows, shuffle=True, collate_fn=collate)


def first_tensor(output: object) -> torch.Tensor:
    """The hidden states in what a block returned."""
    return output if isinstance(output, torch.Tensor) else output[0]
