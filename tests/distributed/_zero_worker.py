"""One rank of the runs of test_deepspeed.py: python _zero_worker.py FOLDER RUNS."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import deepspeed
import torch
import worker
from torch import distributed as dist

import cases
from adafreeze import Safe, SafeConfig
from adafreeze.errors import AdafreezeError
from adafreeze.freeze.freezer import Freezer
from adafreeze.freeze.prefix import Prefix
from adafreeze.model import find_stacks, find_units, trace_flow
from adafreeze.model.backends import PeftBackend
from adafreeze.parallel.deepspeed import DeepSpeedZero, engine_of

# Without this DeepSpeed compiles kernels for shared memory; with it, it uses gloo.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Every CPU computes in fp16, but DeepSpeed allows it only where that is fast.
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True

ROWS, MICRO, STEPS, FREEZE_AT = 2, 2, 6, 3  # rows of a micro-batch, micro-batches of a step on each rank
DECAY, LR, CLIP = 0.1, 2e-2, 0.05  # the norm of the gradients is above CLIP in every step


def micro_batch(family, step, number):
    """Micro-batch ``number`` of one step, counted over all ranks."""
    first = 16 * step + ROWS * number
    return cases.collate([cases.sample(family, (first + row) % 64, 12) for row in range(ROWS)])


def falling(step):
    return 1.0 - 0.08 * step


class Sideways(torch.optim.SGD):
    """Moves weights regardless of gradients and learning rate."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1e-3)


class Run:
    """A tiny model with everything that a freeze needs; without DeepSpeed if ``stage`` is None."""

    def __init__(self, family, stage, precision="fp32", optimizer="AdamW", mixed=False, power=16, grads=None, **zero):
        self.family = family
        self.model = cases.lora_model(family, dropout=0.0)
        self.stacks, backend = find_stacks(self.model), PeftBackend(self.model)
        self.units = find_units(self.model, self.stacks, backend)
        self.names = list(self.units)[:2]
        flows = trace_flow(self.model, self.stacks, micro_batch(family, 0, 0))
        kind = Sideways if optimizer == "Sideways" else getattr(torch.optim, optimizer)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        # With several groups, each contains parameters of every unit.
        groups = [{"params": trainable[part::3]} for part in range(3)] if mixed else [{"params": trainable}]
        self.optimizer = kind(groups, lr=LR, weight_decay=DECAY)
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
            if grads is not None:
                config["data_types"] = {"grad_accum_dtype": grads}
            self.engine = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, lr_scheduler=self.schedule, config=config
            )[0]
            self.held = DeepSpeedZero(engine_of(self.model), self.units)
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

    def freeze(self, notify=True):
        self.freezer.freeze(self.names)
        self.prefix.update()
        if self.held is not None and notify:
            self.held.after_freeze(self.names)

    def masters(self):
        """The float32 copies on this rank that the optimizer steps."""
        zero, found = self.engine.optimizer, {}
        named = [(name, p) for name, p in self.model.named_parameters() if "lora_" in name]
        if hasattr(zero, "fp32_groups_flat"):  # fp16 without ZeRO
            for flat, held in zip(zero.fp32_groups_flat, zero.fp16_groups, strict=True):
                copies = torch._utils._unflatten_dense_tensors(flat, held)
                found.update({id(p): copy for p, copy in zip(held, copies, strict=True)})
        elif hasattr(zero, "fp32_groups"):  # the same for single parameters
            for copies, held in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
                found.update({id(p): copy for p, copy in zip(held, copies, strict=True)})
        elif hasattr(zero, "fp32_partitioned_groups_flat"):
            found = {id(p): zero._get_fp32_opt_state_partition(p, False)[0] for _, p in named}
        else:
            found = {id(p): p._hp_mapping.get_hp_fragment() for _, p in named if p._hp_mapping is not None}
        return {name: found[id(p)].detach().clone() for name, p in named if id(p) in found}

    def close(self):
        self.prefix.restore()
        if self.engine is not None:
            self.held.release()
            self.engine.destroy()


def train(family="llama", stage=2, notify=True, steps=STEPS, masters=False, **settings):
    run = Run(family, stage, **settings)
    found = {"weights": [], "masters": [], "lrs": [], "skipped": []}
    for step in range(steps):
        run.step(step)
        found["weights"].append(gathered(run.model))
        found["masters"].append(run.masters() if masters else {})
        found["lrs"].append(sorted({group["lr"] for group in run.optimizer.param_groups}))
        found["skipped"].append(run.engine.skipped_steps if run.engine else 0)
        if step + 1 == FREEZE_AT:
            run.freeze(notify)
    owned = {id(p) for name in run.names for p in run.units[name].parameters()}
    found["optimizer"] = type(run.engine.optimizer if run.engine else run.optimizer).__name__
    found["frozen"] = [name for name, p in run.model.named_parameters() if id(p) in owned]
    run.close()
    return found


