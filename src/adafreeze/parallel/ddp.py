"""DistributedDataParallel: its reducer is rebuilt after each freeze.

The reducer waits for the gradients of all parameters it was built with. If one of them freezes, DDP silently stops
averaging; with ``find_unused_parameters`` it continues to send zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import RunError
from ..model import Unit
from ..model.blocks import unwrap
from ..model.patches import forward_pre_hook
from .base import Parallel

__all__ = ["DDP"]

# Private methods that rebuild the reducer; torch (seen with 2.13) has no public way.
_NEEDED = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")


class DDP(Parallel):
    """Keeps only live parameters in the reducer.

    Hosts such as Trainer wrap the model themselves, so the wrapper is found in the model's forward passes.

    Args:
        model: inside the wrapper.
        wrapper: if it is known.

    Raises:
        RunError: this version of torch has another reducer.
    """

    name = "DDP"

    def __init__(self, model: nn.Module, wrapper: DistributedDataParallel | None = None) -> None:
        missing = [name for name in _NEEDED if not hasattr(DistributedDataParallel, name)]
        if missing:
            raise RunError(
                f"adafreeze cannot rebuild the DDP reducer: torch {torch.__version__} has no {missing[0]}.",
                fix="Install torch 2.13, or run on one device (CUDA_VISIBLE_DEVICES=0).",
            )
        self.model = model
        self.wrapper = wrapper
        self._behind = False
        self._hook = forward_pre_hook(model, self._look, prepend=True)

    @classmethod
    def find(cls, model: nn.Module, optimizer: Any, units: Mapping[str, Unit]) -> DDP | None:
        """If ``model`` is wrapped, or may be by the host: there is a process group.

        Raises:
            RunError: nn.DataParallel, whose replicas share Python objects, which a frozen prefix changes.
        """
        if isinstance(model, nn.DataParallel):
            raise RunError(
                "The model is wrapped in nn.DataParallel, whose replicas would share the state of a frozen prefix.",
                fix="Use DistributedDataParallel (torchrun --nproc-per-node 2 script.py), or one device "
                "(CUDA_VISIBLE_DEVICES=0).",
            )
        if isinstance(model, DistributedDataParallel):
            return cls(unwrap(model), model)
        return cls(unwrap(model)) if dist.is_available() and dist.is_initialized() else None

    @property
    def extra_bytes(self) -> int:
        """The reducer's buckets, as large as all gradients, unless gradients are views into them."""
        if self.wrapper is not None and self.wrapper.gradient_as_bucket_view:
            return 0
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def after_freeze(self, frozen: Iterable[str]) -> None:
        """Rebuild the reducer: now, or in the next forward pass if the wrapper is not known yet."""
        self._behind = True
        if self.wrapper is not None:
            self._rebuild(self.wrapper)

    def release(self) -> None:
        """Include the thawed parameters again."""
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
            return  # nothing trains, so nothing is sent
        ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
        assert ddp.logger is not None  # made with the reducer
        if ddp.static_graph:
            ddp._static_graph_delay_allreduce_enqueued = False
            ddp.reducer._set_static_graph()
            ddp.logger._set_static_graph()
        for hook, state in ddp._comm_hooks:
            if isinstance(state, PowerSGDState):  # its state per bucket belongs to the old buckets
                for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                    memory.clear()
            ddp.logger._set_comm_hook_name(hook.__qualname__)
            dist._register_comm_hook(ddp.reducer, state, hook)
        if builtin is not None:
            ddp._register_builtin_comm_hook(builtin)


def _builtin_hook(ddp: DistributedDataParallel) -> Any:
    """The registered built-in hook; only the log has its name."""
    name = ddp._get_ddp_logging_data().get("comm_hook", "")
    return getattr(dist.BuiltinCommHookType, name, None) if name else None
