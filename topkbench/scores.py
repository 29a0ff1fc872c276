"""Tasks side by side: how much of what there was to learn each method learned on each of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from topkbench.plots import PAGE, SMALL, STYLE
from topkbench.stats import iqm_interval, worst_where_diverged
from topkbench.tables import plus_minus, write_plain

NOTE = (
    "Score: (start - end) / (start - best), of a replicate's held-out hard loss (subset_vae: its exact "
    "bound). 0 is no better than untrained, 1 as good as the best method of the table on that task, oracle "
    "excepted: it follows the true gradient. What is learned beside W counts: on features, a predictor of "
    "columns never chosen. Interquartile mean over replicates ± half a 95 % interval (trimmed t); a "
    "diverged one is the worst. mean: over the tasks that the method fits, of scores not below -1; tasks: "
    "how many, most first. No method is tuned: a score is that of a default, not a ranking."
)
WORST = -1.0  # less is as bad: one task that blew up would decide the mean


def scores(curves: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """How far each method came on each task.

    Args:
        curves: `records.together`; its rows at step 0 are where a replicate started.
        summary: `records.together`.

    Returns:
        task, method, score with its `_low` and `_high`. The best method of a task has 1; NaN where even
        it did not learn.
    """
    key = ["task", "method", "seed"]
    starts = curves[curves["step"] == 0].set_index(key)["hard_loss"]
    ends = worst_where_diverged(summary).set_index(key)["hard_loss"]
    gains = (starts - ends).rename("gain").reset_index()
    rows = []
    for task, own in gains.groupby("task", sort=False):
        wide = own.pivot(index="seed", columns="method", values="gain")
        centres = wide.apply(lambda gain: iqm_interval(gain).centre)
        others = centres.drop("oracle", errors="ignore")
        best = (others if len(others) else centres).fillna(-np.inf).idxmax()
        typical = centres[best] if centres[best] > 0 else np.nan
        # Of each replicate, so that they compare; where the best one failed, what it gains elsewhere.
        largest = wide[best].where(wide[best] > 0, typical)
        rows += [{"task": task, "method": name, **_cells(gain / largest)} for name, gain in wide.items()]
    return pd.DataFrame(rows)


def _cells(values: pd.Series) -> dict[str, float]:
    interval = iqm_interval(values)
    return {"score": interval.centre, "score_low": interval.low, "score_high": interval.high}


def matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Methods by tasks; those that fit most of them first, by their mean. NaN where a method does not fit."""
    wide = table.pivot(index="method", columns="task", values="score")[list(dict.fromkeys(table["task"]))]
    order = pd.DataFrame({"fitted": _fitted(table), "mean": bounded(wide).mean(axis=1)})
    return wide.loc[order.sort_values(["fitted", "mean"], ascending=False, kind="stable").index]


def bounded(wide: pd.DataFrame) -> pd.DataFrame:
    """Scores of at least WORST."""
    return wide.replace(-np.inf, WORST).clip(lower=WORST)


def _fitted(table: pd.DataFrame) -> pd.Series:
    """How many tasks there are records of, learned or not."""
    return table.groupby("method")["task"].nunique()


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The matrix as strings, with the mean over tasks and how many they are."""
    wide = matrix(table)
    cells = {(row["method"], row["task"]): row for row in table.to_dict("records")}
    strings = pd.DataFrame(
        {"method": wide.index, "mean": bounded(wide).mean(axis=1).map("{:.2f}".format).to_numpy()}
    )
    strings["tasks"] = _fitted(table)[wide.index].to_numpy()
    for task in wide:
        strings[str(task)] = [_cell(cells.get((method, task))) for method in wide.index]
    return strings


def _cell(row: Mapping[Any, Any] | None) -> str:
    return plus_minus(row["score"], row["score_high"] - row["score"]) if row else ""


def write(table: pd.DataFrame, folder: Path, caption: str) -> list[Path]:
    """Save as scores.csv, .md and .tex; each file whole or not at all."""
    return write_plain(readable(table), folder, "scores", f"{caption} {NOTE}")


def heat_map(table: pd.DataFrame) -> Figure:
    """Methods below each other, tasks beside each other: dark is good; grey where a method does not fit."""
    wide = matrix(table)
    with matplotlib.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(
            figsize=(min(PAGE, 1.6 + 0.55 * wide.shape[1]), 0.9 + 0.1 * len(wide)), layout="constrained"
        )
        ax = figure.subplots()
        ax.set_facecolor("0.9")
        words = wide.map(lambda score: "" if np.isnan(score) else f"{score:.2f}" if score > -99 else "worst")
        seaborn.heatmap(
            wide.replace(-np.inf, WORST),
            ax=ax,
            vmin=0,
            vmax=1,
            cmap="crest",
            annot=words,
            fmt="",
            annot_kws={"fontsize": SMALL - 1},
            mask=wide.isna(),
            yticklabels=True,
            cbar_kws={"label": "score", "shrink": 0.3, "aspect": 12},
        )
        ax.tick_params(length=0)
        ax.xaxis.tick_top()
        ax.tick_params(axis="x", rotation=90)
        ax.set(xlabel="", ylabel="")
    return figure
