"""Convergence and gradient variance of every method on every task of a sweep, at a paper's width.

    python experiments/convergence_and_variance.py FOLDER [OUT]

reads the records below FOLDER, and nothing else, and writes to OUT (by default FOLDER) the figure (PDF, PNG),
the table beside it (CSV, Markdown, LaTeX) and where they come from (JSON). One task is drawn one column
wide, three tasks both columns.
"""

import json
import shlex
import sys
from pathlib import Path

from topkbench import plots, records, report, tables

STEM = "convergence_and_variance"
COMMAND = "python -m topkbench +experiment=founding"


def main(folder: Path, out: Path) -> None:
    """Draw and save both."""
    runs = records.find(folder)
    if not runs:
        where = shlex.quote(f"hydra.sweep.dir={folder}")
        sys.exit(f"no records below {folder}; this makes them:\n\n    {COMMAND} {where}\n")
    curves, summary = (records.together(runs, name) for name in ("curves", "summary"))
    table = tables.comparison(summary)
    provenance = report.provenance(runs)
    written = plots.save(plots.sheet(curves, [plots.by_step, plots.variance_by_step]), out, STEM, provenance)
    written += tables.write(table, out, STEM, report.caption(runs))
    with records.replacing(out / f"{STEM}.json") as draft:
        draft.write_text(json.dumps(provenance, indent=2) + "\n")
    print(tables.text(table), "", *written, out / f"{STEM}.json", sep="\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[-1]))
