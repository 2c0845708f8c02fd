"""One rank of the DeepSpeed runs that test_deepspeed.py looks at: python _zero_worker.py FOLDER RANK SIZE RUNS."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cases
import deepspeed
import torch
from torch import distributed as dist

from adafreeze.errors import AdafreezeError
from adafreeze.freeze.freezer import Freezer
from adafreeze.freeze.parallel.deepspeed import DeepSpeedZero, engine_of, param_groups
from adafreeze.freeze.prefix import Prefix
from adafreeze.model import find_stacks, find_units, trace_flow
from adafreeze.model.backends import PeftBackend

ROWS, MICRO, STEPS, FREEZE_AT = 2, 2, 6, 3  # rows of a micro-batch, micro-batches of a step on each rank
DECAY, LR, CLIP = 0.1, 2e-2, 0.05  # the norm of the gradients is above CLIP in every step


def micro_batch(family, step, number):
    """Micro-batch ``number`` of all those of one step, on all ranks."""
    first = 16 * step + ROWS * number
    return cases.collate([cases.sample(family, (first + row) % 64, 12) for row in range(ROWS)])


def falling(step):
    return 1.0 - 0.08 * step


class Sideways(torch.optim.SGD):
    """Moves weights whatever the learning rate is."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1e-3)


class Run:
    """A tiny model with everything that a freeze needs; by DeepSpeed, or without it if ``stage`` is None."""

    def __init__(self, family, stage, precision="fp32", optimizer="AdamW", grouped=True, power=16, **zero):
        self.family = family
        self.model = cases.lora_model(family, dropout=0.0)
        self.stacks, backend = find_stacks(self.model), PeftBackend(self.model)
        self.units = find_units(self.model, self.stacks, backend)
        self.names = list(self.units)[:2]
        flows = trace_flow(self.model, self.stacks, micro_batch(family, 0, 0))
        kind = Sideways if optimizer == "Sideways" else getattr(torch.optim, optimizer)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        groups = param_groups(self.model, weight_decay=DECAY) if grouped else [{"params": trainable}]
        self.optimizer = kind(groups, lr=LR)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, falling)
        self.engine = self.held = None
        if stage is not None:
            config = {
                "train_micro_batch_size_per_gpu": ROWS,
                "gradient_accumulation_steps": MICRO,
                "gradient_clipping": CLIP,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
            }
            if precision != "fp32":
                config[precision] = {"enabled": True} | ({"initial_scale_power": power} if precision == "fp16" else {})
            self.engine = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, lr_scheduler=self.schedule, config=config
            )[0]
            self.held = DeepSpeedZero(engine_of(self.model), None, self.units)
        self.freezer = Freezer(self.units, backend, self.engine.optimizer if self.engine else self.optimizer)
        self.prefix = Prefix(self.model, self.stacks, flows)

    def step(self, step):
        if self.engine is not None:
            for micro in range(MICRO):
                batch = micro_batch(self.family, step, MICRO * dist.get_rank() + micro)
                self.engine.backward(self.engine(**batch).loss)
                self.engine.step()
            return
        every = MICRO * dist.get_world_size()
        for number in range(every):
            (self.model(**micro_batch(self.family, step, number)).loss / every).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def freeze(self, tell=True):
        self.freezer.freeze(self.names)
        self.prefix.update()
        if self.held is not None and tell:
            self.held.after_freeze(self.names)

    def weights(self):
        found = {name: p for name, p in self.model.named_parameters() if "lora_" in name}
        sharded = any(hasattr(p, "ds_id") for p in found.values())
        with deepspeed.zero.GatheredParameters(list(found.values()), enabled=sharded):
            return {name: p.detach().clone() for name, p in found.items()}

    def masters(self):
        """What the optimizer steps on this rank for the frozen and for the live units."""
        zero = self.engine.optimizer
        flat = getattr(zero, "single_partition_of_fp32_groups", None) or getattr(
            zero, "fp32_partitioned_groups_flat", None) or getattr(zero, "fp32_groups_flat_partition", None)  # fmt: skip
        flat = flat or [tensor for group in zero.fp32_groups for tensor in group]
        return [tensor.detach().clone() for tensor in flat]

    def close(self):
        self.prefix.restore()
        if self.engine is not None:
            self.held.release()
            self.engine.destroy()


