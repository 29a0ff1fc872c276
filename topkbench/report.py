"""What is shown at the end of a run or of a sweep: its table and its figures, beside its records."""

import functools
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from topkbench import frontier, plots, records, scores, tables


def report(folder: Path, runs: Sequence[records.Run]) -> str:
    """Draw and save what the records of `runs` show, into `folder`.

    Returns:
        The table and where everything lies, to print.
    """
    shown, note, sheets = (_gradients if "at" in runs[0].curves else _training)(folder, runs)
    for stem, draw in tqdm(sheets.items(), desc="figures", leave=False, delay=1):
        plots.save(draw(), folder, stem, provenance(runs))
    return f"\n{shown}\n\n{textwrap.fill(note, 100)}\n\n{folder}/\n{_listing(folder)}"


def _training(folder: Path, runs: Sequence[records.Run]) -> tuple[str, str, dict[str, Callable[[], Figure]]]:
    """The table, what it means, and the figures of runs that learned."""
    curves, summary = (records.together(runs, name) for name in ("curves", "summary"))
    table = tables.comparison(summary)
    tables.write(table, folder, "table", caption(runs))
    sheets = {
        "convergence": lambda: plots.convergence(curves),
        "gradient_variance": lambda: plots.gradient_variance(curves),
        "final_loss": lambda: plots.final_loss(summary),
    }
    settings = {json.dumps(run.config["task"], sort_keys=True) for run in runs}
    if table["task"].nunique() == len(settings) > 1:  # one problem a task: else gains do not compare
        across = scores.scores(curves, summary)
        scores.write(across, folder, caption(runs))
        sheets["scores"] = lambda: scores.heat_map(across)
    return tables.text(table), tables.NOTE, sheets


def _gradients(folder: Path, runs: Sequence[records.Run]) -> tuple[str, str, dict[str, Callable[[], Figure]]]:
    """The same of runs that looked at gradients at a fixed W."""
    table = frontier.summarised(records.together(runs, "curves", beside=("method.temperature",)))
    frontier.write(table, folder, "gradients", caption(runs))
    sheets = {
        "frontier": lambda: frontier.figure(table),
        "softness": lambda: frontier.figure(table, "softness"),
    }
    compared = "rel_bias2" in table  # with a truth
    return frontier.readable(table).to_string(index=False), frontier.NOTE, sheets if compared else {}


def _listing(folder: Path) -> str:
    """The files of a folder, one stem a line: `table.{csv,md,tex}`."""
    endings: dict[str, list[str]] = {}
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        endings.setdefault(file.stem, []).append(file.suffix[1:])
    return "\n".join(
        f"    {stem}.{those[0]}" if len(those) == 1 else f"    {stem}.{{{','.join(those)}}}"
        for stem, those in endings.items()
    )


def provenance(runs: Sequence[records.Run]) -> dict[str, object]:
    """What the records were made by: commands, commits, versions; and which they are."""
    return {
        "commands": sorted({run.environment["command"] for run in runs}),
        "commits": sorted({str(run.environment["commit"]) for run in runs}),
        "packages": runs[0].environment["packages"],
        "device": sorted({run.environment["device"] for run in runs}),
        "threads": sorted({run.environment["threads"] for run in runs}),
        "runs": [run.path.name for run in runs],
    }


def caption(runs: Sequence[records.Run]) -> str:
    """The settings that the runs share, in a sentence."""
    shared = {
        "n = {}": ("task", "n"),
        "d = {}": ("task", "d"),
        "k = {}": ("task", "k"),
        "{} replicates": ("seeds",),
        "batches of {} rows": ("train", "batch"),
    }
    if all(run.config.get("at") for run in runs):
        shared["{} gradients"] = ("log", "samples")
    else:
        shared |= {
            "{} steps": ("train", "steps"),
            "{}": ("optimizer", "_target_"),
            "learning rate {}": ("optimizer", "lr"),
        }
    facts = []
    for words, path in shared.items():
        values = {
            str(functools.reduce(lambda node, key: node.get(key, {}), path, run.config)) for run in runs
        }
        value = values.pop()
        if not values and value != "{}":
            facts.append(words.format(value.rpartition(".")[2] if path[-1] == "_target_" else value))
    return ", ".join(facts) + "."
