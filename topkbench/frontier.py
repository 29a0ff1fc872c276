"""What gradient runs show: bias against variance, a line a method along its temperature; and the table."""

import math
from collections.abc import Collection
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from topkbench.plots import COLUMN, PAGE, SMALL, STYLE, Looks, looks_of, name_lines, plain_ticks
from topkbench.tables import plus_minus, write_plain

KEYS = ["task", "at", "method", "temperature"]
MEANS = (
    "softness",
    "rel_variance",
    "rel_mse",
    "cos_mean",
    "cos_sample",
    "rho",
    "grad_zero_rows",
    "true_error",
)
HEADERS = {
    "rel_variance": "variance",
    "cos_mean": "cos of mean",
    "cos_sample": "mean cos",
    "rho": "rho",
    "grad_zero_rows": "zero rows",
    "softness": "softness",
    "true_error": "error of g*",
}
WIDEST = 1.0  # half an interval of a cosine that is wider says nothing, and is not shown
NOTE = (
    "Gradients of one mini-batch at the same W (at: 0 where learners start, 1 the planted W*), against the "
    "true gradient g* of the mean hard loss. bias: |E g - g*| / |g*|, from its mean square over replicates "
    "without its sampling bias; < x: not told apart from 0, and below x (95 %). variance: over |g*|^2. rho: "
    "the share of the true gradient's decrease that a step keeps. ± half a 95 % interval over replicates."
)
MARKED = ("oracle", "hard")  # where every figure shows them apart: the best there is, and doing nothing
LEAST = 1e-3  # a relative bias or variance below it is drawn here


