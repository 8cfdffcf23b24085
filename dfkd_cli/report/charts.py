"""The pictures of reports and of this project's pages."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullFormatter

# Columns of metrics.csv that are shares; the others are losses.
MEASURES = ("accuracy", "agreement", "confidence", "variety")
_COLOURS = {"teacher": "#57606a", "free": "#0b62c4", "real": "#9a6700"}
_LINE: dict[str, Any] = {"markersize": 2.5, "linewidth": 1.2, "alpha": 0.8}
_INK, _GRID = "#24292f", "#d8dee4"


def top1(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Top-1 of every row: a dot for each seed, a diamond at the mean, a whisker of one standard deviation."""
    figure = Figure(figsize=(7.5, 0.8 + 0.36 * len(rows)))
    axes = figure.subplots()
    axes.axvline(100 * rows[0]["top1"]["mean"], color=_COLOURS["teacher"], linestyle="--", linewidth=1)
    for place, row in enumerate(rows):
        kind = "free" if row["data_free"] and not row["uses"] else "real"
        colour = _COLOURS["teacher" if row["role"] == "teacher" else kind]
        values = [100 * value for value in row["top1"]["values"]]
        sd = row["top1"]["sd"] and 100 * row["top1"]["sd"]
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
        axes.errorbar(100 * row["top1"]["mean"], place, xerr=sd, color=colour, marker="D", markersize=6, capsize=4)
    axes.set_yticks(range(len(rows)), [_short(row["label"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.set_xlabel("top-1 on the test images, %")
    return _png(figure, [axes])


def sizes(curves: Mapping[str, Sequence[Mapping[str, Any]]], teacher: float) -> bytes:
    """Top-1 over the number of images, a line for each curve with one standard deviation, and the teacher's.

    Args:
        curves: The rows of each curve, by its name.
        teacher: The teacher's top-1, a share.
    """
    figure = Figure(figsize=(7.5, 3.6))
    axes = figure.subplots()
    axes.axhline(100 * teacher, color=_COLOURS["teacher"], linestyle="--", linewidth=1)
    for name, rows in curves.items():
        means = [100 * row["top1"]["mean"] for row in rows]
        sds = [100 * (row["top1"]["sd"] or 0) for row in rows]
        axes.errorbar([row["num_images"] for row in rows], means, yerr=sds, marker="o", capsize=3, label=_short(name))
    axes.set_xscale("log")
    axes.set_xlabel("images in the transfer set")
    axes.set_ylabel("top-1 on the test images, %", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure, [axes])


def frontier(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Top-1 over the seconds of synthesis and training, as SVG: a line through the best of each time, data-free ones.

    Args:
        panels: Rows of students by the title of their panel.
    """
    figure = Figure(figsize=(5.6 * len(panels), 5))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        points = sorted((row["seconds"]["total"]["mean"], 100 * row["top1"]["mean"], row) for row in rows)
        best: list[tuple[float, float]] = []
        for x, y, row in points:
            free = row["data_free"] and not row["uses"]
            axes.plot(x, y, "o" if free else "s", color=_COLOURS["free" if free else "real"], markersize=4)
            if free and (not best or y > best[-1][1]):
                best.append((x, y))
        axes.plot(*zip(*best, strict=True), color=_COLOURS["free"], linewidth=1, alpha=0.4, drawstyle="steps-post")
        low, high = axes.get_ylim()
        lowest = math.inf
        for x, y, row in sorted(points, key=lambda point: -point[1]):  # no text over another, from the top
            lowest = min(y, lowest - (high - low) / 38)
            line = {"arrowstyle": "-", "color": _GRID, "linewidth": 0.6}
            right = (1.02, lowest)
            axes.annotate(
                _short(row["label"]), (x, y), right, textcoords=("axes fraction", "data"), fontsize=7, va="center",
                arrowprops=line, annotation_clip=False,
            )  # fmt: skip
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("seconds of synthesis and training, one CPU core")
        axes.set_ylabel("top-1 on the test images, %", fontsize=8)
    with rc_context({"svg.hashsalt": "dfkd", "svg.fonttype": "none"}):  # the same bytes each time; text stays text
        return _picture(figure, list(grid), "svg", {"Date": None})


def curves(runs: Sequence[Mapping[str, Sequence[float]]]) -> bytes | None:
    """Losses on the left, shares on the right, a line for each run; None when there is nothing to draw.

    Args:
        runs: The columns of each run's ``metrics.csv``.
    """
    names = dict.fromkeys(name for run in runs for name in run if name != "round")
    panels = [[n for n in names if n not in MEASURES], [n for n in names if n in MEASURES]]
    panels = [panel for panel in panels if panel]
    if not panels:
        return None
    figure = Figure(figsize=(6, 2.3))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        for number, name in enumerate(panel):
            for repeat, run in enumerate(run for run in runs if name in run):
                label = _short(name) if repeat == 0 else None
                axes.plot(run["round"], run[name], "o-", color=f"C{number}", label=label, **_LINE)
        values = [value for name in panel for run in runs for value in run.get(name, ())]
        _widen(axes, values)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(frameon=False, fontsize=8)
    return _png(figure, list(grid))


def lines(between: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss on the left, top-1 on the right, on straight lines from one model to another, which are dashed.

    Args:
        between: The ``lines`` of ``results.json`` of an evaluation.
    """
    figure = Figure(figsize=(7.5, 3))
    grid = figure.subplots(1, 2)
    for axes, key, factor, title in zip(grid, ("loss", "top1"), (1, 100), ("loss, nats", "top-1, %"), strict=True):
        for place in (0, 1):
            axes.axvline(place, color=_COLOURS["teacher"], linestyle="--", linewidth=1)
        for line in between:
            values = [math.nan if point[key] is None else factor * point[key] for point in line["points"]]
            axes.plot([point["at"] for point in line["points"]], values, "o-", label=_short(line["path"]), **_LINE)
        axes.set_xlabel("place on the line: 0 the first model, 1 the second")
        axes.set_ylabel(f"{title}, on training images", fontsize=8)
    _widen(grid[0], [p["loss"] for line in between for p in line["points"] if p["loss"] is not None])
    grid[0].legend(frameon=False, fontsize=8)
    return _png(figure, list(grid))


def _widen(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for values of very different sizes."""
    if min(values, default=0) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _short(label: str) -> str:
    # What tells labels apart may stand at their end. A dollar sign would start a formula; legends leave out what begins
    # with an underscore.
    short = label if len(label) <= 40 else f"{label[:19]}...{label[-18:]}"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def _png(figure: Figure, panels: Sequence[Any]) -> bytes:
    return _picture(figure, panels, "png", {"Software": None})


def _picture(figure: Figure, panels: Sequence[Any], form: str, metadata: Mapping[str, None]) -> bytes:
    for axes in panels:
        axes.set_axisbelow(True)
        axes.grid(color=_GRID, linewidth=0.7)
        axes.tick_params(colors=_INK, labelsize=8, length=0)
        axes.xaxis.label.set_size(8)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_GRID)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # no font has the letters of every name: boxes stand for them
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        ConstrainedLayoutEngine().execute(figure)  # as the figure's own, it would have all drawn twice
        figure.savefig(buffer, format=form, dpi=140, metadata=metadata)
    return buffer.getvalue()
