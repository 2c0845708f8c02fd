"""Whole runs in processes of their own, some of which are killed; one warm process forks them all.

Reads jobs from standard input, one JSON object a line, and answers each with the exit status of the child that ran it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import cases
from adafreeze import Safe, SafeCallback, SafeConfig
from adafreeze.integrations.checkpoints import last_checkpoint

STEPS = 30
ROWS = 4
COUNT = 16  # samples: four steps an epoch
SAVE_EVERY = 3


class Death:
    """SIGKILL for this very process: in the middle of a step, between two, while it saves, or by the clock.

    Args:
        step: the training step (first: 1) in which it comes; None: never.
        place: ``forward``, ``backward``, ``optimizer`` or ``between``; ``saving``: at the next save, before it counts;
            ``saving:PART``: when a file whose name holds PART is next opened for writing; ``clock:SECONDS``: so long
            after the step has begun; ``call:MODULE.FUNCTION:COUNT``: when a function of this module has been called so
            often.
    """

    def __init__(self, step: int | None, place: str) -> None:
        self.step, self.place, self.now = step, place, 0
        self.calls = 0
        if place.startswith("saving:"):
            sys.addaudithook(self._opened)
        if place.startswith("call:"):
            sys.setprofile(self._called)

    def watch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.register_forward_pre_hook(lambda *_: self._begins())
        model.get_submodule(_top_block(model)).register_forward_hook(lambda *_: self.at("forward"))
        top = [p for p in model.parameters() if p.requires_grad][-1]
        top.register_hook(lambda _: self.at("backward"))
        optimizer.register_step_post_hook(lambda *_: self.at("optimizer"))

    def at(self, place: str) -> None:
        if self.place == place and self.step is not None and self.now >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def _begins(self) -> None:
        if torch.is_grad_enabled() and self.now == self.step and self.place.startswith("clock:"):
            timer = threading.Timer(float(self.place[6:]), os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or self.step is None or self.now < self.step:
            return
        path, mode, _ = arguments
        if self.place[7:] in str(path) and mode is not None and "r" not in str(mode):
            os.kill(os.getpid(), signal.SIGKILL)

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        if event != "call":
            return
        _, name, count = self.place.split(":")
        if name == f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}":
            self.calls += 1
            if self.calls == int(count):
                os.kill(os.getpid(), signal.SIGKILL)


def _top_block(model: torch.nn.Module) -> str:
    return next(name for name, _ in model.named_modules() if name.endswith(("layer.3", "layers.3")))


def config(job: dict[str, Any]) -> SafeConfig:
    cache = {"off": {}, "ram": {"cache": "ram"}, "disk": {"cache": "disk", "cache_dir": job["folder"] + "/prefixes"}}
    settings = {"warmup": 0.3, "ramp_end": 0.7, "freeze_share": 0.6, "cache": "off", **cache[job["cache"]]}
    return SafeConfig(**{**settings, **job.get("config", {})})


def trainer(job: dict[str, Any], death: Death) -> tuple[torch.nn.Module, torch.optim.Optimizer, Safe]:
    class Watching(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            death.watch(model, optimizer.optimizer)

        def on_step_begin(self, args, state, control, **kwargs):
            death.now = state.global_step + 1

        def on_step_end(self, args, state, control, **kwargs):
            death.at("between")

    folder = Path(job["folder"])
    args = TrainingArguments(
        output_dir=str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=5,
        per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=1e-2, weight_decay=0.1, seed=3,
        save_strategy="steps", save_steps=SAVE_EVERY, save_total_limit=2,
    )  # fmt: skip
    callback = SafeCallback(config(job), journal=folder / "journal.jsonl") if job.get("safe", True) else None
    host = Trainer(
        model=cases.lora_model(job["family"]),
        args=args,
        train_dataset=cases.Samples(job["family"], COUNT, length=12),
        data_collator=cases.collate,
        callbacks=[*([callback] if callback else []), Watching()],
    )
    host.train(resume_from_checkpoint=job.get("checkpoint") or last_checkpoint(args.output_dir))
    return host.model, host.optimizer.optimizer, callback.safe if callback else None


def loop(job: dict[str, Any], death: Death) -> tuple[torch.nn.Module, torch.optim.Optimizer, Safe]:
    """A loop of one's own: data in an order that follows from the epoch, one file that is replaced as a whole."""
    folder = Path(job["folder"])
    kept = folder / "state.pt"
    model = cases.lora_model(job["family"])
    data = cases.Samples(job["family"], COUNT, length=12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    safe = Safe(
        model,
        config(job),
        optimizer=optimizer,
        probe=torch.utils.data.DataLoader(data, ROWS, collate_fn=cases.collate),
        total_steps=STEPS,
        journal=folder / "journal.jsonl",
    )
    death.watch(model, optimizer)
    torch.manual_seed(5)
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        safe.load_state_dict(state["safe"])
    for step in range(safe.steps, STEPS):
        death.now = step + 1
        epoch, start = divmod(step * ROWS, COUNT)
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(epoch)).tolist()
        model(**cases.collate([data[index] for index in order[start : start + ROWS]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        safe.step()
        if safe.steps % SAVE_EVERY == 0:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "safe": safe}
            with (folder / "state.tmp").open("wb") as file:
                torch.save({name: part.state_dict() for name, part in parts.items()}, file)
                death.at("saving")
            (folder / "state.tmp").replace(kept)
        death.at("between")
    safe.close()
    return model, optimizer, safe


def run(job: dict[str, Any]) -> None:
    """One run, to its end or its death; at its end, what it has come to goes into ``result.pt``."""
    death = Death(job.get("step"), job.get("place", "never"))
    model, optimizer, safe = {"trainer": trainer, "loop": loop}[job["host"]](job, death)
    result = {
        "weights": {name: p.detach() for name, p in model.named_parameters() if "lora" in name or "classifier" in name},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "state": safe.state_dict(random_state=False) if safe is not None else None,
    }
    torch.save(result, Path(job["folder"]) / "result.pt")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()  # before any run: nothing but imports has happened in this process
        if child == 0:
            status, job = 1, json.loads(line)
            log = os.open(Path(job["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                run(job)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
