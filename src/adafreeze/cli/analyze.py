"""``adafreeze analyze``: how flat the minima of finished runs are, side by side."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from ..analysis import Finding, Settings, draw, measure
from ..errors import ConfigError, note
from ..report.page import ANALYSIS_FILE
from ..train.finished import FinishedRun, comparable_runs, group_by_seed, training_loss
from ..train.output import writing
from ..train.parser import Parser
from ._table import number_table

__all__ = ["main"]


def _parser() -> Parser:
    parser = Parser(
        prog="adafreeze analyze",
        description="Are the minima flatter? Hessian spectrum and trace, sharpness, weight norms and slices of the "
        "training loss over all adapter parameters, for the output folders of `adafreeze train`. Runs that differ only "
        "by their seed form one group. Writes analysis.json and analysis.png; the runs are not changed.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="output folder of a run")
    add("-o", "--output", default="analysis", metavar="FOLDER", help="folder for the results")
    add("--samples", type=int, default=128, metavar="N", help="training samples that the loss is a mean over")
    add("--batch_size", type=int, default=32, metavar="N", help="samples of a batch")
    add("--eigenvalues", type=int, default=5, metavar="N", help="of the Hessian, the largest by magnitude")
    add("--trace_samples", type=int, default=20, metavar="N", help="random vectors for the trace of the Hessian")
    add("--grid", type=int, default=21, metavar="N", help="points of the 1-D slice, odd; half per side in 2-D")
    add("--radius", type=float, default=1.0, metavar="R", help="of the slices, in norms of the weights")
    add("--seed", type=int, default=0, metavar="N", help="of samples, directions and vectors")
    add("--head", action="store_true", help="include the head that was trained with the adapters")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the computation")
    return parser


def main(argv: Sequence[str]) -> None:
    """Check all runs, measure each; then table, JSON and figure."""
    parser = _parser()
    given = parser.parse_args([*argv] or ["--help"])
    for name in ("samples", "batch_size", "eigenvalues", "trace_samples"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name} is {getattr(given, name)}, not at least 1.", fix=f"Leave out --{name}.")
    if given.grid < 3 or given.grid % 2 == 0:  # odd, so that the weights themselves are a point
        raise ConfigError(f"--grid is {given.grid}, not odd and at least 3.", fix=f"--grid {max(3, given.grid | 1)}")
    if not 0 < given.radius < math.inf:
        raise ConfigError(f"--radius is {given.radius}, not a number above 0.", fix="--radius 1.0")
    settings = Settings(given.eigenvalues, given.trace_samples, given.grid, given.radius, given.seed)
    runs = comparable_runs([Path(run).expanduser() for run in given.runs])
    output = Path(given.output).expanduser()
    with writing(output, "-o"):
        output.mkdir(parents=True, exist_ok=True)

    logging.set_verbosity_error()  # it would warn of a new head, which the adapter's head replaces
    found = {}
    for number, run in enumerate(runs, 1):
        loss = training_loss(
            run,
            samples=given.samples,
            batch_size=given.batch_size,
            seed=given.seed,
            head=given.head,
            dtype=getattr(torch, given.dtype),
        )
        note(f"Run {number} of {len(runs)}: {run.name}, {loss.size:,} parameters.")
        found[run.name] = measure(loss, settings)
    groups = group_by_seed(runs)
    content = {
        "settings": vars(given),
        "steps": settings.steps(),
        "plane_steps": settings.plane_steps(),
        "groups": groups,
        "runs": {run.name: _record(run) | asdict(found[run.name]) for run in runs},
    }
    _show(groups, runs, found, settings.radius)
    with writing(output, "-o"):
        (output / ANALYSIS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"Numbers: {output / ANALYSIS_FILE}")
        picture = output / "analysis.png"
        draw({name: [found[run] for run in members] for name, members in groups.items()}, settings, picture)
    print(f"Figure: {picture}")


def _record(run: FinishedRun) -> dict[str, object]:
    seed = run.arguments.training.seed
    return {"folder": str(run.folder), "method": run.method, "seed": seed, "frozen_units": run.frozen}


def _show(
    groups: Mapping[str, list[str]], runs: Sequence[FinishedRun], found: Mapping[str, Finding], radius: float
) -> None:
    frozen = {run.name: run.frozen for run in runs}
    table = number_table(f"The minima, over {found[runs[0].name].parameters:,} parameters", "", *groups)

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
    add(f"rise of the loss at ±{radius:g}", lambda f: (f.line[0] + f.line[-1]) / 2 - f.line[len(f.line) // 2])
    console = Console()
    console.print(table)
    console.print("±: standard deviation over seeds; for a single run the standard error of the trace.")


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def _trace(found: Sequence[Finding]) -> str:
    if len(found) > 1 or found[0].trace_error is None:
        return _spread([finding.trace for finding in found])
    return f"{found[0].trace:.3g} ± {found[0].trace_error:.2g}"
