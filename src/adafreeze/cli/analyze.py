"""``adafreeze analyze``: how flat the minima of finished runs are, side by side."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, ModelError, RunError, note
from ..journal import read_journal
from ..report.page import ANALYSIS_FILE
from ..train.arguments import Arguments, parse, parse_flags
from ..train.output import CONFIG_FILE, JOURNAL_FILE
from ..train.tasks import make_task, rows_of
from .train import fit_length

if TYPE_CHECKING:
    from ..analysis import Finding, Loss, Settings

__all__ = ["main"]

WEIGHTS_FILE = "adapter_model.safetensors"
USAGE = """usage: adafreeze analyze RUN [RUN ...] [-o FOLDER] [flags]

Are the minima flatter? Hessian spectrum and trace, sharpness, weight norms and slices of the training loss over all
adapter parameters, for the output folders of `adafreeze train`. Runs that differ by their seed alone stand as one
group. Writes analysis.json and analysis.png; the runs stay as they are.

  -o, --output FOLDER      where they go; default: analysis
  --samples N              training samples that the loss is a mean over; default 128
  --batch_size N           default 32
  --eigenvalues N          of the Hessian, the largest by magnitude; default 5
  --trace_samples N        random vectors for its trace; default 20
  --grid N                 points of the 1-D slice, odd; the 2-D slice has half as many a side; default 21
  --radius R               of the slices, in norms of the weights; default 1.0
  --seed N                 of samples, directions and vectors; default 0
  --head                   the head that trained beside the adapters belongs to the parameters
  --dtype float64          the computation in double precision
"""

# What is the same in runs that only a seed tells apart, and what tells neither data, model nor adapter apart.
_OF_ONE_RUN = {"seed", "data_seed", "output_dir", "run_name", "logging_dir"}
_NO_MATTER = {"cache_dir", "token", "trust_remote_code", "max_eval_samples", "validation_file", "validation_dir"}


@dataclass
class AnalyzeArguments:
    """Of which runs, and how closely."""

    _argument_group_name = "analysis"

    runs: list[str] = field(metadata={"help": "Output folders of runs."})
    output: str = field(default="analysis", metadata={"help": "A folder.", "aliases": ["-o"]})
    samples: int = field(default=128, metadata={"help": "Training samples."})
    batch_size: int = field(default=32, metadata={"help": "Samples of a batch."})
    eigenvalues: int = field(default=5, metadata={"help": "Of the Hessian."})
    trace_samples: int = field(default=20, metadata={"help": "Random vectors."})
    grid: int = field(default=21, metadata={"help": "Points of the 1-D slice."})
    radius: float = field(default=1.0, metadata={"help": "Of the slices."})
    seed: int = field(default=0, metadata={"help": "Of samples, directions and vectors."})
    head: bool = field(default=False, metadata={"help": "With the head."})
    dtype: Literal["float32", "float64"] = field(default="float32", metadata={"help": "Of the computation."})

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "eigenvalues", "trace_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name} is {getattr(self, name)}.", cause="It must be at least 1.", fix=f"Leave out --{name}."
                )
        if self.grid < 3 or self.grid % 2 == 0:
            raise ConfigError(
                f"--grid is {self.grid}.",
                cause="It must be odd and at least 3, so that the weights themselves are a point of it.",
                fix=f"--grid {max(3, self.grid | 1)}",
            )
        if not 0 < self.radius < math.inf:
            raise ConfigError(f"--radius is {self.radius}.", cause="It must be a number above 0.", fix="--radius 1.0")


@dataclass(frozen=True)
class _Run:
    folder: Path
    name: str
    arguments: Arguments
    method: str
    frozen: int  # units, at its end

    def described(self) -> dict[str, Any]:
        """Model, data and adapter: what must be the same for a comparison."""
        parts = (self.arguments.model, self.arguments.data, self.arguments.adapter)
        return {
            name: value
            for part in parts
            for name, value in asdict(part).items()
            if name not in _NO_MATTER  # type: ignore[call-overload]
        }

    def kind(self) -> str:
        """Equal for runs that differ by their seed alone."""
        settings = {name: value for name, value in self.arguments.resolved.items() if name not in _OF_ONE_RUN}
        return json.dumps([self.method, settings], sort_keys=True, default=str)


def main(argv: Sequence[str] | None = None) -> int:
    """Check all runs, measure each, then table, JSON and figure."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if count == 0:
        raise ConfigError(
            f"{words[0]} stands before the runs.",
            cause="The first words say what is analyzed.",
            fix=f"adafreeze analyze RUN [RUN ...] {words[0]}",
        )
    flags = ["--runs", *words[:count], *words[count:]]
    (given,) = parse_flags([AnalyzeArguments], flags, prog="adafreeze analyze", description="Analyze runs.")
    runs = _find(given.runs)
    output = _make_folder(given.output)

    from transformers.utils import logging

    from ..analysis import Settings, draw, measure

    logging.set_verbosity_error()  # it would say that the head is new, which the adapter's replaces
    settings = Settings(given.eigenvalues, given.trace_samples, given.grid, given.radius, given.seed)
    load, found = _loader(given), {}
    for number, run in enumerate(runs, 1):
        loss = load(run)
        note(f"Run {number} of {len(runs)}: {run.name}, {loss.size:,} parameters.")
        found[run.name] = measure(loss, settings)
    groups = _grouped(runs)
    _write(output / ANALYSIS_FILE, given, settings, runs, found, groups)
    _show(groups, runs, found, settings)
    print(f"Written to {output / ANALYSIS_FILE}.")
    picture = output / "analysis.png"
    draw({name: [found[run] for run in members] for name, members in groups.items()}, settings, picture)
    print(f"The picture is {picture}.")
    return 0


