"""Figures: panels that draw one task on given axes, and the sheets made of them.

Colour tells the relaxation, dashes how it is used; names stand beside the curves. Figures are built
without pyplot, so drawing changes nothing of the caller's.
"""

import json
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from topkbench.records import NONE, replacing
from topkbench.stats import intervals, iqm_interval, log_loss, worst_where_diverged

COLUMN, PAGE = 3.25, 6.75  # widths in inches of one column and of both (ICML)
SMALL, MEDIUM = 6, 7  # font sizes in points
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
SAME = 0.01  # curves whose log10 differ by less all along share one label
STYLE = {
    **seaborn.axes_style("ticks"),
    "font.size": MEDIUM,
    "axes.labelsize": MEDIUM,
    "axes.titlesize": MEDIUM,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.1,
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Looks = Mapping[str, Mapping[str, Any]]
Panel = Callable[[Axes, pd.DataFrame, Looks], None]


def convergence(curves: pd.DataFrame, width: float | None = None) -> Figure:
    """Hard loss against steps (above) and against seconds of training (below), a column for each task."""
    return sheet(curves, [by_step, by_seconds], width)


def gradient_variance(curves: pd.DataFrame, width: float | None = None) -> Figure:
    """Gradient variance against steps, a column for each task."""
    return sheet(curves, [variance_by_step], width)


def final_loss(summary: pd.DataFrame, width: float | None = None) -> Figure:
    """The final hard loss of every method, a column for each task."""
    return sheet(summary, [loss_by_method], width)


def sheet(frame: pd.DataFrame, panels: list[Panel], width: float | None = None) -> Figure:
    """Panels below each other, tasks beside each other.

    Args:
        frame: Curves or summaries of runs, `records.together`.
        panels: Functions that draw one task on given axes.
        width: In inches; a column's for one task, a page's for more, if None.
    """
    tasks = list(dict.fromkeys(frame["task"]))
    looks = looks_of(frame)
    width = width or (COLUMN if len(tasks) == 1 else PAGE * max(1, len(tasks) / 3))
    tall = 0.9 + 0.1 * len(looks)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, max(1.7, tall) * len(panels) + 0.2), layout="constrained")
        grid = figure.subplots(len(panels), len(tasks), squeeze=False)
        for j, task in enumerate(tasks):
            for i, panel in enumerate(panels):
                panel(grid[i, j], frame[frame["task"] == task], looks)
                if i == 0:
                    grid[i, j].set_title(task)
                if j > 0:
                    grid[i, j].set_ylabel("")
    return figure


def looks_of(frame: pd.DataFrame) -> Looks:
    """Colour and dashes for each method: a colour a relaxation, black for methods without one."""
    members = (
        frame[["method", "operator", "estimator"]].drop_duplicates().sort_values(["operator", "estimator"])
    )
    relaxations = sorted(set(members["operator"]) - {NONE})
    colours = dict(zip(relaxations, cycle(seaborn.color_palette("colorblind")), strict=False))
    members = members.assign(colour=[colours.get(name, (0.0, 0.0, 0.0)) for name in members["operator"]])
    looks = {}
    for colour, alike in members.groupby("colour", sort=False):
        for method, dashes in zip(alike["method"], cycle(DASHES), strict=False):
            looks[method] = {"color": colour, "linestyle": dashes}
    return looks


def by_step(ax: Axes, curves: pd.DataFrame, looks: Looks) -> None:
    """Interquartile mean of the hard loss against steps, with its 95 % interval."""
    draw(ax, _loss(curves), "step", looks)
    ax.set(xlabel="step", ylabel="hard loss")


def by_seconds(ax: Axes, curves: pd.DataFrame, looks: Looks) -> None:
    """Interquartile mean of the hard loss against seconds of training, with its 95 % interval."""
    draw(ax, _loss(curves), "seconds", looks)
    ax.set(xlabel="seconds, all replicates together", ylabel="hard loss")


def variance_by_step(ax: Axes, curves: pd.DataFrame, looks: Looks) -> None:
    """Interquartile mean of the gradient variance against steps; a variance of exactly 0 is written out.

    Diverged replicates are left out from where they were given up.
    """
    ax.set(xlabel="step", ylabel="gradient variance")
    if "grad_variance" not in curves:
        ax.text(0.5, 0.5, "not measured (log.samples=0)", transform=ax.transAxes, ha="center", fontsize=SMALL)
        return
    zero = curves.groupby("method", sort=False)["grad_variance"].max() == 0
    varying = curves[~curves["method"].map(zero) & (curves["diverged"] == 0)]
    draw(ax, varying.assign(log10=log_loss(varying["grad_variance"])), "step", looks)
    if zero.any():
        ax.set_xlabel("step\nexactly 0: " + ", ".join(zero.index[zero]))


