"""Which kind of run this is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import RunError
from ..model.blocks import unwrap
from ..model.units import Unit
from .base import Parallel
from .ddp import DDP
from .deepspeed import DeepSpeedZero, engine_of, is_deepspeed
from .fsdp import FSDP2, is_fsdp1, is_fsdp2

__all__ = ["find_parallel"]


def find_parallel(model: nn.Module, optimizer: Any, units: Mapping[str, Unit]) -> Parallel:
    """What spreads ``model`` over processes, ready for freezes; checked before step 0.

    Args:
        model: as the host calls it, or inside its wrapper.
        optimizer: of the run; accelerate's or DeepSpeed's wrapper, or the real one.
        units: by name.

    Raises:
        RunError: nn.DataParallel, FSDP1, or a DeepSpeed that adafreeze does not know.
    """
    if isinstance(model, nn.DataParallel):
        raise RunError(
            "The model is wrapped in nn.DataParallel.",
            cause="Its replicas share Python objects with the original, which a frozen prefix changes.",
            fix="torchrun --nproc-per-node 2 script.py, with DistributedDataParallel; or one device: "
            "CUDA_VISIBLE_DEVICES=0",
        )
    if is_fsdp1(model):
        raise RunError(
            "The model is wrapped in FullyShardedDataParallel (FSDP1).",
            cause="It flattens the parameters of many adapters into one, which cannot freeze in part.",
            fix="FSDP2: fully_shard(model), or --fsdp_config '{\"version\": 2}' in Trainer.",
        )
    if is_fsdp2(model):
        return FSDP2()
    if is_deepspeed(model, optimizer):
        return DeepSpeedZero(engine_of(model), optimizer, units)
    if isinstance(model, DistributedDataParallel):
        return DDP(unwrap(model), model)
    # Hosts wrap the model where nobody sees it, and in a group of one process too.
    return DDP(unwrap(model)) if dist.is_available() and dist.is_initialized() else Parallel()
