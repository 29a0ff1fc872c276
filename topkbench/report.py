"""What is shown at the end of a run or of a sweep: its table and its figures, beside its records."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from topkbench import plots, records, tables


def report(folder: Path, runs: Sequence[records.Run]) -> str:
    """Draw and save what the records of `runs` show, into `folder`.

    Returns:
        The table and where everything lies, to print.
    """
    curves, summary = (records.together(runs, name) for name in ("curves", "summary"))
    table = tables.comparison(summary)
    written = tables.write(table, folder, "table", caption(runs))
    told = {
        "commands": sorted({run.environment["command"] for run in runs}),
        "runs": [run.path.name for run in runs],
    }
    sheets = {
        "convergence": lambda: plots.convergence(curves),
        "gradient_variance": lambda: plots.gradient_variance(curves),
        "final_loss": lambda: plots.final_loss(summary),
    }
    for stem, draw in tqdm(sheets.items(), desc="figures", leave=False, delay=1):
        written += plots.save(draw(), folder, stem, told)
    names = [path.name for run in runs[:1] if run.path == folder for path in sorted(folder.glob("*.[jcy]*"))]
    stems = [f"{stem}.{{pdf,png}}" for stem in sheets]
    files = [*(name for name in names if name not in {p.name for p in written}), "table.{csv,md,tex}", *stems]
    note = textwrap.fill(tables.NOTE, 100)
    return f"\n{tables.text(table)}\n\n{note}\n\n{folder}/\n    " + "\n    ".join(files)


def caption(runs: Sequence[records.Run]) -> str:
    """The settings of the runs in a sentence, as far as they share them."""
    facts = []
    for name, words in (
        ("n", "n={}"),
        ("d", "d={}"),
        ("k", "k={}"),
        ("seeds", "{} replicates"),
        ("train.steps", "{} steps"),
        ("train.batch", "of {} rows"),
        ("optimizer._target_", "{}"),
        ("optimizer.lr", "at rate {}"),
    ):
        values = {_get(run.config, name) for run in runs}
        if len(values) == 1:
            facts.append(
                words.format(str(values.pop()).rpartition(".")[2] if name.endswith("_") else values.pop())
            )
    return ", ".join(facts).replace(", of", " of").replace(", at", " at") + "."


def _get(config: object, path: str) -> object:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config
