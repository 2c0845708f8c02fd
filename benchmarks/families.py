"""Train every architecture that the installed transformers can build tiny, with and without adafreeze.

    python benchmarks/families.py [--only NAME ...] [--list] [--again] [-o FILE] [--jobs N]

Each family (benchmarks/_zoo) is a random model of a few narrow blocks with LoRA, trained by transformers' Trainer on
the CPU: 12 rows, batches of 4, 3 epochs, learning rate 1e-3. Four arms start from the same weights and seed: *control*
without adafreeze, *later* with ``SafeConfig(freeze_at_start=0)``, *defaults* with ``SafeConfig()``, and *uncached* with
``SafeConfig(cache="off")``. *later* must have bit-identical losses to *control* until its first freeze, and *defaults*
must match *uncached* up to rounding in every step. The table goes to benchmarks/results/families.json while it is made,
so that a second call continues, and from there to docs/families.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _zoo import Case, Family, NotRunnable, collate, families, first_line, head_names, lora_targets
from _zoo.page import page
from _zoo.training import arguments, recording
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, set_seed

from adafreeze import SafeCallback, SafeConfig
from adafreeze.env import environment
from adafreeze.errors import AdafreezeError, AdafreezeWarning

RESULTS = Path(__file__).parent / "results" / "families.json"
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
ARMS: dict[str, dict[str, Any] | None] = {
    "control": None,
    "later": {"freeze_at_start": 0},
    "defaults": {},
    "uncached": {"cache": "off"},
}
# Cached and computed losses may differ by the rounding of kernels at other widths.
TOLERANCE = 1e-4
# Relative to the distance that the weights moved: Adam amplifies rounding in gradients that are nearly zero.
TOLERANCE_WEIGHTS = 0.02
SECONDS = 90
# Log lines of every run; none of them gives a reason for a missing benefit.
_USUAL = ("units are frozen", "Prefix cache on", "Prefix cache: padding is read", "No memory budget", "would freeze")


@dataclass
class Arm:
    """The result of one run.

    Attributes:
        losses: of each step.
        error: the exception that ended the run, if any.
        refused: the error came from adafreeze, before the first step.
        messages: adafreeze's warnings and info lines.
        first_freeze: optimizer steps before the first freeze; None if nothing froze.
        frozen: names of the units frozen at the end.
        units: number of all units.
        prefixes: blocks in the frozen prefix, by stack.
        off: the reason why the cache was off.
        hits: samples served from the cache.
        misses: samples computed.
        weights: trained parameters at the end.
        moved: their Euclidean distance from the start.
    """

    losses: list[float] = field(default_factory=list)
    error: str | None = None
    refused: bool = False
    messages: list[str] = field(default_factory=list)
    first_freeze: int | None = None
    frozen: list[str] = field(default_factory=list)
    units: int = 0
    prefixes: dict[str, int] = field(default_factory=dict)
    off: str | None = None
    hits: int = 0
    misses: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    moved: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the table: counts instead of names, no weights, no usual messages."""
        kept = {
            "losses": [float(f"{value:.6g}") if math.isfinite(value) else str(value) for value in self.losses],
            "error": self.error,
            "first_freeze": self.first_freeze,
            "frozen": len(self.frozen),
            "units": self.units,
            "prefixes": self.prefixes,
            "off": self.off,
            "messages": [line for line in dict.fromkeys(self.messages) if not is_usual(line)],
        }
        return {name: value for name, value in kept.items() if value not in (None, [], {})}


def is_usual(line: str) -> bool:
    """Whether this line appears in every run."""
    return any(usual in line for usual in _USUAL)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect adafreeze's warnings and info lines."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger("adafreeze"), Listener()
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = True
        for warning in caught:
            if issubclass(warning.category, AdafreezeWarning):
                lines.append(str(warning.message).split("\n  Fix:")[0])


def with_lora(case: Case) -> torch.nn.Module:
    """A copy of the model with LoRA r = 4 on the attention projections."""
    model = copy.deepcopy(case.model)
    if case.adapt is not None:
        return case.adapt(model)
    targets = lora_targets(model) if case.targets is None else case.targets
    heads = head_names(model)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=heads or None))


def trainer_of(case: Case, model: Any, callbacks: list[Any], losses: list[float]) -> Any:
    """The trainer of the case."""
    if case.trainer is not None:
        return case.trainer(model, callbacks, losses)
    return recording(Trainer, losses)(
        model=model,
        args=arguments(remove_unused_columns=False),
        train_dataset=case.rows,
        data_collator=lambda rows: collate(rows, case.together),
        callbacks=callbacks,
    )


