"""The headline figure: bias against variance of every method, a line along its temperature, on mask and gate.

    python -m topkbench.gradients +experiment=frontier hydra.sweep.dir=RUNS
    python -m topkbench.gradients +experiment=frontier_fixed hydra.sweep.dir=RUNS
    python experiments/frontier.py RUNS [OUT]

Reads the records of the two sweeps and nothing else. Saves to OUT, by default results/frontier, the figure
(PDF, PNG), the table of all of it, the table of the relaxations at matched softness, each method at its
best temperature by descent efficiency (CSV, Markdown, LaTeX each), and where they come from (JSON).
"""

import json
import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from topkbench import frontier, plots, records, report, tables
from topkbench.catalogue import catalogue

PANELS = {
    "threshold, relaxed": ("threshold",),
    "threshold, straight-through": ("threshold",),
    "softmax and gates": ("softmax", "gate"),
    "permutations, networks": ("permutation", "sorting network"),
    "ranks, midpoint": ("ranks", "midpoint"),
    "transport": ("optimal transport",),
    "subset law, score function": ("subset distribution", "score function"),
    "independent gates": ("independent gates",),
    "differences, noise, identity": (
        "finite difference",
        "perturbed",
        "straight-through",
        "identity",
        "noisy relaxation",
    ),
}
SOFT = 0.4  # where relaxations are compared: about half of what a uniform mask of 3 of 8 has


def members(methods: pd.DataFrame) -> dict[str, list[str]]:
    """The methods of each panel."""
    groups = {}
    for panel, families in PANELS.items():
        own = methods[methods["family"].isin(families)]
        if families == ("threshold",):
            own = own[(own["estimator"] == "Relaxed") == (panel == "threshold, relaxed")]
        groups[panel] = own["method"].tolist()
    return groups


def sheet(table: pd.DataFrame, groups: dict[str, list[str]]) -> Figure:
    """A row of panels for each group, a column for each task; what is not of the group in grey."""
    tasks = list(dict.fromkeys(table["task"]))
    heights = [max(1.7, 0.5 + 0.105 * len(names)) for names in groups.values()]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.PAGE, sum(heights)), layout="constrained")
        grid = figure.subplots(
            len(groups), len(tasks), squeeze=False, sharex="col", sharey="col", height_ratios=heights
        )
        for axes, (title, names) in zip(grid, groups.items(), strict=True):
            shown = table[table["method"].isin([*names, *frontier.MARKED])]
            own = (shown["operator"] == records.NONE) & ~shown["method"].isin(frontier.MARKED)
            looks = plots.looks_of(shown.assign(operator=shown["operator"].mask(own, shown["method"])))
            for ax, task in zip(axes, tasks, strict=True):
                frontier.panel(ax, table[table["task"] == task], looks, set(shown["method"]))
                ax.set_title(f"{task}: {title}")
                ax.set_xlabel("relative bias" if ax in grid[-1] else "")
    return figure


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Each method at the temperature of its highest descent efficiency."""
    rows = table.loc[table.groupby(["task", "method"])["rho"].idxmax()]
    return rows.sort_values(["task", "rho"], ascending=[True, False])


def main(folder: Path, out: Path) -> None:
    """Draw and save."""
    runs = records.find(folder)
    if not runs:
        sys.exit(f"no records below {folder}\n\n{__doc__}")
    table = frontier.summarised(records.together(runs, "curves", beside=("method.temperature",)))
    methods, provenance = catalogue(), report.provenance(runs)
    caption = report.caption(runs)
    written = plots.save(sheet(table, members(methods)), out, "frontier", provenance)
    written += frontier.write(table, out, "all", caption)
    written += frontier.write(
        best(table), out, "best", f"{caption} Each method at its temperature of highest rho."
    )
    quiet = methods.loc[methods["random"] == "", "method"]  # noise makes a mask harder than its softness says
    matched = frontier.matched(table[table["method"].isin(quiet)], SOFT)
    words = f"{caption} At softness {SOFT}, between the temperatures measured (log-linear)."
    written += tables.write_plain(matched, out, "matched", words)
    with records.replacing(out / "frontier.json") as draft:
        draft.write_text(json.dumps(provenance, indent=2) + "\n")
    print(frontier.readable(best(table)).to_string(index=False))
    print(matched.to_string(index=False), *written, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "results/frontier"))
