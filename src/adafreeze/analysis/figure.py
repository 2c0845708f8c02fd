"""One figure that compares minima."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from .measure import Finding, Settings

__all__ = ["draw"]

# Okabe and Ito's colors, distinguishable for color-blind readers; markers and dashes repeat the distinction.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
PER_ROW = 4


def draw(groups: Mapping[str, Sequence[Finding]], settings: Settings, path: Path) -> None:
    """Draw spectra, traces, weight norms, the 1-D slice, and a 2-D slice: the mean of each group, and its range.

    Raises:
        RunError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise RunError(
            f"The picture {path} needs matplotlib, which is not installed.", fix='pip install "adafreeze[report]"'
        ) from error

    rows = 1 - (-len(groups) // PER_ROW)
    figure = Figure(figsize=(16, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, PER_ROW)
    spectrum, traces, norms, slices = (figure.add_subplot(grid[0, i]) for i in range(PER_ROW))
    for i, (name, found) in enumerate(groups.items()):
        style = {"color": COLORS[i % 8], "linestyle": DASHES[i % 4], "marker": MARKERS[i % 8], "label": name}
        count = min(len(finding.eigenvalues) for finding in found)
        _curve(spectrum, range(1, count + 1), [finding.eigenvalues[:count] for finding in found], style)
        _bar(traces, i, found, style)
        _curve(norms, range(len(found[0].norms)), [[f.norms[block] for block in found[0].norms] for f in found], style)
        _curve(slices, settings.steps(), [finding.line for finding in found], {**style, "marker": None})
    spectrum.set(title="Hessian, outermost eigenvalues", xlabel="rank", ylabel="eigenvalue")
    traces.set(title="Hessian, trace", xticks=range(len(groups)))
    norms.set(title="Norm of the adapter's weights", xlabel="block")
    slices.set(title="Loss along a random direction", xlabel="step, in norms of the weights", ylabel="loss")
    for axes in (spectrum, norms):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (spectrum, traces):
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    spectrum.legend(fontsize="small")
    traces.set_xticklabels(groups, rotation=20 if len(groups) > 2 else 0)
    norms.set_ylim(bottom=0)
    _contours(figure, grid, groups, settings)
    figure.savefig(path, dpi=130)


def _curve(axes: Any, x: Sequence[float], rows: Sequence[Sequence[float]], style: dict[str, Any]) -> None:
    values = np.array(rows)
    axes.plot(x, values.mean(axis=0), markersize=5, **style)
    if len(rows) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)


def _bar(axes: Any, x: int, found: Sequence[Finding], style: dict[str, Any]) -> None:
    """The mean as a bar, with the range of several findings or the standard error of one."""
    values = np.array([finding.trace for finding in found])
    mean = values.mean()
    spread = [[mean - values.min()], [values.max() - mean]] if len(found) > 1 else [[found[0].trace_error or 0.0]] * 2
    axes.bar(x, mean, width=0.6, color=style["color"], alpha=0.35)
    axes.errorbar(x, mean, yerr=spread, color=style["color"], marker=style["marker"], capsize=4)


def _contours(figure: Any, grid: Any, groups: Mapping[str, Sequence[Finding]], settings: Settings) -> None:
    """The mean loss on a plane through the weights, with the same levels for all groups."""
    planes = [np.mean([finding.plane for finding in found], axis=0) for found in groups.values()]
    finite = np.concatenate([plane[np.isfinite(plane)] for plane in planes])
    low, high = finite.min(), finite.max()
    levels = np.linspace(low, high if high > low else low + 1, 15)
    steps = settings.plane_steps()
    drawn = []
    for i, (name, plane) in enumerate(zip(groups, planes, strict=True)):
        axes = figure.add_subplot(grid[1 + i // PER_ROW, i % PER_ROW], aspect="equal")
        filled = axes.contourf(steps, steps, plane, levels, cmap="cividis", extend="max")
        axes.contour(steps, steps, plane, levels, colors="white", linewidths=0.4)
        axes.plot(0, 0, "+", color="white", markersize=10)
        axes.set(title=f"Loss, {name}", xlabel="first direction", ylabel="second direction" if not i % PER_ROW else "")
        drawn.append(axes)
    figure.colorbar(filled, ax=drawn, label="loss", shrink=0.8)