def loss_by_method(ax: Axes, summary: pd.DataFrame, looks: Looks) -> None:
    """Final hard loss: every replicate a dot, the interquartile mean with its 95 % interval above them."""
    summary = _loss(summary)
    table = intervals(summary, ["method"], "log10", iqm_interval).sort_values("centre", ascending=False)
    for y, (_, row) in enumerate(table.iterrows()):
        colour = looks[row["method"]]["color"]
        own = summary.loc[summary["method"] == row["method"], "log10"].to_numpy()
        own = own[np.isfinite(own)]
        ax.plot(10**own, np.full(len(own), y), "o", ms=2, mew=0, color=colour, alpha=0.3)
        ax.plot(10 ** np.array([row["low"], row["high"]]), [y, y], color=colour, lw=2, solid_capstyle="butt")
        ax.plot(10 ** row["centre"], y, "|", ms=7, mew=1.4, color=colour)
    ax.set_yticks(range(len(table)), table["method"])
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.set_xscale("log")
    plain_ticks(ax.xaxis)
    ax.set(xlabel="final hard loss", ylabel="")


def save(figure: Figure, folder: Path, stem: str, provenance: Mapping[str, Any]) -> list[Path]:
    """Save as PDF and PNG, with where it comes from inside the file (PDF Subject, PNG text)."""
    told = json.dumps(dict(provenance))
    metadata: dict[str, dict[str, Any]] = {
        "pdf": {"Subject": told, "Creator": "topkbench", "CreationDate": None},
        "png": {"topkbench": told},
    }
    paths = [folder / f"{stem}.{suffix}" for suffix in metadata]
    with matplotlib.rc_context(STYLE):
        for path, facts in zip(paths, metadata.values(), strict=True):
            with replacing(path) as draft:
                figure.savefig(draft, format=path.suffix[1:], dpi=300, metadata=facts)
    return paths


def _loss(frame: pd.DataFrame) -> pd.DataFrame:
    frame = worst_where_diverged(frame)
    return frame.assign(log10=log_loss(frame["hard_loss"]))


def draw(ax: Axes, frame: pd.DataFrame, x: str, looks: Looks) -> None:
    """A line with a band for each method on a logarithmic axis, and its name at the end of the line.

    Args:
        ax: Where.
        frame: With a column `log10`; each value of x is one group of replicates.
        x: The column along the line.
        looks: `looks_of`.
    """
    ax.set_yscale("log")
    lines: dict[str, pd.DataFrame] = {}
    for method, own in frame.groupby("method", sort=False):
        line = intervals(own, [x], "log10", iqm_interval)
        line = line[np.isfinite(line["centre"])]
        if line.empty:
            continue
        ax.plot(line[x], 10 ** line["centre"], **looks[str(method)])
        colour = looks[str(method)]["color"]
        ax.fill_between(line[x], 10 ** line["low"], 10 ** line["high"], color=colour, alpha=0.15, lw=0)
        lines[str(method)] = line
    ax.margins(x=0)
    plain_ticks(ax.yaxis)
    ends = {
        name: (float(line[x].iloc[-1]), float(10 ** line["centre"].iloc[-1]))
        for name, line in _joined(lines, x)
    }
    name_lines(ax, ends, looks)


def _joined(lines: Mapping[str, pd.DataFrame], x: str) -> list[tuple[str, pd.DataFrame]]:
    """Curves that lie on each other under one name, "a = b"; the first keeps its place and colour."""
    groups: list[list[str]] = []
    centres = {name: line.set_index(x)["centre"] for name, line in lines.items()}
    for name, centre in centres.items():
        twins = (group for group in groups if _same(centre, centres[group[0]]))
        group = next(twins, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return [(" = ".join(group), lines[group[0]]) for group in groups]


def _same(one: pd.Series, other: pd.Series) -> bool:
    return one.index.equals(other.index) and bool((one - other).abs().max() < SAME)


def name_lines(ax: Axes, lines: Mapping[str, tuple[float, float]], looks: Looks) -> None:
    """Names to the right of the axes, as near the heights of their lines' ends as go without overlapping."""
    if not lines:
        return
    place = ax.transData + ax.transAxes.inverted()
    ends = sorted((float(place.transform((x, y))[1]), x, y, name) for name, (x, y) in lines.items())
    gap = 1.25 * SMALL / 72 * ax.figure.dpi / ax.get_window_extent().height
    steps = gap * np.arange(len(ends))
    places = isotonic_regression([end[0] for end in ends] - steps).x + steps
    places += np.clip(places[0], 0, max(0.0, 1 - steps[-1])) - places[0]
    for (_, x, y, name), height in zip(ends, places, strict=True):
        colour = looks[name.partition(" = ")[0]]["color"]
        leader = {
            "arrowstyle": "-",
            "lw": 0.4,
            "color": colour,
            "shrinkA": 1,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        ax.annotate(
            name,
            (x, y),
            (1.07, height),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=colour,
            arrowprops=leader,
            annotation_clip=False,
        )


def plain_ticks(axis: Any) -> None:
    """0.3, 1, 3, 10: as many labelled ticks as a short logarithmic axis has room for."""
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    axis.set_major_locator(
        ticker.LogLocator(subs=(1, 2, 5) if decades < 1.3 else (1, 3) if decades < 2.6 else (1,), numticks=20)
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(
        ticker.LogLocator(subs=range(1, 10), numticks=20) if decades < 4 else ticker.NullLocator()
    )
    axis.set_minor_formatter(ticker.NullFormatter())
