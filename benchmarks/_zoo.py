"""Tiny random models of every architecture that the installed transformers can build, each with rows to train on.

``families()`` lists them: one for each (architecture, head) of transformers' own Auto mappings, and those that have a
shape of their own. A ``Family`` is built when it is called: a model without adapters, rows, and a collator.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
FIRST_WORD = 48  # below it are the special tokens, each with an id of its own
PAD, BOS, EOS, MASK = 0, 1, 2, 3
ROWS = 12
MOST_PARAMETERS = 20_000_000
IMAGE, PATCH = 32, 8
Row = dict[str, Any]


class NotRunnable(Exception):
    """The family cannot be built tiny, or gives no loss: nothing of adafreeze was tried."""


@dataclass
class Case:
    """What is trained.

    Attributes:
        model: without adapters, or with (``adapted``).
        rows: the samples.
        together: names whose tensors are concatenated along dimension 0, not stacked (image patches of Qwen-VL).
        targets: names of modules for LoRA; None: found by ``lora_targets``.
        adapt: puts the adapters into the model, if it does that in a way of its own.
        trainer: makes what trains, from the model, callbacks, and a list for the losses; None: transformers' Trainer.
    """

    model: nn.Module
    rows: Sequence[Row]
    together: tuple[str, ...] = ()
    targets: Any = None
    adapt: Callable[[Any], Any] | None = None
    trainer: Callable[[Any, list[Any], list[float]], Any] | None = None


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: of the architecture, as transformers' ``model_type`` where it has one.
        head: what it is trained for.
        build: makes a ``Case``; called once an arm, after the seed is set.
        needs: the optional package that it is made with.
    """

    name: str
    head: str
    build: Callable[[], Case] = field(compare=False)
    needs: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name} | {self.head}"


# Sizes by the attribute's name; what is not listed stays as the library sets it.
LAYERS, HALF, WIDTH, HEADS = 6, 3, 32, 4
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
    # Mamba and its relatives
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
    # so that what a row holds shows in the loss
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
    """A config of ``config_class`` with small numbers; ``forced`` has the last word, sub-configs as dictionaries."""
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


# Heads, in the order of the table, with transformers' own list of architectures that have one.
HEADS_OF: dict[str, str] = {
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "causal LM": "CAUSAL_LM",
    "masked LM": "MASKED_LM",
    "seq2seq LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "multiple choice": "MULTIPLE_CHOICE",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
    "image classification": "IMAGE_CLASSIFICATION",
    "masked image modeling": "MASKED_IMAGE_MODELING",
    "semantic segmentation": "SEMANTIC_SEGMENTATION",
    "video classification": "VIDEO_CLASSIFICATION",
    "audio classification": "AUDIO_CLASSIFICATION",
    "CTC": "CTC",
    "speech seq2seq": "SPEECH_SEQ_2_SEQ",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "time series prediction": "TIME_SERIES_PREDICTION",
}
# Of these heads an architecture gets a row only where it has none of another text head.
IF_NO_OTHER = ("token classification", "question answering")


def names_of(head: str) -> dict[str, str]:
    """Model type → class name, as the library lists them."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{HEADS_OF[head]}_MAPPING_NAMES")
    return {kind: name if isinstance(name, str) else name[0] for kind, name in mapping.items()}


def of_transformers() -> Iterator[Family]:
    """One family for each architecture and head in the library's mappings."""
    seen: set[str] = set()
    for head in HEADS_OF:
        for kind, class_name in sorted(names_of(head).items()):
            if head in IF_NO_OTHER and kind in seen:
                continue
            seen.add(kind)
            yield Family(kind, head, lambda kind=kind, head=head, name=class_name: build(kind, head, name))


