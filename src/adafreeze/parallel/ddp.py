"""DistributedDataParallel: its reducer waits for the gradients it was built with, so it is built anew.

A parameter that freezes in mid-run never becomes ready, and from then on DDP averages nothing at all and says nothing;
with ``find_unused_parameters`` it goes on sending zeros. A new reducer holds the live parameters alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import RunError
from ..model.patches import forward_pre_hook
from .base import Parallel

__all__ = ["DDP"]

# What building the reducer anew calls; torch has no public way.
_NEEDED = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper", "reducer")


class DDP(Parallel):
    """Keeps the reducer of whatever DistributedDataParallel calls ``model`` to the parameters that train.

    A host such as Trainer wraps the model where nobody sees it, so the wrapper is looked for in the model's forward
    passes.

    Args:
        model: inside the wrapper.
        wrapper: if it is known.

    Raises:
        RunError: this torch builds its reducer in another way.
    """

    name = "DDP"

    def __init__(self, model: nn.Module, wrapper: DistributedDataParallel | None = None) -> None:
        missing = [name for name in _NEEDED[:-1] if not hasattr(DistributedDataParallel, name)]
        if missing:
            raise RunError(
                f"DistributedDataParallel of torch {torch.__version__} has no {missing[0]}.",
                cause="After a freeze its reducer must be built anew, which adafreeze does by that name.",
                fix="Install torch 2.13, or run on one device (CUDA_VISIBLE_DEVICES=0).",
            )
        self.model = model
        self.wrapper = wrapper
        self._behind = False
        self._hook = forward_pre_hook(model, self._look, prepend=True)

    @property
    def extra_bytes(self) -> int:
        """The reducer's buckets, as large as all gradients, which are views into them or not."""
        if self.wrapper is not None and self.wrapper.gradient_as_bucket_view:
            return 0
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def after_freeze(self, frozen: Iterable[str]) -> None:
        """Build the reducer anew: now, or in the next forward pass if the wrapper has not been seen yet."""
        self._behind = True
        if self.wrapper is not None:
            self._rebuild(self.wrapper)

    def release(self) -> None:
        """Take the thawed parameters in again."""
        self._hook.remove()
        if self.wrapper is not None:
            self._rebuild(self.wrapper)

    def _look(self, *_: Any) -> None:
        active = DistributedDataParallel._get_active_ddp_module()
        if isinstance(active, DistributedDataParallel) and active is not self.wrapper:
            self.wrapper = active
        if self._behind and self.wrapper is not None:
            self._rebuild(self.wrapper)

    def _rebuild(self, ddp: DistributedDataParallel) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

        self._behind = False
        builtin = None if ddp._comm_hooks else _builtin_hook(ddp)
        ddp.reducer._remove_autograd_hooks()
        parameters, sparse = ddp._build_params_for_reducer()
        if not parameters:
            return  # nothing trains: nothing is sent
        ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
        assert ddp.logger is not None  # made with the reducer
        if ddp.static_graph:
            ddp._static_graph_delay_allreduce_enqueued = False
            ddp.reducer._set_static_graph()
            ddp.logger._set_static_graph()
        for hook, state in ddp._comm_hooks:
            if isinstance(state, PowerSGDState):  # what it remembers by bucket belongs to the old buckets
                for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                    memory.clear()
            ddp.logger._set_comm_hook_name(hook.__qualname__)
            torch.distributed._register_comm_hook(ddp.reducer, state, hook)
        if builtin is not None:
            ddp._register_builtin_comm_hook(builtin)


def _builtin_hook(ddp: DistributedDataParallel) -> Any:
    """The hook of torch's own kind that is registered, which only the log knows."""
    name = ddp._get_ddp_logging_data().get("comm_hook", "")
    return getattr(torch.distributed.BuiltinCommHookType, name, None) if name else None
