"""One rank of the runs of test_ranks.py: python worker.py FOLDER SCENARIO ..., with the environment of torchrun.

Every scenario trains the same tiny model on the same global batches for the same steps; rank r of n takes the rows
r, r + n, ... of each.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch
from launch import tell
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

import cases
from adafreeze import RunError, Safe, SafeConfig

STEPS, ROWS = 24, 6
# Bytes; plain training on half of the rows needs more, buckets included.
BUDGET = 400_000
# Half of four blocks freeze in two events, by scores.
CONFIG = {"warmup": 0.2, "ramp_end": 0.7, "freeze_share": 0.7, "probe_tokens": 256, "min_measurements": 4}


class Batches(torch.utils.data.Dataset):
    """Global batches of six rows of twelve tokens; an epoch has four batches."""

    def __init__(self, family: str) -> None:
        self.rows = [cases.sample(family, index, 12) for index in range(4 * ROWS)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
        first = step % 4 * ROWS
        return cases.collate(self.rows[first : first + ROWS][rank::ranks])


def weights(model: torch.nn.Module) -> dict[str, list[float]]:
    """All adapter weights, exact in JSON."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten().tolist()
        for name, p in model.named_parameters()
        if "lora_" in name
    }


class History:
    """Frozen units after each step, and names of frozen weights that moved since the step before.

    ``read`` returns all adapter weights of a model by name.
    """

    def __init__(self, read=weights) -> None:
        self.frozen, self.moved, self.read, self._before = [], [], read, {}

    def add(self, safe: Safe, model: torch.nn.Module) -> None:
        ids, now = {id(p) for p in safe.freezer.parameters()}, self.read(model)
        frozen = {name: now[name] for name, p in model.named_parameters() if id(p) in ids}
        self.moved += [name for name, value in frozen.items() if self._before.get(name, value) != value]
        self._before = frozen
        self.frozen.append(sorted(safe.frozen))

    def forget(self) -> None:
        """Before weights change for another reason than a step: a loaded state."""
        self._before = {}