def summarised(curves: pd.DataFrame) -> pd.DataFrame:
    """One row for each task, place, method and temperature: means over replicates and their half intervals.

    Args:
        curves: Of gradient runs, with `temperature` beside the method's name (`records.together`).

    Returns:
        KEYS; for rel_bias2 and each of MEANS the mean and, as `<column>_half`, half its 95 % interval (from
        the standard error within the replicate where there is but one); method_share, the part of the
        variance that is the method's own; operator and estimator.
    """
    rows = []
    curves = curves.replace([math.inf, -math.inf], math.nan)
    for key, group in curves.groupby(KEYS, sort=False, dropna=False):
        row = dict(zip(KEYS, key, strict=True)) | {
            name: group[name].iloc[0] for name in ("operator", "estimator")
        }
        for column in ("rel_bias2", *MEANS):
            if column in group:
                within = group.get(f"{column}_se")
                row |= {column: group[column].mean(), f"{column}_half": _half(group[column], within)}
        total = group["grad_variance"].sum()
        row["method_share"] = group["grad_variance_method"].sum() / total if total else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _half(values: pd.Series, within: pd.Series | None) -> float:
    values = values.dropna()
    if len(values) > 1:
        return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return math.nan if within is None else float(stats.norm.ppf(0.975) * within.iloc[0])


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`summarised` as strings, with headers for people."""
    columns = {
        "task": table["task"],
        "at": table["at"].map("{:g}".format),
        "method": table["method"],
        "temperature": ["-" if pd.isna(t) else f"{t:g}" for t in table["temperature"]],
    }
    if "rel_bias2" in table:
        columns["bias"] = [
            bias(centre, half)
            for centre, half in zip(table["rel_bias2"], table["rel_bias2_half"], strict=True)
        ]
    for column, header in HEADERS.items():
        if column in table:
            columns[header] = [
                "-" if column.startswith("cos") and half > WIDEST else plus_minus(centre, half)
                for centre, half in zip(table[column], table[f"{column}_half"], strict=True)
            ]
    return pd.DataFrame(columns)


def bias(square: float, half: float) -> str:
    """A relative bias from its square and half its interval, which may reach below 0."""
    if math.isnan(square):
        return "-"
    if not square - half > 0 and half > 0:
        return f"< {math.sqrt(max(square, 0) + half):.2g}"
    root = math.sqrt(max(square, 0))
    return plus_minus(root, half / (2 * root) if root else half)


def write(table: pd.DataFrame, folder: Path, stem: str, caption: str) -> list[Path]:
    """Save it for people as CSV, Markdown and LaTeX; the numbers stand in the records."""
    return write_plain(readable(table), folder, stem, f"{caption} {NOTE}")


def figure(table: pd.DataFrame, x: str = "bias") -> Figure:
    """A panel for each task (columns) and place (rows).

    Args:
        table: `summarised`.
        x: "bias": relative bias against relative variance; "softness": descent efficiency against softness.
    """
    tasks, places = (list(dict.fromkeys(table[name])) for name in ("task", "at"))
    looks = looks_of(table)
    width = COLUMN if len(tasks) == 1 else PAGE * max(1, len(tasks) / 2)
    height = max(1.9, 0.9 + 0.1 * len(looks))
    with matplotlib.rc_context(STYLE):
        sheet = Figure(figsize=(width, height * len(places) + 0.2), layout="constrained")
        grid = sheet.subplots(len(places), len(tasks), squeeze=False, sharex=True)
        for i, place in enumerate(places):
            for j, task in enumerate(tasks):
                own = table[(table["task"] == task) & (table["at"] == place)]
                (panel if x == "bias" else by_softness)(grid[i, j], own, looks)
                grid[i, j].set_title(f"{task}, at {place:g}")
    return sheet


def panel(ax: Axes, table: pd.DataFrame, looks: Looks, named: Collection[str] | None = None) -> None:
    """Relative bias against relative variance, a line for each method along temperature.

    A hollow mark: the bias is not told apart from 0, and is drawn at its upper limit. A triangle at the edge:
    the variance is 0 or less than LEAST. Dots grow with the temperature.

    Args:
        ax: Where.
        table: `summarised`, of one task and place.
        looks: `plots.looks_of`.
        named: The methods that are named and in colour; all if None. The others are grey.
    """
    ax.set(xscale="log", yscale="log", xlabel="relative bias", ylabel="relative variance")
    ends = {}
    for method, own in table.dropna(subset=["rel_bias2", "rel_variance"]).groupby("method", sort=False):
        own = own.sort_values("temperature")
        seen = (own["rel_bias2"] > own["rel_bias2_half"].fillna(0)) | ~(own["rel_bias2_half"] > 0)
        square = np.where(seen, own["rel_bias2"], own["rel_bias2"] + own["rel_bias2_half"])
        x = np.sqrt(np.clip(square, LEAST**2, None))
        y = own["rel_variance"].clip(lower=LEAST).to_numpy()
        of_interest = named is None or str(method) in named
        look = looks[str(method)] if of_interest else {"color": "0.85", "linestyle": "solid"}
        order = 3 if of_interest else 1
        ax.plot(x, y, **look, lw=1.1 if of_interest else 0.6, zorder=order)
        if not of_interest:
            continue
        special = str(method) in MARKED
        sizes = np.full(len(own), 26.0) if special else np.linspace(2.5, 9, len(own))
        zero = own["rel_variance"].to_numpy() <= LEAST
        for marked, marker in ((~zero, "*" if special else "o"), (zero, "v")):
            ax.scatter(
                x[marked],
                y[marked],
                s=sizes[marked],
                marker=marker,
                edgecolors=[look["color"]],
                facecolors=[look["color"] if each else "white" for each in seen.to_numpy()[marked]],
                linewidths=0.6,
                zorder=order + 1,
            )
        if special:  # beside its mark: it is one point, and the first thing one looks for
            ax.annotate(str(method), (x[-1], y[-1]), (4, 3), textcoords="offset points", fontsize=SMALL)
        else:
            ends[str(method)] = (float(x[-1]), float(y[-1]))
    for axis in (ax.xaxis, ax.yaxis):
        plain_ticks(axis)
    name_lines(ax, ends, looks)


def by_softness(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    """Descent efficiency against softness: methods at the same effective sharpness, not temperature."""
    ax.set(xlabel="softness, mean of 4 m (1 - m)", ylabel="descent efficiency rho", xscale="log")
    ends = {}
    if "softness" not in table:
        ax.text(0.5, 0.5, "no method with a relaxation", transform=ax.transAxes, ha="center", fontsize=SMALL)
        return
    for method, own in table[(table["softness"] > 0) & table["rho"].notna()].groupby("method", sort=False):
        own = own.sort_values("softness")
        ax.plot(own["softness"], own["rho"], **looks[str(method)], marker="o", ms=2)
        ends[str(method)] = (float(own["softness"].iloc[-1]), float(own["rho"].iloc[-1]))
    for name in MARKED:
        rho = table.loc[table["method"] == name, "rho"]
        if rho.notna().any():
            ax.axhline(rho.iloc[0], color="0.5", lw=0.6, ls="dotted")
            ax.annotate(
                name, (0.01, rho.iloc[0]), xycoords=("axes fraction", "data"), fontsize=SMALL, va="bottom"
            )
    plain_ticks(ax.xaxis)
    name_lines(ax, ends, looks)


def matched(table: pd.DataFrame, softness: float) -> pd.DataFrame:
    """Every method at one softness, between the temperatures that were measured (linear in log softness).

    Where softness falls again at high temperatures, on the branch on which it rises.

    Returns:
        task, at, method, the temperature there, and bias, variance and rho; methods that never were that soft
        or that sharp are left out.
    """
    rows: list[dict[str, str]] = []
    if "softness" not in table:
        return pd.DataFrame(rows)
    for key, own in table[table["softness"] > 0].groupby(["task", "at", "method"], sort=False):
        own = own.sort_values("temperature")
        at, wanted = np.log(own["softness"].to_numpy()), math.log(softness)
        rising = np.flatnonzero((at[:-1] <= wanted) & (wanted <= at[1:]))
        if not len(rising):
            continue
        pair = own.iloc[rising[0] : rising[0] + 2]

        def between(values: pd.Series, at: np.ndarray = at[rising[0] : rising[0] + 2]) -> float:
            return float(np.interp(math.log(softness), at, values))

        rows.append(
            {
                **dict(zip(("task", "at", "method"), key, strict=True)),
                "temperature": f"{math.exp(between(np.log(pair['temperature']))):.2g}",
                "bias": f"{math.sqrt(max(between(pair['rel_bias2']), 0)):.2g}",
                "variance": f"{between(pair['rel_variance']):.2g}",
                "rho": f"{between(pair['rho']):.3f}",
            }
        )
    return pd.DataFrame(rows)
