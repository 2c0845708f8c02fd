"""Config values that tiny models need beyond small numbers."""

from __future__ import annotations

from typing import Any

_HEAD = {"head_dim": 8}
_LIKE_HEADS = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
_GEMMA3N = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "intermediate_size": 64,
}
_GEMMA4 = {
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_SWIN = {"embed_dim": 16, "window_size": 4, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "patch_size": 4}
_PINPOINTS = {"image_grid_pinpoints": [[32, 32]]}
_QWEN_VL = {"text_config": {"rope_parameters": _MROPE}}

# By model type, or by "model type | head". "make" builds the config itself.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 4]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [2, 3],
        "patcher_config": {},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 64}, "d_model": 32, "n_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _LIKE_HEADS},
    "dots3_note_text": _LIKE_HEADS,
    "esm": {"vocab_size": 96, "pad_token_id": 0, "mask_token_id": 3},
    "esmc": _LIKE_HEADS,
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma4_text": _GEMMA4,
    "gemma4": {
        "text_config": _GEMMA4,
        "vision_config": {"type": "gemma4_vision", "pooling_kernel_size": 2, "global_head_dim": 8},
    },
    "gemma4_unified": {"text_config": {"global_head_dim": 8}},
    "internvl": {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    "qianfan_ocr": {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "vipllava": {"vision_feature_layers": [-2, -3, 1]},
    "granite4_vision": _PINPOINTS,
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 12,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
    },
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 3},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "kimi_linear": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "input_size": 32, "visual_embed": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "led": {"attention_window": 8},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": _HEAD,
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "perceiver": {"num_self_attends_per_block": 4, "num_latents": 16},
    "neomme": {"head_dim": 16, "hidden_size": 64},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "is_decoder": False, "num_buckets": 4},
    "reformer | causal LM": {"is_decoder": True},
    "xlstm": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "mamba_ngroups": 1,
        "adapter_rank": 8,
    },
    # Images
    "swin": _SWIN,
    "donut-swin": _SWIN,
    "swinv2": {**_SWIN, "pretrained_window_sizes": [0, 0]},
    "vit | masked image modeling": {"encoder_stride": 8},
    "deit | masked image modeling": {"encoder_stride": 8},
    "swin | masked image modeling": {**_SWIN, "encoder_stride": 8},
    "swinv2 | masked image modeling": {**_SWIN, "pretrained_window_sizes": [0, 0], "encoder_stride": 8},
    "beit | semantic segmentation": {"out_indices": [1, 2, 3, 4]},
    "data2vec-vision | semantic segmentation": {"out_indices": [1, 2, 3, 4]},
    # Sound
    "wav2vec2-bert | CTC": {"vocab_size": 96},
    "wav2vec2-conformer | CTC": {"vocab_size": 96},
    # Pictures and text
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "glm4v": _QWEN_VL,
    "blip-2": {"image_token_index": 4},
    "instructblip": {"image_token_index": 4},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}},
    "voxtral": {"audio_token_id": 7},
    "glm46v": _QWEN_VL,
    "glm4v_moe": _QWEN_VL,
    "glm_ocr": _QWEN_VL,
    "glmga": _QWEN_VL,
    "paddleocr_vl": _QWEN_VL,
    "hunyuan_vl": {"text_config": _HEAD},
}