def train(family="llama", stage=2, tell=True, steps=STEPS, masters=True, **settings):
    run = Run(family, stage, **settings)
    if run.held is not None:
        run.held.check()
    told = {"weights": [], "masters": [], "lrs": [], "skipped": []}
    for step in range(steps):
        run.step(step)
        told["weights"].append(run.weights())
        told["masters"].append(run.masters() if stage and masters else [])
        told["lrs"].append(sorted({group["lr"] for group in run.optimizer.param_groups}))
        told["skipped"].append(run.engine.skipped_steps if run.engine else 0)
        if step + 1 == FREEZE_AT:
            run.freeze(tell)
    owned = {id(p) for name in run.names for p in run.units[name].parameters()}
    told["frozen"] = [name for name, p in run.model.named_parameters() if id(p) in owned]
    run.close()
    return told


def refused(family="llama", stage=2, how="ungrouped"):
    """What a run raises that must not go on."""
    run = Run(family, stage, optimizer="Sideways" if how == "sideways" else "AdamW", grouped=how != "ungrouped")
    try:
        if how == "renamed":
            kind = type(run.engine.optimizer)
            run.engine.optimizer.__class__ = type("Another", (kind,), {})
            DeepSpeedZero(run.engine, None, run.units)
        run.held.check()
        run.freeze()
        run.step(0)
    except AdafreezeError as error:
        return [type(error).__name__, str(error)]
    finally:
        run.close()
    return None


def resumed(family="llama", stage=2, precision="fp32"):
    """Stop after a freeze, resume in a new engine; checkpoints leave frozen parameters out, as Trainer's do."""
    folder = f"{sys.argv[1]}/{family}{stage}{precision}"
    run = Run(family, stage, precision)
    for step in range(FREEZE_AT):
        run.step(step)
    run.freeze()
    run.step(FREEZE_AT)
    saved = run.weights()
    run.engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    flags = [p.requires_grad for name in run.names for p in run.units[name].parameters()]
    if stage == 3:
        adapter = run.engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    else:
        adapter = run.engine.module_state_dict(exclude_frozen_parameters=True)
    run.step(FREEZE_AT + 1)
    straight = run.weights()
    run.close()
    again = Run(family, stage, precision)
    again.engine.load_checkpoint(folder, load_module_strict=False)
    again.freeze()
    loaded = again.weights()
    again.step(FREEZE_AT + 1)
    onward = again.weights()
    again.close()
    return {
        "saved": saved, "loaded": loaded, "straight": straight, "onward": onward, "flags": flags,
        "adapter": None if adapter is None else [name for name in adapter if "lora_" in name],
    }  # fmt: skip


def released(family="llama", stage=2):
    """After release() all moves again, and nothing of adafreeze is left on engine and optimizer."""
    run = Run(family, stage)
    for step in range(2):
        run.step(step)
    run.freeze()
    run.step(2)
    run.held.release()
    run.freezer.restore()
    before = run.weights()
    run.step(3)
    after = run.weights()
    left = [name for name in ("save_checkpoint", "load_checkpoint", "module_state_dict") if name in vars(run.engine)]
    hooks = [len(run.optimizer._optimizer_step_pre_hooks), len(run.optimizer._optimizer_step_post_hooks)]
    run.close()
    return {"moved": all(not torch.equal(before[name], after[name]) for name in before), "left": left, "hooks": hooks}


def main(folder, rank, size, runs):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    results = {}
    for name, settings in runs.items():
        try:
            results[name] = globals()[settings.pop("do", "train")](**settings)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.update({"RANK": sys.argv[2], "LOCAL_RANK": sys.argv[2], "WORLD_SIZE": sys.argv[3]})
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