def _find(given: list[str]) -> list[_Run]:
    """The runs, each finished, and all of one model, data and adapter.

    Raises:
        RunError: they are not.
    """
    folders = [Path(run).expanduser() for run in given]
    twice = next((folder for i, folder in enumerate(folders) if folder in folders[:i]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice.", cause="The results would be the same.", fix="Name it once.")
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    first, *others = runs
    for other in others:
        ours, theirs = first.described(), other.described()
        for name in ours:
            if ours[name] != theirs[name]:
                raise _different(first, other, f"{name} is {ours[name]} and {theirs[name]}")
        ours, theirs = _shapes(first), _shapes(other)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                shapes = (str(shape.get(name, "not there")) for shape in (ours, theirs))
                raise _different(first, other, f"{name} is {' and '.join(shapes)}")
    return runs


def _different(first: _Run, other: _Run, difference: str) -> RunError:
    return RunError(
        f"{first.name} and {other.name} cannot be compared: {difference}.",
        cause="Curvature and slices are those of one loss over the same parameters: model, data and adapters must be "
        "the same.",
        fix=f"adafreeze analyze {first.folder}, and {other.folder} in a second call",
    )


def _read(folder: Path, name: str) -> _Run:
    journal, config = folder / JOURNAL_FILE, folder / CONFIG_FILE
    if not (journal.is_file() and config.is_file()):
        raise RunError(
            f"There is no run in {folder}.",
            cause=f"It is no folder with {JOURNAL_FILE} and {CONFIG_FILE}, as `adafreeze train` leaves one.",
            fix="Name the --output_dir of a run.",
        )
    method, done = "", None
    for event in read_journal(journal):
        if event["event"] in ("run", "resume"):
            method, done = event["method"], None
        elif event["event"] == "done":
            done = event
    if done is None or not (folder / WEIGHTS_FILE).is_file():
        raise RunError(
            f"The run in {folder} is not finished.",
            cause=f"Its journal has no end, or {WEIGHTS_FILE} is gone: it was stopped, or still trains.",
            fix=f"adafreeze train --config {config} --output_dir {folder} --resume_from_checkpoint last",
        )
    arguments = parse(["--config", str(config), "--output_dir", str(folder)])
    return _Run(folder, name, arguments, method, done.get("frozen_units", 0))


def _names(folders: list[Path]) -> list[str]:
    """The ends of the paths, as short as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _shapes(run: _Run) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(run.folder / WEIGHTS_FILE, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _loader(given: AnalyzeArguments) -> Callable[[_Run], Loss]:
    """Makes of a run the loss over its own training samples; rows and samples are the same where the data are."""
    import torch
    from peft import PeftModel

    from ..analysis import Loss, adapter_parameters
    from ..tasks import Source, load_splits

    dtype = getattr(torch, given.dtype)

    def load(run: _Run) -> Loss:
        args, data, training = run.arguments.model, run.arguments.data, run.arguments.training
        task = make_task(data)
        rows, _ = load_splits(
            task,
            **{**rows_of(data), "validation_file": None},
            train_split=data.train_split,
            skip_bad_rows=data.skip_bad_rows,
            max_train_samples=data.max_train_samples,
            seed=training.seed,
            cache_dir=args.cache_dir,
            token=args.token,
            trust_remote_code=args.trust_remote_code,
        )
        source = Source(
            name=args.model_name_or_path,
            tokenizer=args.tokenizer_name,
            revision=args.model_revision,
            cache_dir=args.cache_dir,
            token=args.token,
            trust_remote_code=args.trust_remote_code,
            dtype=args.dtype,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        )
        try:
            processor = task.load_processor(source)
            base = task.load_model(source)
        except ModelError as error:
            raise ModelError(
                f"The base model of {run.name} cannot be loaded. {error.fact}",
                fix=f"Put it back, or correct model_name_or_path in {run.folder / CONFIG_FILE}.",
            ) from error
        fit_length(task, base, processor, {"max_seq_length": data.max_seq_length, "block_size": data.block_size})
        model = PeftModel.from_pretrained(base, str(run.folder)).to(training.device, dtype)
        rows = task.prepare(rows, processor)
        generator = torch.Generator().manual_seed(given.seed)
        drawn = [rows[i] for i in torch.randperm(len(rows), generator=generator)[: given.samples].tolist()]
        drawn.sort(key=lambda row: len(row.get("input_ids", ())))  # little padding
        collate = task.collator(processor)
        batches = [
            {
                name: value.to(training.device, dtype if value.is_floating_point() else value.dtype)
                for name, value in collate(drawn[start : start + given.batch_size]).items()
            }
            for start in range(0, len(drawn), given.batch_size)
        ]
        return Loss(model, batches, adapter_parameters(model, head=given.head))

    return load


def _grouped(runs: list[_Run]) -> dict[str, list[str]]:
    """Names of runs by what they have in common: a single run by its name, seeds of one method by the method's."""
    kinds: dict[str, list[_Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind(), []).append(run)
    methods = [members[0].method for members in kinds.values() if len(members) > 1]
    groups = {}
    for members in kinds.values():
        method, name = members[0].method, members[0].name
        if len(members) > 1:
            name = f"{method if methods.count(method) == 1 else name}, {len(members)} seeds"
        groups[name] = [run.name for run in members]
    return groups


def _make_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}).",
            cause="It or a folder above it is a file or read-only, or the disk is full.",
            fix="-o path/that/you/can/write",
        ) from error
    return folder


