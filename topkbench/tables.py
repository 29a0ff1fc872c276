"""The comparison of methods as a table: of numbers, to read on a terminal, and for a paper."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from topkbench.records import replacing
from topkbench.stats import Interval, iqm_interval, log_loss, mean_interval, worst_where_diverged

HEADERS = {
    "log10_hard_loss": "log10 hard loss",
    "hard_loss": "hard loss",
    "recall": "recall",
    "distance": "distance",
    "rows_with_gradient": "rows",
    "grad_snr": "gradient SNR",
}
NOTE = (
    "log10 hard loss: interquartile mean over replicates; the other columns: mean; ± half a 95 % interval "
    "(trimmed t, t). rows: share of the rows of W that ever got a gradient. Held-out rows, hard top-k. "
    "A diverged replicate counts as the worst loss, and not in the other columns."
)
BOLD = "Bold: the interval overlaps that of the lowest log10 hard loss of the task."


def comparison(summary: pd.DataFrame) -> pd.DataFrame:
    """One row for each task and method, from the summaries of runs (`records.together`).

    Returns:
        task, method, then for each column of HEADERS its centre and `_low` and `_high`, the ends of
        its 95 % interval; seconds of training; replicates; diverged and interrupted, how many of them; steps.
    """
    summary = worst_where_diverged(summary)
    summary = summary.assign(log10_hard_loss=log_loss(summary["hard_loss"]))
    rows = []
    for (task, method, run), group in summary.groupby(["task", "method", "run"], sort=False):
        row = {"task": task, "method": method}
        alive = group[group["status"] != "diverged"]
        for column in HEADERS:
            if column in group:
                counted = group if column.endswith("hard_loss") else alive
                row |= _cells(column, counted[column].to_numpy(float))
        row["seconds"] = group["seconds"].max()
        row["replicates"] = len(group)
        row["diverged"] = int((group["status"] == "diverged").sum())
        row["interrupted"] = int((group["status"] == "interrupted").sum())
        row["steps"] = group["step"].max()
        rows.append({**row, "run": run})
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The comparison as strings, `centre ± half the interval`, with headers for people."""
    columns: dict[str, object] = {"task": table["task"], "method": table["method"]}
    for column, header in HEADERS.items():
        if column in table:
            columns[header] = [
                plus_minus(centre, high - centre)
                for centre, high in zip(table[column], table[f"{column}_high"], strict=True)
            ]
    columns["seconds"] = table["seconds"].map("{:.1f}".format)
    columns["ended"] = [_ended(row) for row in table.to_dict("records")]
    return pd.DataFrame(columns)


def text(table: pd.DataFrame) -> str:
    """For the terminal: a column for each quantity, or below each other for a single run."""
    strings = readable(table)
    if len(strings) == 1:
        (values,) = strings.to_numpy().tolist()
        return "\n".join(f"{name:<16} {value}" for name, value in zip(strings, values, strict=True))
    # What is the same for all, or stands in the saved tables, gives way to a line that fits a terminal.
    plain = table[["diverged", "interrupted"]].to_numpy().sum() == 0
    left_out = [HEADERS["grad_snr"], *(["ended"] if plain else [])]
    return strings.drop(columns=left_out, errors="ignore").to_string(index=False)


def write(table: pd.DataFrame, folder: Path, stem: str, caption: str) -> list[Path]:
    """Save the comparison as CSV (numbers), Markdown and LaTeX (booktabs); each file whole or not at all."""
    return _save(folder, stem, table, _markdown(table, caption), _latex(table, caption))


def write_plain(table: pd.DataFrame, folder: Path, stem: str, caption: str) -> list[Path]:
    """Save any table of words and formatted numbers as CSV, Markdown and LaTeX, in the same way."""
    strings = table.astype(str)
    markdown = "\n".join([*_rows(strings), "", caption, ""])
    return _save(
        folder, stem, table, markdown, _booktabs(strings.map(_tex), "l" * len(strings.columns), caption)
    )