def train(
    family: str, wrap, rank: int, ranks: int, *, config=None, accumulate: int = 1, optimizer=None, spy=None, virtual=1,
    hide=False, wander=False, autocast=False,
):  # fmt: skip
    """A whole run; ``virtual`` ranks in one process process their rows one after the other.

    ``hide``: Safe gets the module inside the wrapper, as in Trainer. ``wander``: in each epoch a rank takes the rows
    that another one had in the last. ``autocast``: to bfloat16, so that layers are lean.
    """
    model = cases.lora_model(family, dropout=0.0)
    data = Batches(family)
    wrapped = wrap(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    safe = Safe(
        model if hide else wrapped, SafeConfig(**{**CONFIG, **(config or {})}), optimizer=optimizer,
        probe=torch.utils.data.DataLoader(data, ROWS, collate_fn=cases.collate), total_steps=STEPS,
        batch_size=ROWS // max(ranks, virtual), samples_per_step=ROWS * accumulate // ranks,
        samples_per_epoch=len(data),
    )  # fmt: skip
    history = History()
    for step in range(STEPS):
        for part in range(accumulate):
            last = part == accumulate - 1
            silent = wrapped.no_sync() if not last and hasattr(wrapped, "no_sync") else contextlib.nullcontext()
            for one in range(virtual):
                with silent:
                    place = rank if virtual == 1 else one
                    if wander:
                        place = (place + step // 4) % ranks
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = wrapped(**data.batch(step * accumulate + part, place, max(ranks, virtual))).loss
                    (loss / virtual / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if spy is not None:
            spy(step, safe, wrapped)
        safe.step()
        history.add(safe, model)
    hits = [event for event in safe.journal.events if event["event"] == "cache_off"]
    result = {
        "history": history.frozen, "moved": history.moved, "weights": weights(model), "scores": safe.scores,
        "events": [event["event"] for event in safe.journal.events], "cache_off": hits,
        "logs": safe.logs(), "trainable": sum(p.requires_grad for p in model.parameters()),
    }  # fmt: skip
    safe.close()
    result["cache"] = next((event for event in safe.journal.events if event["event"] == "cache"), None)
    result["trainable_after_close"] = sum(p.requires_grad for p in model.parameters())
    return result


def ddp(**options):
    return lambda model: DistributedDataParallel(model, **options)


def hooked(hook, state=None, sent: list[int] | None = None):
    """DDP with a comm hook that counts what it sends."""

    def counting(state, bucket):
        if sent is not None:
            sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return hook(state, bucket)

    def wrap(model):
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(state() if state else None, counting if sent is not None else hook)
        return wrapped

    return wrap


def builtin(model):
    wrapped = DistributedDataParallel(model)
    wrapped._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    return wrapped


def fsdp2(model):
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module)
    return fully_shard(model)


def by_step(rank, ranks, name, sent):
    """Bytes sent in each step."""
    totals, before = [], 0
    wrap = hooked(default_hooks.allreduce_hook, None, sent)

    def spy(step, safe, wrapped):
        nonlocal before
        totals.append(sum(sent) - before)
        before = sum(sent)

    return train("llama", wrap, rank, ranks, spy=spy) | {"bytes": totals}


def disagree(rank, ranks, folder):
    """Rank 1 freezes another unit before safe.step()."""

    def spy(step, safe, wrapped):
        if rank == 1 and step + 1 == (safe.decider.plan or [0])[0]:
            safe.freezer.freeze([list(safe.units)[1]])

    try:
        train("llama", ddp(), rank, ranks, spy=spy)
    except RunError as error:
        return {"error": str(error)}
    return {"error": None}


SCENARIOS = {
    "ddp": lambda rank, ranks: train("llama", ddp(), rank, ranks),
    "bert": lambda rank, ranks: train("bert", ddp(), rank, ranks),
    "t5": lambda rank, ranks: train("t5", ddp(), rank, ranks),
    "find_unused": lambda rank, ranks: train("llama", ddp(find_unused_parameters=True), rank, ranks),
    "static_graph": lambda rank, ranks: train("llama", ddp(static_graph=True), rank, ranks),
    "bucket_view": lambda rank, ranks: train("llama", ddp(gradient_as_bucket_view=True), rank, ranks),
    "small_buckets": lambda rank, ranks: train("llama", ddp(bucket_cap_mb=0.001), rank, ranks),
    "accumulate": lambda rank, ranks: train("llama", ddp(), rank, ranks, accumulate=2),
    "bytes": lambda rank, ranks: by_step(rank, ranks, "bytes", []),
    "builtin_hook": lambda rank, ranks: train("llama", builtin, rank, ranks),
    "fp16_hook": lambda rank, ranks: train("llama", hooked(default_hooks.fp16_compress_hook), rank, ranks),
    "power_sgd": lambda rank, ranks: train(
        "llama",
        hooked(
            powerSGD_hook.powerSGD_hook,
            lambda: powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2),
        ),
        rank,
        ranks,
    ),
    "by_hand": lambda rank, ranks: train(
        "llama", ddp(), rank, ranks, config={"freeze": ["model.layers.0"], "policy": "bottom_up"}
    ),
    "budget": lambda rank, ranks: train("llama", ddp(), rank, ranks, config={"memory_budget": BUDGET}),
    "own_minds": lambda rank, ranks: train("llama", ddp(), rank, ranks, config={"policy": own_mind(rank)}),
    "grad_norm": lambda rank, ranks: train("llama", ddp(), rank, ranks, config={"score": "grad_norm"}),
    "autocast": lambda rank, ranks: train("llama", ddp(), rank, ranks, autocast=True),
    "fsdp2_autocast": lambda rank, ranks: train("llama", fsdp2, rank, ranks, autocast=True),
    "fsdp2": lambda rank, ranks: train("llama", fsdp2, rank, ranks),
    "fsdp2_bert": lambda rank, ranks: train("bert", fsdp2, rank, ranks),
    "fsdp2_t5": lambda rank, ranks: train("t5", fsdp2, rank, ranks),
    "fsdp2_local": lambda rank, ranks: train("llama", fsdp2, rank, ranks, config={"score": "local_cka"}),
    "hidden": lambda rank, ranks: train("llama", ddp(), rank, ranks, hide=True),
    "wander": lambda rank, ranks: train(
        "llama",
        ddp(),
        rank,
        ranks,
        wander=True,
        config={
            "freeze": ["model.layers.0"],
            "policy": "bottom_up",
            "cache": "disk",
            "cache_dir": os.environ["CACHE_DIR"],
        },
    ),
    "offload": lambda rank, ranks: train("llama", ddp(), rank, ranks, config=offloaded()),
    "offload_before": lambda rank, ranks: train(
        "llama", ddp(), rank, ranks, hide=True, config=offloaded(fill="before")
    ),
    "hidden_by_hand": lambda rank, ranks: train(
        "llama", ddp(), rank, ranks, hide=True, config={"freeze": ["model.layers.0"], "policy": "bottom_up"}
    ),
}


def offloaded(**more):
    return {"freeze_at_start": 0.5, "offload": "disk", "cache": "disk", "cache_dir": os.environ["CACHE_DIR"], **more}


def own_mind(rank):
    """A policy that chooses another unit on every rank."""

    def policy(situation):
        return [f"model.layers.{rank}"] if situation.ramp >= 1 else []

    return policy


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in names:
        made = disagree(rank, ranks, folder) if name == "disagree" else SCENARIOS[name](rank, ranks)
        tell(folder, name, rank, **made)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