def build(kind: str, head: str, class_name: str, forced: Mapping[str, Any] | None = None) -> Case:
    """A tiny model of an architecture with this head, and rows that it takes.

    Raises:
        NotRunnable: the library cannot build it tiny, or none of the inputs that are tried gives a loss.
    """
    import transformers
    from _rows import candidates

    try:
        model_class = getattr(transformers, class_name)
        config = config_of(kind, head, model_class.config_class or CONFIG_MAPPING[kind], forced)
        torch.manual_seed(0)
        model = model_class(config)
    except Exception as error:
        raise NotRunnable(f"cannot be built tiny: {first_line(error)}") from error
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise NotRunnable(f"cannot be built tiny: {count / 1e6:.0f} M parameters remain")
    failures: list[str] = []
    for rows, together in candidates(model, head):
        try:
            loss = loss_of(model, collate(rows[:2], together))
        except Exception as error:
            failures.append(first_line(error))
            continue
        if loss is not None and loss.requires_grad:
            return Case(model, rows, together)
        failures.append("returns no loss")
    failures = list(dict.fromkeys(failures))
    raise NotRunnable(" / ".join(failures[:3]) or f"no inputs are known for {head}")


def config_of(
    kind: str, head: str, config_class: type[PreTrainedConfig], forced: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """The tiny config of an architecture, as its exceptions say."""
    from _exceptions import EXCEPTIONS

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


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """What the model itself returns as its loss."""
    model.train()
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def first_line(error: BaseException) -> str:
    """``ValueError: what it says first``, without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(/[\w.\-]+){2,}", "...", " ".join(lines[:3]) if lines else "")
    return f"{type(error).__name__}: {text[:200]}"


_FILL = {"labels": -100, "input_ids": PAD, "decoder_input_ids": PAD}


def collate(rows: Sequence[Row], together: Sequence[str] = ()) -> dict[str, Any]:
    """Rows as one batch: each tensor padded to the largest of the batch in every dimension; ``together`` joined."""
    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if name in together:
            batch[name] = torch.cat(values)
            continue
        shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        padded = values[0].new_full((len(values), *shape), _FILL.get(name, 0))
        for place, value in zip(padded, values, strict=True):
            place[tuple(slice(size) for size in value.shape)] = value
        batch[name] = padded
    return batch


# Names of the linear layers of attention, over all families.
_ATTENTION = (
    *(
        "q_proj",
        "v_proj",
        "k_proj",
        "query",
        "value",
        "key",
        "q",
        "v",
        "q_lin",
        "v_lin",
        "query_key_value",
        "qkv",
        "c_attn",
    ),
    *(
        "qkv_proj",
        "Wqkv",
        "query_proj",
        "value_proj",
        "in_proj_linear",
        "to_q",
        "to_v",
        "c_q",
        "c_v",
        "q_a_proj",
        "q_b_proj",
    ),
    *(
        "kv_b_proj",
        "kv_a_proj_with_mqa",
        "att_proj",
        "linear_q",
        "linear_v",
        "Wq",
        "Wv",
        "query_proj",
        "W_pack",
        "wq",
        "wv",
    ),
    *(
        "q_head",
        "v_head",
        "in_proj_qkvz",
        "attn_qkv",
        "self_attn_q",
        "project_q",
        "query_layer",
        "fc_q",
        "project_value",
    ),
)


def lora_targets(model: nn.Module) -> list[str] | str:
    """Linear layers of attention; where a block has none that is known by name, all its linear layers."""
    from transformers.pytorch_utils import Conv1D

    of_blocks: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        inside = re.match(r"(.*?\.\d+)\.", name)
        if inside and isinstance(module, (nn.Linear, Conv1D)):
            of_blocks.setdefault(inside[1], set()).add(name.rsplit(".", 1)[-1])
    found: set[str] = set()
    for names in of_blocks.values():
        found |= names & set(_ATTENTION) or names - {"out_proj"}  # PEFT refuses that of Mamba
    return sorted(found) or "all-linear"


def head_names(model: nn.Module) -> list[str]:
    """What people train beside the adapters: the classifier, which is new."""
    new = ("classifier", "score", "classification_head", "qa_outputs", "pre_classifier", "seq_relationship", "cls_head")
    return [name for name, _ in model.named_children() if name in new]


def families() -> list[Family]:
    """All of them, in the order of the table."""
    from _shapes import of_own_shape

    return [*of_own_shape(), *of_transformers()]