def _save(folder: Path, stem: str, table: pd.DataFrame, markdown: str, latex: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"csv": table.to_csv(index=False), "md": markdown, "tex": latex}
    paths = [folder / f"{stem}.{suffix}" for suffix in texts]
    for path, content in zip(paths, texts.values(), strict=True):
        with replacing(path) as draft:
            draft.write_text(content)
    return paths


def best(table: pd.DataFrame) -> pd.Series:
    """Which rows are not told apart from the lowest log10 hard loss of their task."""
    low, high = table["log10_hard_loss_low"], table["log10_hard_loss_high"]
    low, high = low.fillna(table["log10_hard_loss"]), high.fillna(table["log10_hard_loss"])
    lowest = table.fillna({"log10_hard_loss": np.inf}).groupby("task")["log10_hard_loss"].transform("idxmin")
    return (low <= high[lowest].to_numpy()) & np.isfinite(table["log10_hard_loss"])


def plus_minus(centre: float, half: float) -> str:
    """`centre ± half`, to two digits of the half; three digits of the centre where there is none."""
    if not math.isfinite(half) or not half > 0:
        return "-" if math.isnan(centre) else f"{centre:.3g}"
    digits = 1 - math.floor(math.log10(half))
    if digits > 6:
        return f"{centre:.2e} ± {half:.1e}"
    return f"{centre:.{max(digits, 0)}f} ± {half:.{max(digits, 0)}f}"


def _ended(row: Mapping[Any, Any]) -> str:
    words = [f"{row['diverged']} of {row['replicates']} diverged"] if row["diverged"] else []
    return ", ".join(words + [f"interrupted at {row['steps']}"] * bool(row["interrupted"])) or "done"


def _cells(column: str, values: np.ndarray) -> dict[str, float]:
    statistic = iqm_interval if column == "log10_hard_loss" else mean_interval
    interval: Interval = statistic(values)
    return {column: interval.centre, f"{column}_low": interval.low, f"{column}_high": interval.high}


def _markdown(table: pd.DataFrame, caption: str) -> str:
    strings = readable(table)
    strings["method"] = [
        f"**{method}**" if bold else method
        for method, bold in zip(strings["method"], best(table), strict=True)
    ]
    return "\n".join([caption, "", *_rows(strings), "", f"{BOLD} {NOTE}", ""])


def _rows(strings: pd.DataFrame) -> list[str]:
    rows: list[list[str]] = [
        strings.columns.tolist(),
        ["---"] * len(strings.columns),
        *strings.to_numpy().tolist(),
    ]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _latex(table: pd.DataFrame, caption: str) -> str:
    bold = best(table).to_numpy()
    strings = readable(table)
    cells = strings.map(_tex)
    cells["method"] = [
        rf"\textbf{{{name}}}" if b else name for name, b in zip(cells["method"], bold, strict=True)
    ]
    return _booktabs(cells, "ll" + "r" * (len(cells.columns) - 2), f"{caption} {BOLD} {NOTE}")


def _booktabs(cells: pd.DataFrame, alignment: str, caption: str) -> str:
    cells = cells.rename(columns=_tex)
    body = cells.style.hide(axis="index").to_latex(hrules=True, column_format=alignment)
    head = f"% needs \\usepackage{{booktabs}}\n\\begin{{table}}\n\\caption{{{_tex(caption)}}}\n"
    return f"{head}{body}\\end{{table}}\n"


def _tex(string: str) -> str:
    for plain, escaped in (
        ("_", r"\_"),
        ("%", r"\%"),
        ("±", r"$\pm$"),
        ("log10", r"$\log_{10}$"),
        ("&", r"\&"),
        ("<", "$<$"),
        ("^", r"\^{}"),
    ):
        string = string.replace(plain, escaped)
    string = re.sub(r"e([+-])0?(\d+)", lambda e: rf" \cdot 10^{{{e[1].lstrip('+')}{e[2]}}}", string)
    is_number = string[:1] in [*"-0123456789"] and (r"$\pm$" in string or r"\cdot" in string)
    return f"${string.replace('$', '')}$" if is_number else string