def run(case: Case, settings: dict[str, Any] | None) -> Arm:
    """Train once; an error ends the arm and is recorded."""
    arm = Arm()
    set_seed(0)
    model = with_lora(case)
    module = getattr(model, "model_body", model)  # SetFit's model is no module itself
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    callback = SafeCallback(SafeConfig(**settings)) if settings is not None else None
    trainer = None
    with heard() as arm.messages:
        try:
            trainer = trainer_of(case, model, [callback] if callback is not None else [], arm.losses)
            trainer.train()
        except Exception as error:
            steps = trainer.state.global_step if trainer is not None else 0
            arm.refused = isinstance(error, AdafreezeError) and steps == 0
            arm.error = first_line(error) + ("" if steps == 0 else f" (after {steps} steps)")
    if callback is not None and callback.safe is not None:
        safe = callback.safe
        safe.close()
        events = safe.journal.events
        arm.first_freeze = next((event["step"] for event in events if event["event"] == "freeze"), None)
        arm.frozen, arm.units, arm.prefixes = sorted(safe.frozen), len(safe.units), safe.prefixes
        arm.off = safe.cache.off_because
        cache = [event for event in events if event["event"] == "cache"]
        arm.hits = sum(event["hits"] + event["advanced"] for event in cache)
        arm.misses = sum(event["misses"] for event in cache)
    trained = dict(module.named_parameters())
    arm.weights = {name: trained[name].detach() for name in start if name in trained}
    arm.moved = distance(start, arm.weights)
    return arm


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Euclidean norm of the difference between all weights."""
    return math.sqrt(sum(float((first[name] - second[name]).double().pow(2).sum()) for name in first.keys() & second))


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Max |a − b| / max(|b|, 1e-3) over the common steps; inf if only one is finite, None without steps."""
    if not first or not second:
        return None
    worst = 0.0
    for a, b in zip(first, second, strict=False):
        if math.isfinite(a) and math.isfinite(b):
            worst = max(worst, abs(a - b) / max(abs(b), 1e-3))
        elif math.isfinite(a) != math.isfinite(b):
            worst = math.inf
    return worst


def reason_in(arm: Arm) -> str | None:
    """The first line that does not appear in every run."""
    return next((line for line in arm.messages if not is_usual(line)), None)


def faults_of(arms: dict[str, Arm], row: dict[str, Any]) -> list[str]:
    """Faults of adafreeze; also fills in the columns with the differences."""
    control, found = arms["control"], []
    for name, arm in arms.items():
        if arm.error is not None and not arm.refused:
            found.append(f"{name}: {arm.error}")
        elif arm.error is None and len(arm.losses) != len(control.losses):
            found.append(f"{name}: {len(arm.losses)} steps, and control {len(control.losses)}")
        elif not all(map(math.isfinite, arm.losses)):
            found.append(f"{name}: a loss is not finite")
    later, defaults, uncached = arms["later"], arms["defaults"], arms["uncached"]
    if not later.refused:
        until = len(control.losses) if later.first_freeze is None else later.first_freeze
        row["until_first_freeze"] = largest_difference(later.losses[:until], control.losses[:until])
        if later.losses[:until] != control.losses[: len(later.losses[:until])]:
            found.append(f"later differs from control before its first freeze (step {until})")
    if not defaults.refused and not uncached.refused:
        row["cached_against_uncached"] = largest_difference(defaults.losses, uncached.losses)
        row["weights"] = distance(defaults.weights, uncached.weights) / max(uncached.moved, 1e-12)
        if defaults.error is None and uncached.error is None and defaults.frozen != uncached.frozen:
            found.append("defaults and uncached froze different units")
        elif (row["cached_against_uncached"] or 0) > TOLERANCE:
            found.append("losses with the cache and without it differ")
        elif row["weights"] > TOLERANCE_WEIGHTS:
            found.append("adapters with the cache and without it differ")
    if defaults.error is None and uncached.error is None and not found:
        if not defaults.frozen and reason_in(defaults) is None:
            found.append("nothing froze, and no message says why")
        elif defaults.frozen and not any(defaults.prefixes.values()) and reason_in(defaults) is None:
            found.append("units froze without a prefix, and no message says why")
        elif any(defaults.prefixes.values()) and not defaults.hits and not defaults.off and reason_in(defaults) is None:
            found.append("a prefix without the cache, and no message says why")
    return found


def verdict_of(arms: dict[str, Arm]) -> tuple[str, str]:
    """(verdict, reason) of arms without faults."""
    arm = arms["defaults"]
    refused = next((other for other in arms.values() if other.refused), None)
    if refused is not None:
        return "refused", refused.error or ""
    if arm.hits:
        return "served", ""
    if any(arm.prefixes.values()):
        return "prefix without cache", arm.off or reason_in(arm) or ""
    if arm.frozen:
        return "frozen without prefix", reason_in(arm) or ""
    return "refused", reason_in(arm) or ""


