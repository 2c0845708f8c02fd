"""The weights of the frozen prefix leave the device, and training, evaluation and everything saved stay the same."""

import copy
import io

import pytest
import torch
from torch import nn

from adafreeze.model import find_stacks
from adafreeze.model.offloaded import Offloaded
from cached_run import BLOCKS, assert_same, config, epochs, train
from cases import FAMILIES, batch, lora_model

HALF = BLOCKS // 2


def settings(tmp_path, offload="disk", **more):
    return config({0: HALF}, cache_dir=tmp_path, **{"cache": "auto", "offload": offload, "freeze_at_start": 0.5, **more})


def untied(family, **lora):
    model = lora_model(family, BLOCKS, **lora)
    head = model.get_output_embeddings() if family in ("llama", "qwen3", "gpt2", "t5") else None
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return model


def resident_share(model):
    sizes = [(p.nbytes, p.is_meta) for p in model.parameters()]
    return sum(size for size, away in sizes if not away) / sum(size for size, _ in sizes)


@pytest.mark.parametrize("family", FAMILIES)
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