def _write(
    path: Path,
    given: AnalyzeArguments,
    settings: Settings,
    runs: list[_Run],
    found: Mapping[str, Finding],
    groups: Mapping[str, list[str]],
) -> None:
    content = {
        "settings": asdict(given),
        "steps": settings.steps(),
        "plane_steps": settings.plane_steps(),
        "groups": groups,
        "runs": {
            run.name: {
                "folder": str(run.folder),
                "method": run.method,
                "seed": run.arguments.training.seed,
                "frozen_units": run.frozen,
                **asdict(found[run.name]),
            }
            for run in runs
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _show(groups: Mapping[str, list[str]], runs: list[_Run], found: Mapping[str, Finding], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    frozen = {run.name: run.frozen for run in runs}
    first = found[runs[0].name]
    table = Table(title=f"The minima, over {first.parameters:,} parameters", title_justify="left")
    table.add_column("")
    for name in groups:
        table.add_column(name, justify="right")

    def add(label: str, value: Callable[[Finding], float]) -> None:
        table.add_row(label, *(_spread([value(found[run]) for run in members]) for members in groups.values()))

    table.add_row("frozen units", *(_spread([frozen[run] for run in members]) for members in groups.values()))
    add("training loss", lambda finding: finding.loss)
    add("norm of its gradient", lambda finding: finding.gradient_norm)
    add("largest eigenvalue", lambda finding: finding.eigenvalues[0])
    table.add_row("trace", *(_trace([found[run] for run in members]) for members in groups.values()))
    add("SAM sharpness, ρ = 0.05", lambda finding: finding.sharpness)
    add("adaptive, ρ = 0.5", lambda finding: finding.adaptive_sharpness)
    add("norm of the weights", lambda finding: math.hypot(*finding.norms.values()))
    add(f"rise of the loss at ±{settings.radius:g}", lambda f: (f.line[0] + f.line[-1]) / 2 - f.line[len(f.line) // 2])
    console = Console()
    console.print(table)
    console.print("±: of several seeds their standard deviation; of one run the standard error of the trace.")


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def _trace(found: Sequence[Finding]) -> str:
    if len(found) > 1 or found[0].trace_error is None:
        return _spread([finding.trace for finding in found])
    return f"{found[0].trace:.3g} ± {found[0].trace_error:.2g}"
