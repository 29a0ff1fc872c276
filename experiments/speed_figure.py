"""The table and the figure of `speed.py`."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from topkbench.plots import COLUMN, SMALL, STYLE

KINDS = {"torch": "torch", "ours": "ours", "compiled": "ours, compiled", "peer": "public packages"}
SHADES, RANGE = "cividis_r", LogNorm(0.5, 2000, clip=True)
UNKNOWN = (0.93, 0.93, 0.93, 1.0)
TITLES = {
    "ratio": "time of forward + backward over that of torch.topk (median of interleaved rounds)",
    "peak": "peak memory in units of the scores' size, scores and both gradients included",
}


def _cell(batch: int, n: int, k: int) -> str:
    power = len(str(n)) - 1
    large = f"10^{power}" if n >= 10**4 and n == 10**power else str(n)
    return f"({batch}, {large}, {k})"


def _wide(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Contenders by cells, in the order they were measured."""
    cells = [_cell(*cell) for cell in table[["batch", "n", "k"]].itertuples(index=False)]
    wide = table.assign(cell=cells).pivot(index="contender", columns="cell", values=column)
    return wide.loc[table["contender"].drop_duplicates(), list(dict.fromkeys(cells))]


def _short(value: object) -> str:
    """Three digits of a number; of what is none its first word."""
    if isinstance(value, str):
        return value.partition(":")[0]
    number = float(value)  # type: ignore[arg-type]
    return "" if np.isnan(number) else f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def markdown(table: pd.DataFrame) -> str:
    """A table of ratios and one of peak memory for each device and number of threads."""
    parts = []
    for (device, threads), own in table.groupby(["device", "threads"], sort=False):
        where = "cuda" if device == "cuda" else f"{device}, {threads} thread{'s' * (threads > 1)}"
        for column, title in TITLES.items():
            if column not in own:
                continue
            told = own[column].astype(object).where(own["status"] == "done", own["status"])
            wide = _wide(own.assign(told=told), "told").map(_short)
            lines = [["(batch, n, k)", *wide.columns], ["---", *["---:"] * wide.shape[1]]]
            lines += [[name, *row] for name, row in zip(wide.index, wide.to_numpy().tolist(), strict=True)]
            parts += [f"{where}: {title}.", "", *("| " + " | ".join(line) + " |" for line in lines), ""]
    return "\n".join(parts)


def heat_map(table: pd.DataFrame) -> Figure:
    """Contenders by cells, the ratio written in each and told by its shade; one column wide."""
    ratio, status = _wide(table, "ratio").astype(float), _wide(table, "status")
    kind = table.drop_duplicates("contender").set_index("contender")["kind"]
    with matplotlib.rc_context(STYLE):
        tall = 0.8 + 0.112 * (len(ratio) + 1.3 * kind.nunique())
        figure = Figure(figsize=(COLUMN, tall), layout="constrained")
        ax = figure.subplots()
        places, labels, y = [], [], 0.0
        for name, title in KINDS.items():
            # The quickest at the largest size first; what got no number there by the size before, and so on.
            own = ratio[(kind == name).to_numpy()].sort_values(list(ratio.columns[::-1]))
            if own.empty:
                continue
            y += 1.3
            ax.text(-0.55, y - 0.95, title, ha="right", va="center", fontsize=SMALL, weight="bold")
            _block(ax, own, status, y)
            places += [y + i for i in range(len(own))]
            labels += list(own.index)
            y += len(own)
        ax.set(xlim=(-0.5, ratio.shape[1] - 0.5), ylim=(y - 0.4, 0.2))
        ax.set_yticks(places, labels, fontsize=SMALL - 1)
        marks = {"rotation": 35, "ha": "left", "rotation_mode": "anchor", "fontsize": SMALL - 1}
        ax.set_xticks(range(ratio.shape[1]), ratio.columns, **marks)
        ax.tick_params(length=0, pad=1, top=False, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("time over that of torch.topk at (batch, n, k)", fontsize=SMALL)
    return figure


def _block(ax: Axes, ratio: pd.DataFrame, status: pd.DataFrame, top: float) -> None:
    """The cells of one kind of contenders, from a height on."""
    shades = matplotlib.colormaps[SHADES]
    for i, (name, row) in enumerate(ratio.iterrows()):
        for j, (cell, value) in enumerate(row.items()):
            known = np.isfinite(value)
            shade = shades(RANGE(value)) if known else UNKNOWN
            ax.add_patch(Rectangle((j - 0.48, top + i - 0.46), 0.96, 0.92, color=shade, lw=0))
            dark = known and np.dot(shade[:3], (0.3, 0.6, 0.1)) < 0.5
            said = _short(value) if known else "over" if status.loc[name, cell] == "over" else "fails"
            ink = "white" if dark else "black"
            ax.text(j, top + i, said, ha="center", va="center", fontsize=SMALL - 1, color=ink)
