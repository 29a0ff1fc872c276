"""Intervals over replicates.

The headline is the interquartile mean of log10 hard loss: losses are skewed, and the t interval of their
plain mean covers less than it says. A replicate that diverged has the worst loss there is, so that it falls
among the quarter that is trimmed, and no method looks better for having lost its worst.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

TAIL = 0.025  # at either end of a 95 % interval
TRIMMED = 0.25  # at either end: what is left is the interquartile mean
FLOOR = 1e-12  # log10 of a smaller loss is rounding


@dataclass(frozen=True)
class Interval:
    """A centre with its 95 % interval over `count` replicates; one replicate has none: NaN."""

    centre: float
    low: float
    high: float
    count: int


def mean_interval(values: ArrayLike) -> Interval:
    """The mean with its t interval (Student 1908)."""
    x = np.asarray(values, dtype=float)
    return _interval(
        x, x, lambda: x.mean() + stats.t.ppf([TAIL, 1 - TAIL], len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    )


def iqm_interval(values: ArrayLike) -> Interval:
    """The interquartile mean, a 25 % trimmed mean, with its trimmed-t interval (Tukey & McLaughlin 1963).

    floor(n / 4) values are cut at either end. Infinite values do no harm as long as they are among them.
    """
    x = np.sort(np.asarray(values, dtype=float))
    cut = int(TRIMMED * len(x))
    limits = (TRIMMED, TRIMMED)
    return _interval(
        x, x[cut : len(x) - cut], lambda: stats.mstats.trimmed_mean_ci(x, limits, alpha=2 * TAIL)
    )


def log_loss(loss: pd.Series) -> pd.Series:
    """log10 of a loss or a variance, at least FLOOR."""
    return np.log10(loss.clip(lower=FLOOR))


def worst_where_diverged(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the losses of diverged replicates infinite: a diverged one is worse than any other."""
    gone = frame["status"] == "diverged" if "status" in frame else frame["diverged"] > 0
    losses = frame[["hard_loss", "relaxed_loss"]].astype(float).mask(gone, np.inf)
    return frame.assign(hard_loss=losses["hard_loss"], relaxed_loss=losses["relaxed_loss"])


def intervals(
    frame: pd.DataFrame, by: list[str], column: str, statistic: Callable[[ArrayLike], Interval]
) -> pd.DataFrame:
    """The interval of a column in each group: `by`, centre, low, high, count."""
    rows = [
        {**dict(zip(by, key, strict=True)), **vars(statistic(group.to_numpy()))}
        for key, group in frame.groupby(by, sort=False)[column]
    ]
    return pd.DataFrame(rows, columns=[*by, "centre", "low", "high", "count"])


def _interval(values: np.ndarray, kept: np.ndarray, ends: Callable[[], np.ndarray]) -> Interval:
    """The mean of what is kept, with `ends()` where they exist: not for one value, nor beside a NaN."""
    centre = float(kept.mean()) if len(kept) and not np.isnan(values).any() else float("nan")
    low, high = ends() if len(values) > 1 and np.isfinite(centre) else (np.nan, np.nan)
    return Interval(centre, float(low), float(high), len(values))