def refused(how=None, stage=2, **config):
    """The error of an unsupported run; None without one."""
    run = Run("llama", stage)
    model = run.engine
    if how == "renamed":
        kind = type(run.engine.optimizer)
        run.engine.optimizer.__class__ = type("Another", (kind,), {})
    elif how == "by itself":
        run.engine.optimizer.zenflow = True
    elif how == "another model":
        model = cases.lora_model("llama")
    try:
        decide(model, run.engine.optimizer, **config).close()
    except AdafreezeError as error:
        return [type(error).__name__, str(error)]
    finally:
        run.close()
    return None


def decide(model, optimizer, family="llama", **config):
    """Safe as a script creates it."""
    data = worker.Batches(family)
    return Safe(
        model, SafeConfig(**{**worker.CONFIG, **config}), optimizer=optimizer,
        probe=torch.utils.data.DataLoader(data, worker.ROWS, collate_fn=cases.collate), total_steps=worker.STEPS,
        batch_size=worker.ROWS // 2, samples_per_step=worker.ROWS // 2, samples_per_epoch=len(data),
    )  # fmt: skip


def safely(stage, family="llama", stop=None, inside=False, lora_dropout=0.0, **config):
    """A whole run by scores in a plain loop; after ``stop`` steps it continues in a new engine.

    ``inside``: Safe gets the module inside the engine. ``lora_dropout``: so that layers are lean.
    """
    found, history = {}, worker.History(gathered_lists)
    folder = f"{sys.argv[1]}/safely{stage}{family}"
    data = worker.Batches(family)
    for part in ("first", "second") if stop else ("whole",):
        model = cases.lora_model(family, dropout=0.0, lora_dropout=lora_dropout)
        parameters = [p for p in model.parameters() if p.requires_grad]
        engine, optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
            config={
                "train_micro_batch_size_per_gpu": worker.ROWS // 2, "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )  # fmt: skip
        safe = decide(model if inside else engine, optimizer, family, **config)
        history.forget()
        if part == "second":
            engine.load_checkpoint(folder, load_module_strict=False)
            safe.load_state_dict(json.loads(Path(f"{folder}/safe.json").read_text()))
        for step in range(safe.steps, stop if part == "first" else worker.STEPS):
            engine.backward(engine(**data.batch(step, dist.get_rank(), 2)).loss)
            engine.step()
            safe.step()
            history.add(safe, model)
        if part == "first":
            engine.save_checkpoint(folder, exclude_frozen_parameters=True)
            if dist.get_rank() == 0:
                Path(f"{folder}/safe.json").write_text(json.dumps(safe.state_dict()))
            dist.barrier()
        found["history"], found["moved"] = history.frozen, history.moved
        found["parallel"], found["logs"] = safe.parallel.name, safe.logs()
        found["weights"], found["scores"] = gathered(model), safe.scores
        found["events"] = [event["event"] for event in safe.journal.events]
        safe.close()
        engine.destroy()
    return found


def gathered(model):
    """All adapter weights, gathered."""
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    sharded = any(hasattr(p, "ds_id") for p in found.values())
    with deepspeed.zero.GatheredParameters(list(found.values()), enabled=sharded):
        return {name: p.detach().clone() for name, p in found.items()}


def gathered_lists(model):
    return {name: value.tolist() for name, value in gathered(model).items()}


def resumed(family="llama", stage=2, precision="fp32"):
    """Stop after a freeze, resume in a new engine; checkpoints exclude frozen parameters, as Trainer's do."""
    folder = f"{sys.argv[1]}/{family}{stage}{precision}"
    run = Run(family, stage, precision)
    for step in range(FREEZE_AT):
        run.step(step)
    run.freeze()
    run.step(FREEZE_AT)
    saved = gathered(run.model)
    run.engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    flags = [p.requires_grad for name in run.names for p in run.units[name].parameters()]
    adapter = run.engine.module_state_dict(exclude_frozen_parameters=True)
    run.step(FREEZE_AT + 1)
    straight = gathered(run.model)
    run.close()
    again = Run(family, stage, precision)
    again.engine.load_checkpoint(folder, load_module_strict=False)
    again.freeze()
    loaded = gathered(again.model)
    again.step(FREEZE_AT + 1)
    onward = gathered(again.model)
    again.close()
    return {
        "saved": saved, "loaded": loaded, "straight": straight, "onward": onward, "flags": flags,
        "adapter": [name for name in adapter if "lora_" in name],
    }  # fmt: skip


def released(family="llama", stage=2):
    """After release() all weights move again, and engine and optimizer have nothing of adafreeze."""
    run = Run(family, stage)
    for step in range(2):
        run.step(step)
    run.freeze()
    run.step(2)
    run.held.release()
    run.freezer.restore()
    before = gathered(run.model)
    run.step(3)
    after = gathered(run.model)
    left = [name for name in ("save_checkpoint", "load_checkpoint", "module_state_dict") if name in vars(run.engine)]
    hooks = [len(run.optimizer._optimizer_step_pre_hooks), len(run.optimizer._optimizer_step_post_hooks)]
    run.close()
    return {"moved": all(not torch.equal(before[name], after[name]) for name in before), "left": left, "hooks": hooks}


def main(folder, runs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, settings in runs.items():
        began = time.monotonic()
        try:
            results[name] = globals()[settings.pop("do", "train")](**settings)
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    torch.save(results, f"{folder}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
