"""Safe: the loop that measures, decides, freezes, and writes down what it did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import SafeConfig
from .costs.memory import SavedBytes
from .decide.policy import Situation, choose
from .decide.schedule import Settling, cubic_ramp, measurement_steps
from .env import environment
from .errors import AdafreezeError, ConfigError, ProbeError, RunError, warn
from .freeze import Freezer, Prefix
from .journal import Journal
from .model import Flow, Probe, find_stacks, find_units, trace_flow
from .model._draw import rows_of
from .model.backends import PeftBackend
from .model.blocks import unwrap
from .model.probe import keep_random_state
from .model.units import warn_of_other_trainables
from .scoring import Scorer

__all__ = ["Safe"]

STATE_VERSION = 1


class Safe:
    """Selective adapter freezing of a model that trains.

    ::

        safe = Safe(model, optimizer=optimizer, probe=train_dataloader, total_steps=len(train_dataloader) * epochs)
        for batch in train_dataloader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            safe.step()
        safe.close()

    Nothing about the run changes before the first freeze: no random state advances, no batch is taken, losses
    are the same to the last bit.

    Args:
        model: with PEFT adapters in its blocks.
        config: settings; the defaults need no tuning.
        optimizer: whose state for frozen adapters is freed.
        probe: where scores are measured: the train dataloader (its dataset and collator are used, it is not
            iterated), a batch, or an iterable of batches.
        total_steps: optimizer steps of the whole run.
        samples_per_step: samples of one optimizer step; observed in the first step if not given.
        journal: a path or a Journal; None keeps the events in memory.

    Raises:
        ModelError: the model has no adapters by block.
        ProbeError: the probe holds nothing that the model takes.
        ConfigError: total_steps is not positive, or a unit to freeze by hand does not exist.
        RunError: the run is of a kind where freezing is not right yet (several processes, DeepSpeed).
    """

    def __init__(
        self,
        model: nn.Module,
        config: SafeConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        probe: Any,
        total_steps: int,
        samples_per_step: int | None = None,
        journal: Journal | str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config or SafeConfig()
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(
                f"total_steps is {total_steps!r}.",
                cause="Warm-up and ramp are shares of the run, so its length in optimizer steps must be known.",
                fix="Safe(..., total_steps=len(train_dataloader) // accumulation * epochs)",
            )
        _refuse_unsupported(model, optimizer)
        self.model = unwrap(model)
        self.total_steps = total_steps
        self.samples_per_step = samples_per_step
        self.steps = 0
        self.scores: dict[str, float] = {}
        self.warmup_end: int | None = None
        self.stacks = find_stacks(self.model)
        self.backend = PeftBackend(self.model)
        self.units = find_units(self.model, self.stacks, self.backend, self.config.granularity)
        self._others = bool(warn_of_other_trainables(self.model, self.stacks, self.units))
        unknown = [name for name in self.config.freeze if name not in self.units]
        if unknown:
            raise ConfigError(
                f"SafeConfig.freeze names {unknown[0]!r}, which is no unit of this model.",
                cause=f"Its units are {', '.join(list(self.units)[:3])}, ... ({len(self.units)} in all).",
                fix=f'SafeConfig(freeze=["{next(iter(self.units))}"])',
            )
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        self._probe = Probe.draw(probe, self.config.probe_tokens, self.config.seed, pad)
        self.freezer = Freezer(self.units, self.backend, optimizer)
        self.flows = self._trace()
        self.prefix = Prefix(self.model, self.stacks, self.flows)
        self._chains = _chains(self.flows)
        self._scorer: Scorer | None = None
        self._plan: tuple[int, ...] | None = None
        self._settling = Settling(self.config.settle_patience, self.config.settle_tolerance)
        self._seen_samples = self._seen_tokens = self._seen_forwards = 0
        self._saved_per_token: float | None = None
        self._counting: SavedBytes | None = None
        self._count_next = True
        self._check_gradients = False
        self._warned: set[str] = set()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]
        torch_optimizer = getattr(optimizer, "optimizer", optimizer)
        if isinstance(torch_optimizer, torch.optim.Optimizer):
            self._handles.append(torch_optimizer.register_step_pre_hook(self._before_optimizer_step))
        self.journal = journal if isinstance(journal, Journal) else Journal(journal)
        self.journal.write(
            "start",
            step=0,
            total_steps=total_steps,
            config=self.config.to_dict(),
            model=type(self.model).__name__,
            stacks={stack.path: len(stack) for stack in self.stacks},
            units=list(self.units),
            environment=environment(),
        )
        self.prefix.update()
        if self.config.freeze:
            self._freeze(list(self.config.freeze), by="hand")

    # What a host reads.

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen units."""
        return self.freezer.frozen

    @property
    def prefixes(self) -> dict[str, int]:
        """Blocks in the frozen prefix of each stack, by its path."""
        return dict(self.prefix.depths)

    @property
    def state_key(self) -> tuple[Any, ...]:
        """Changes whenever the cost of a step changes."""
        return (*sorted(self.frozen), *self.prefixes.items())

    @property
    def flops_spent(self) -> int:
        """FLOPs spent on measuring so far."""
        return self._scorer.flops_spent if self._scorer is not None else 0

    def logs(self) -> dict[str, float]:
        """Scalars for the host's own logs.

        ``safe/saved_mib`` is what autograd keeps of one average micro-batch: counted once after each freeze and
        scaled by the mean number of tokens.
        """
        logs: dict[str, float] = {
            "safe/live_units": len(self.units) - len(self.frozen),
            "safe/frozen_units": len(self.frozen),
            "safe/frozen_prefix": sum(self.prefixes.values()),
            "safe/ramp": round(self._ramp(), 4),
        }
        if self._saved_per_token is not None and self._seen_forwards:
            mean_tokens = self._seen_tokens / self._seen_forwards
            logs["safe/saved_mib"] = round(self._saved_per_token * mean_tokens / 2**20, 3)
        total = sum(self.scores.values())
        if total > 0:
            logs["safe/frozen_score_share"] = round(
                sum(self.scores.get(n, 0.0) for n in self.frozen) / total, 6
            )
        return logs

    # What a host calls.

    def step(self) -> list[str]:
        """To be called after each optimizer step, gradients cleared. Returns the units frozen now."""
        self.steps += 1
        try:
            if self._plan is None:
                self._prepare()
            if self._plan is None or self.steps not in self._plan:
                return []
            with keep_random_state():
                self._measure()
        except (RunError, ConfigError):
            raise
        except Exception as error:  # whatever it is: a failed measurement must not end somebody's run
            self._give_up_measuring(error)
            return []
        return self._decide()

    def close(self) -> None:
        """Leave the model as it was: flags, modules, hooks, forwards. Trained weights stay."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self.prefix.restore()
            self.journal.write("close", step=self.steps, frozen=self.frozen, flops_spent=self.flops_spent)
            self.freezer.restore()
            self._handles = []
            self.journal.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "frozen": sorted(self.frozen),
            "scores": dict(self.scores),
            "warmup_end": self.warmup_end,
            "plan": list(self._plan) if self._plan is not None else None,
            "probe_samples": self._scorer.probe.samples if self._scorer is not None else None,
            "settling": self._settling.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a run where :meth:`state_dict` was written; freezes its units at once.

        Raises:
            RunError: written by another version, or for a model with other units.
        """
        if state.get("version") != STATE_VERSION:
            raise RunError(
                f"The adafreeze state has version {state.get('version')!r}; this version reads {STATE_VERSION}.",
                cause="The checkpoint was written by another version of adafreeze.",
                fix="Resume with the version that wrote it, or start the run anew.",
            )
        strangers = [name for name in state["frozen"] if name not in self.units]
        if strangers:
            raise RunError(
                f"The checkpoint froze {strangers[0]!r}, which is no unit of this model.",
                cause="It was written for another model, adapter or granularity.",
                fix="Resume with the model and SafeConfig of the checkpoint.",
            )
        self.steps, self.warmup_end = state["steps"], state["warmup_end"]
        self.scores = dict(state["scores"])
        self._settling.load_state_dict(state["settling"])
        if state["plan"] is not None:
            self._plan = tuple(state["plan"])
            self._scorer = self._new_scorer(self._probe.shrunk(state["probe_samples"]))
            with keep_random_state():
                self._scorer.prepare(run_samples=10**12, most=len(self._plan))
        self._freeze([name for name in state["frozen"] if name not in self.frozen], by="resume")

    # Measuring and deciding.

    def _trace(self) -> dict[str, Flow]:
        from .model.probe import _moved, _slice

        chunk = self._probe.chunks[0]
        one = {
            key: value
            for key, value in _slice(chunk, slice(0, 1), rows_of(chunk)).items()
            if key != "real_tokens"
        }
        try:
            with keep_random_state():
                flows = trace_flow(self.model, self.stacks, _moved(one, next(self.model.parameters()).device))
        except Exception as error:
            raise ProbeError(
                f"The model does not take the probe: {type(error).__name__}: {error}",
                cause=f"It was called with {', '.join(one)} of one sample.",
                fix="Pass batches as the model gets them in training: probe=[batch, ...]",
            ) from error
        for path, flow in flows.items():
            owned = {
                id(p) for unit in self.units.values() for p in (*unit.parameters(), *unit.shared_parameters())
            }
            outside = {id(p) for p in flow.upstream if id(p) not in owned}
            names = [name for name, p in self.model.named_parameters() if id(p) in outside]
            if names:
                warn(
                    f"Trainable parameters stand below the blocks of {path}: {', '.join(names[:4])}.",
                    cause="Their gradient passes through every block, so no prefix can be cut off; freezing saves "
                    "hardly any memory or time.",
                    fix="Leave embeddings out of modules_to_save and set bias='none'.",
                )
        return flows

    def _new_scorer(self, probe: Probe) -> Scorer:
        return Scorer(self.model, self.stacks, self.units, self.backend, self.config, probe)

    def _prepare(self) -> None:
        self._plan = ()
        until = max(1, int(self.config.ramp_end * self.total_steps))
        samples = self.samples_per_step or self._seen_samples or 1
        self._scorer = self._new_scorer(self._probe)
        with keep_random_state():
            count = self._scorer.prepare(self.total_steps * samples, until)
        self._plan = measurement_steps(until, count)
        self.journal.write(
            "probe",
            step=self.steps,
            samples=self._scorer.probe.samples,
            tokens=self.config.probe_tokens,
            nbytes=self._scorer.nbytes,
            flops=self._scorer.flops_spent,
            flops_per_measurement=self._scorer.flops_per_measurement,
            plan=self._plan,
        )

    def _measure(self) -> None:
        assert self._scorer is not None
        if self.backend.any_merged():
            raise ProbeError(
                "Adapters are merged into the base weights at the moment of a measurement.",
                cause="Measuring would unmerge them, which rounds the base weights.",
                fix="Unmerge before safe.step(), or train without merging.",
            )
        before = self._scorer.flops_spent
        measured = self._scorer.measure(self.prefixes)
        finite = {
            name: score for name, score in measured.items() if score == score and abs(score) != float("inf")
        }
        if len(finite) < len(measured):
            self._warn_once(
                "non-finite",
                f"{len(measured) - len(finite)} of {len(measured)} scores are not finite at step {self.steps}.",
                cause="Activations on the probe are NaN or infinite; these scores are left out.",
                fix="Look at the loss; lower the learning rate, or use bf16 in place of fp16.",
            )
        self.scores.update(finite)
        self.journal.write(
            "measure",
            step=self.steps,
            scores=measured,
            ramp=self._ramp(),
            flops=self._scorer.flops_spent - before,
        )

    def _situation(self, ramp: float) -> Situation:
        units: dict[tuple[str, int], list[str]] = {}
        for name, unit in self.units.items():
            units.setdefault((unit.stack, unit.block), []).append(name)
        blocks = {
            s.path: tuple(tuple(units.get((s.path, i), ())) for i in range(len(s))) for s in self.stacks
        }
        return Situation(
            step=self.steps,
            ramp=ramp,
            scores=dict(self.scores),
            chains=tuple(tuple(block for path in chain for block in blocks[path]) for chain in self._chains),
            frozen=self.frozen,
            freeze_share=self.config.freeze_share,
            threshold=self.config.threshold,
            min_live_blocks=self.config.min_live_blocks,
            something_else_trains=self._something_else_trains(),
        )

    def _decide(self) -> list[str]:
        if self.warmup_end is None:
            limit = max(1, int(self.config.warmup * self.total_steps))
            choice = frozenset(choose(self.config.policy, self._situation(1.0)))
            if self._settling.update(self.scores, choice):
                self.warmup_end = min(self.steps, limit)
            elif self.steps >= limit:
                self.warmup_end = limit
            if self.warmup_end is not None:
                self.journal.write("warmup_end", step=self.steps, warmup_end=self.warmup_end)
        names = (
            choose(self.config.policy, self._situation(self._ramp())) if self.warmup_end is not None else []
        )
        if names and not self.config.dry_run:
            self._freeze(names, by=self.config.to_dict()["policy"])
        elif names:
            self.journal.write("would_freeze", step=self.steps, units=names)
        return [] if self.config.dry_run else names

    def _freeze(self, names: list[str], by: str) -> None:
        if not names:
            return
        self.freezer.freeze(names)
        self.prefix.update()
        self._count_next = True
        self._check_gradients = by != "resume"
        self.journal.write(
            "freeze",
            step=self.steps,
            units=names,
            by=by,
            ramp=self._ramp(),
            scores={name: self.scores.get(name) for name in names},
            frozen=len(self.frozen),
            prefixes=self.prefixes,
        )

    def _ramp(self) -> float:
        if self.warmup_end is None:
            return 0.0
        return cubic_ramp(self.steps, self.warmup_end, int(self.config.ramp_end * self.total_steps))

    def _something_else_trains(self) -> bool:
        owned = {
            id(p) for unit in self.units.values() for p in (*unit.parameters(), *unit.shared_parameters())
        }
        return any(p.requires_grad and id(p) not in owned for p in self.model.parameters())

    def _give_up_measuring(self, error: Exception) -> None:
        self._plan = tuple(step for step in self._plan or () if step > self.steps)
        fact = error.fact if isinstance(error, AdafreezeError) else f"{type(error).__name__}: {error}"
        self.journal.write("measure_failed", step=self.steps, error=str(error))
        self._warn_once(
            "measure",
            f"Scores could not be measured at step {self.steps}: {fact}",
            cause=error.cause
            if isinstance(error, AdafreezeError)
            else "The forward pass on the probe failed.",
            fix=(
                error.fix
                if isinstance(error, AdafreezeError)
                else "Pass a probe that the model takes: probe=batch"
            )
            + " Training goes on"
            + (", without freezing." if not self._plan else "."),
        )

    # Hooks.

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        loose = self.freezer.audit()
        if loose:
            self.journal.write("refreeze", step=self.steps, units=loose)
            self._warn_once(
                "loose",
                f"{len(loose)} frozen units had been made trainable again ({loose[0]}, ...) and were frozen again.",
                cause="Something called set_adapter, enable_adapter_layers or requires_grad_ on the model.",
                fix="Nothing to do if that was meant for another adapter; call safe.close() to end the freezing.",
            )
            self.prefix.update()
        given = {**kwargs, "input_ids": args[0]} if args and isinstance(args[0], torch.Tensor) else kwargs
        rows = rows_of(given)
        ids = given.get("input_ids")
        self._last_tokens = ids.numel() if isinstance(ids, torch.Tensor) else rows
        self._seen_samples += rows if self.steps == 0 else 0
        self._seen_tokens += self._last_tokens
        self._seen_forwards += 1
        if self._count_next and self._last_tokens:
            self._count_next = False
            self._counting = SavedBytes(model)
            self._counting.__enter__()

    def _after_forward(self, *_: Any) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._saved_per_token = self._counting.total / self._last_tokens
            self._counting = None

    def _before_optimizer_step(self, *_: Any) -> None:
        if self._scorer is not None:
            self._scorer.listen()
        if not self._check_gradients:
            return
        self._check_gradients = False
        missing = self.freezer.live_without_gradient()
        live = len(self.units) - len(self.frozen)
        if missing and len(missing) == live and not self._something_else_trains():
            raise RunError(
                f"After the freeze at step {self.steps} no live unit has a gradient.",
                cause="The graph was cut above the frozen prefix, by reentrant checkpointing or a detach.",
                fix='Use gradient_checkpointing_kwargs={"use_reentrant": False}.',
            )
        if missing:
            self._warn_once(
                "gradient",
                f"{len(missing)} of {live} live units have no gradient after a freeze: {missing[0]}, ...",
                cause="Their block was skipped in this step (layer drop, unused experts), or the graph was cut.",
                fix="If it is not layer drop, please report it with the output of python -m adafreeze.env.",
            )

    def _warn_once(self, key: str, fact: str, *, cause: str, fix: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warn(fact, cause=cause, fix=fix, stacklevel=4)


def _chains(flows: Mapping[str, Flow]) -> list[list[str]]:
    """Stacks in data-flow order, those that read each other in one chain."""
    chains: list[list[str]] = []
    for path, flow in flows.items():
        chain = next((chain for chain in chains if set(chain) & set(flow.reads)), None)
        if chain is None:
            chains.append([path])
        else:
            chain.append(path)
    return chains


def _refuse_unsupported(model: nn.Module, optimizer: Any) -> None:
    distributed = torch.distributed
    processes = (
        distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    )
    found = ""
    if processes > 1:
        found = f"The run has {processes} processes."
    elif isinstance(model, nn.DataParallel):
        found = "The model is wrapped in nn.DataParallel."
    elif "deepspeed" in type(getattr(optimizer, "optimizer", optimizer)).__module__:
        found = "The optimizer is DeepSpeed's."
    if found:
        raise RunError(
            found,
            cause="There a parameter that freezes in mid-run leaves the ranks apart or keeps moving, silently; "
            "this version freezes in one process on one device.",
            fix="Run on one device (CUDA_VISIBLE_DEVICES=0), or leave adafreeze out.",
        )