def examine(family: Family, tell: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Run all four arms of a family and judge them.

    Args:
        family: the family to train.
        tell: called with the unfinished row before each arm.
    """
    row: dict[str, Any] = {"name": family.name, "head": family.head}
    arms: dict[str, Arm] = {}
    try:
        if family.needs is not None:
            importlib.import_module(family.needs)
    except ImportError as error:
        return row | {"verdict": "not installed", "reason": first_line(error)}
    try:
        set_seed(0)
        case = family.build()
        for name, settings in ARMS.items():
            tell(row | {"arm": name})
            arms[name] = run(case, settings)
            control = arms["control"]
            if control.error is not None:
                raise NotRunnable(f"the control fails: {control.error}")
            if not all(map(math.isfinite, control.losses)):
                raise NotRunnable("the loss of the control is not finite")
        faults = faults_of(arms, row)
        if faults and not reproducible(case, arms["control"]):
            raise NotRunnable("the control differs from itself when it is run again")
    except NotRunnable as error:
        return row | {"verdict": "not runnable", "reason": str(error)}
    if faults:
        row |= {"verdict": "FAULT", "reason": "; ".join(faults)}
    else:
        row |= dict(zip(("verdict", "reason"), verdict_of(arms), strict=True))
    row |= {"hits": arms["defaults"].hits, "misses": arms["defaults"].misses}
    return row | {"arms": {name: arm.to_dict() for name, arm in arms.items()}}


def reproducible(case: Case, control: Arm) -> bool:
    """Whether a second run of the control has the same losses."""
    return run(case, None).losses == control.losses


# Each family runs in its own process: a hang or crash costs one row.


def _work(family: Family, path: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    torch.set_num_threads(1)

    def tell(row: dict[str, Any]) -> None:
        Path(path).write_text(json.dumps(row))

    start = time.perf_counter()
    try:
        row = examine(family, tell)
    except Exception as error:  # of this script
        row = {"name": family.name, "head": family.head, "verdict": "not runnable", "reason": first_line(error)}
    tell(row | {"seconds": round(time.perf_counter() - start, 1)})


def _ended(family: Family, path: str, process: Any, late: bool) -> dict[str, Any]:
    """The row of a process that ended or was killed."""
    text = Path(path).read_text()
    row = json.loads(text) if text else {"name": family.name, "head": family.head}
    if "verdict" not in row:
        how = f"takes longer than {SECONDS} s" if late else f"process ended ({_signal(process.exitcode)})"
        arm = row.pop("arm", None)
        started = arm not in (None, "control")
        row |= {"verdict": "FAULT" if started else "not runnable", "reason": f"{arm or 'building'}: {how}"}
    return row


def _signal(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def run_all(chosen: Sequence[Family], jobs: int, seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """Yield rows as they finish."""
    context = multiprocessing.get_context("fork")
    gc.freeze()  # the Trainer collects garbage at its end; skip everything imported here
    waiting, running = list(chosen), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                family = waiting.pop(0)
                path = os.path.join(folder, f"{len(waiting)}.json")
                Path(path).write_text("")
                process = context.Process(target=_work, args=(family, path))
                process.start()
                running[process] = family, path, time.monotonic()
            time.sleep(0.02)
            for process, (family, path, since) in list(running.items()):
                late = time.monotonic() - since > seconds
                if process.is_alive() and not late:
                    continue
                if late:
                    process.kill()
                process.join()
                del running[process]
                yield _ended(family, path, process, late)


def write(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the table so far, sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
    text = f'{{"environment": {json.dumps(environment())},\n"rows": [\n{lines}\n]}}\n'
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help='names, or "name | head"')
    parser.add_argument("--list", action="store_true", help="list the families and exit")
    parser.add_argument("--again", action="store_true", help="rerun families that are already in the file")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [f for f in families() if not options.only or f.name in options.only or f.key in options.only]
    if options.list:
        print("\n".join(family.key for family in chosen))
        return
    rows: dict[str, dict[str, Any]] = {}
    if options.output.exists():
        known = json.loads(options.output.read_text())["rows"]
        rows = {f"{row['name']} | {row['head']}": row for row in known}
    todo = [family for family in chosen if options.again or family.key not in rows]
    start, saved = time.perf_counter(), 0.0
    for number, row in enumerate(run_all(todo, options.jobs), 1):
        key = f"{row['name']} | {row['head']}"
        rows[key] = row
        print(f"{number}/{len(todo)} {key}: {row['verdict']} {row['reason'][:110]}", flush=True)
        if time.perf_counter() - saved > 5:
            write(rows, options.output)
            saved = time.perf_counter()
    write(rows, options.output)
    if options.output == RESULTS:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
    counts: dict[str, int] = {}
    for row in rows.values():
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    print(
        f"{time.perf_counter() - start:.0f} s;", ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    )


if __name__ == "__main__":
    main()
