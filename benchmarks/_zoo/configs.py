"""Tiny configs: small numbers by attribute name, and exceptions by family."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .case import BOS, EOS, FIRST_WORD, HALF, HEADS, IMAGE, LAYERS, MASK, PAD, PATCH, VOCABULARY, WIDTH
from .exceptions import EXCEPTIONS

# Sizes by attribute name; others keep the library's default.
_SIZES: dict[str, Any] = {
    # depth
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), LAYERS),
    **dict.fromkeys(
        (
            "encoder_layers",
            "decoder_layers",
            "num_encoder_layers",
            "num_decoder_layers",
            "encoder_num_hidden_layers",
            "decoder_num_hidden_layers",
            "num_encoder_blocks_",
            "encoder_num_layers",
            "decoder_num_layers",
        ),
        HALF,
    ),
    # width
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "dim",
            "embed_dim",
            "n_embd",
            "hidden_dim_",
            "emb_dim",
            "embedding_size",
            "encoder_hidden_size",
            "decoder_hidden_size",
            "out_hidden_size",
            "projection_dim",
            "output_dim",
            "word_embed_proj_dim",
            "encoder_hidden_dim",
            "decoder_hidden_dim",
            "attention_hidden_size",
            "model_dim",
            "cross_attention_hidden_size",
            "text_hidden_size",
            "d_embed",
            "output_hidden_size",
            "embedding_dim",
            "vision_hidden_size",
            "vision_output_dim",
            "encoder_dim",
            "proj_size",
            "projector_hidden_size",
            "d_latents",
            "encoder_embed_dim",
            "decoder_embed_dim",
            "expert_hidden_size",
            "decoder_input_size",
            "lru_width",
            "shared_expert_hidden_size",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "n_inner",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_inner",
            "ffn_hidden_size",
            "intermediate_dim",
            "mlp_dim",
            "encoder_ffn_size",
            "feed_forward_proj_size",
            "d_inner_hid",
            "ff_dim",
            "dff",
            "dense_intermediate_size",
            "prefix_intermediate_size",
            "intermediate_size_mlp",
        ),
        2 * WIDTH,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "moe_ffn_hidden_size",
            "expert_dim",
            "true_hidden_size",
        ),
        WIDTH,
    ),
    # heads
    **dict.fromkeys(
        (
            "num_attention_heads",
            "num_heads",
            "n_head",
            "n_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "encoder_num_attention_heads",
            "decoder_num_attention_heads",
            "attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads",
            "num_kv_heads",
            "n_head_kv",
            "encoder_num_key_value_heads",
            "decoder_num_key_value_heads",
            "multi_query_group_num",
            "num_global_key_value_heads",
            "n_kv_heads",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "d_kv",
            "v_head_dim",
            "kv_channels",
            "attention_head_dim",
            "d_head",
            "global_head_dim",
            "attention_head_size",
        ),
        WIDTH // HEADS,
    ),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), WIDTH // HEADS),
    "rotary_dim": WIDTH // HEADS // 2,
    "qk_head_dim": 2 * WIDTH // HEADS,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 8),
    # experts
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_topk",
            "moe_k",
            "topk_group",
            "n_group",
            "num_selected_experts",
        ),
        2,
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"), 1),
    # text
    **dict.fromkeys(
        (
            "vocab_size",
            "encoder_vocab_size",
            "decoder_vocab_size",
            "src_vocab_size",
            "tgt_vocab_size",
            "text_vocab_size",
            "entity_vocab_size",
            "vocab_size_per_layer_input",
        ),
        VOCABULARY,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "max_seq_length",
            "max_sequence_length",
            "n_ctx",
            "max_source_positions",
            "max_target_positions",
            "encoder_max_position_embeddings",
        ),
        128,
    ),
    **dict.fromkeys(("sliding_window", "local_attention", "attention_window_size", "window_size_"), 8),
    # Mamba and relatives
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    "time_step_rank": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    # images
    "image_size": IMAGE,
    "patch_size": PATCH,
    "vision_feature_layer": -1,
    "num_image_tokens": 16,
    "num_query_tokens": 4,
    "num_queries": 4,
    # sound
    "num_mel_bins": 16,
    "mask_time_length": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": WIDTH,
    "num_codevectors_per_group": 16,
    # so that the content of a row affects the loss
    "initializer_range": 0.2,
    "init_std": 0.2,
}
_SIZES = {name: size for name, size in _SIZES.items() if not name.endswith("_")}
_SPECIAL = {
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": BOS,
    "mask_token_id": MASK,
    "sep_token_id": EOS,
    "cls_token_id": BOS,
    "forced_eos_token_id": EOS,
    "forced_bos_token_id": BOS,
    "eoa_token_id_": EOS,
}
_LISTS: dict[str, Callable[[int], list[int]]] = {
    "depths": lambda n: [2] * n,
    "hidden_sizes": lambda n: [min(16 * 2**i, 64) for i in range(n)],
    "num_heads": lambda n: [2] * n,
    "num_attention_heads": lambda n: [2] * n,
    "conv_dim": lambda n: [WIDTH] * n,
    "tdnn_dim": lambda n: [WIDTH] * n,
    "deepstack_visual_indexes": lambda n: list(range(1, n + 1)),
    "embed_dims": lambda n: [16 * 2**i for i in range(n)],
    "embed_dim": lambda n: [16 * 2**i for i in range(n)],
}


def sized(config_class: type[PreTrainedConfig], forced: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A config of ``config_class`` with small numbers; ``forced`` overrides, sub-configs as dictionaries."""
    forced = dict(forced or {})
    default = config_class()
    accepted = _accepted(config_class)
    own = {name for name in vars(default) if name in accepted}
    values: dict[str, Any] = {}
    special = iter(range(MASK + 1, FIRST_WORD))
    for name, value in vars(default).items():
        inner = forced.get(name)
        if isinstance(value, PreTrainedConfig) or (isinstance(inner, Mapping) and "type" in inner):
            given = dict(inner or {})
            kind = given.pop("type", None)
            values[name] = sized(CONFIG_MAPPING[kind] if kind else type(value), given)
            forced.pop(name, None)
        elif name not in own or isinstance(value, bool):
            continue
        elif name in _SPECIAL:
            values[name] = (
                _SPECIAL[name]
                if value is not None or name in ("pad_token_id", "bos_token_id", "eos_token_id")
                else None
            )
        elif re.fullmatch(r".*_token_(id|index)", name) and isinstance(value, int):
            values[name] = next(special)
        elif name in _LISTS and isinstance(value, (list, tuple)):
            values[name] = type(value)(_LISTS[name](len(value)))
        elif name in _SIZES and isinstance(value, (list, tuple)):
            continue
        elif name in _SIZES and value is not None:
            values[name] = (
                min(value, _SIZES[name])
                if name in ("sliding_window", "num_key_value_heads", "num_experts_per_tok")
                else _SIZES[name]
            )
    values = {name: value for name, value in values.items() if name in accepted or isinstance(value, PreTrainedConfig)}
    if "kv_lora_rank" in own and "num_key_value_heads" in values:  # latent attention has keys for every head
        values["num_key_value_heads"] = HEADS
    values |= forced
    return config_class(**values)


def _accepted(config_class: type) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {f.name for f in dataclasses.fields(config_class) if f.init}
    return set(inspect.signature(config_class.__init__).parameters)


def config_of(
    kind: str, head: str, config_class: type[PreTrainedConfig], forced: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """The tiny config of an architecture, with its exceptions."""
    given = dict(EXCEPTIONS.get(kind, {}))
    given |= EXCEPTIONS.get(f"{kind} | {head}", {})
    given |= forced or {}
    make = given.pop("make", None)
    if make is not None:
        return make()
    if head == "causal LM" and "is_decoder" in _accepted(config_class):
        given.setdefault("is_decoder", True)
    config = sized(config_class, given)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = BOS
    return config
