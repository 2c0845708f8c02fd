"""One figure of several minima, each seen from all sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError

if TYPE_CHECKING:
    from .measure import Finding, Settings

__all__ = ["draw"]

# Okabe and Ito's colours, told apart by colour-blind readers; markers and lines say the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
PER_ROW = 4


def draw(groups: Mapping[str, Sequence[Finding]], settings: Settings, path: Path) -> None:
    """Spectra, traces, weight norms, the 1-D slice, and a 2-D slice for each group.

    Args:
        groups: findings by what they have in common; of several the mean is drawn, and the range about it.
        settings: with which they were found.
        path: of the picture; the extension says the format.

    Raises:
        RunError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise RunError(
            f"There is no picture {path}.", cause="It needs matplotlib.", fix='pip install "adafreeze[report]"'
        ) from error

    planes = -(-len(groups) // PER_ROW)
    figure = Figure(figsize=(16, 4.2 * (1 + planes)), layout="constrained")
    FigureCanvasAgg(figure)
    above = figure.add_gridspec(1 + planes, PER_ROW)
    spectrum, traces, norms, slices = (figure.add_subplot(above[0, i]) for i in range(PER_ROW))
    for i, (name, found) in enumerate(groups.items()):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
            "label": name,
        }
        count = min(len(finding.eigenvalues) for finding in found)
        _curve(spectrum, range(1, count + 1), [finding.eigenvalues[:count] for finding in found], style)
        _bar(traces, i, found, style)
        blocks = list(found[0].norms)
        _curve(norms, range(len(blocks)), [[f.norms[block] for block in blocks] for f in found], style)
        _curve(slices, settings.steps(), [finding.line for finding in found], {**style, "marker": None})
    spectrum.set(title="Hessian, outermost eigenvalues", xlabel="rank", ylabel="eigenvalue")
    spectrum.xaxis.set_major_locator(MaxNLocator(integer=True))
    spectrum.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    spectrum.legend(fontsize="small")
    traces.set(title="Hessian, trace", xticks=range(len(groups)))
    traces.set_xticklabels(groups, rotation=20 if len(groups) > 2 else 0)
    traces.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    norms.set(title="Norm of the adapter's weights", xlabel="block")
    norms.xaxis.set_major_locator(MaxNLocator(integer=True))
    norms.set_ylim(bottom=0)
    slices.set(title="Loss along a random direction", xlabel="step, in norms of the weights", ylabel="loss")
    _contours(figure, above, groups, settings)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}).",
            cause="The folder is read-only, or the disk is full.",
            fix="-o path/that/you/can/write",
        ) from error


def _curve(axes: Any, x: Sequence[float], rows: Sequence[Sequence[float]], style: dict[str, Any]) -> None:
    values = np.array(rows)
    axes.plot(x, values.mean(axis=0), markersize=5, **style)
    if len(rows) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)


def _bar(axes: Any, place: int, found: Sequence[Finding], style: dict[str, Any]) -> None:
    """The mean as a bar; the range over several, or the standard error of one."""
    values = np.array([finding.trace for finding in found])
    mean = values.mean()
    spread = [[mean - values.min()], [values.max() - mean]] if len(found) > 1 else [[found[0].trace_error or 0.0]] * 2
    axes.bar(place, mean, width=0.6, color=style["color"], alpha=0.35)
    axes.errorbar(place, mean, yerr=spread, color=style["color"], marker=style["marker"], capsize=4)


def _contours(figure: Any, grid: Any, groups: Mapping[str, Sequence[Finding]], settings: Settings) -> None:
    """The loss on a plane through the weights, the same levels for all; of several runs the mean."""
    planes = [np.mean([finding.plane for finding in found], axis=0) for found in groups.values()]
    finite = np.concatenate([plane[np.isfinite(plane)] for plane in planes])
    low, high = finite.min(), finite.max()
    levels = np.linspace(low, high if high > low else low + 1, 15)
    steps = settings.plane_steps()
    axes = []
    for i, (name, plane) in enumerate(zip(groups, planes, strict=True)):
        axis = figure.add_subplot(grid[1 + i // PER_ROW, i % PER_ROW], aspect="equal")
        filled = axis.contourf(steps, steps, plane, levels, cmap="cividis", extend="max")
        axis.contour(steps, steps, plane, levels, colors="white", linewidths=0.4)
        axis.plot(0, 0, "+", color="white", markersize=10)
        axis.set(title=f"Loss, {name}", xlabel="first direction", ylabel="second direction" if not i % PER_ROW else "")
        axes.append(axis)
    figure.colorbar(filled, ax=axes, label="loss", shrink=0.8)
