"""How much the temperature matters: final hard loss of every method that has one, over a grid, on every task.

    python experiments/temperatures.py [OUT]

One batched run a method and task: the grid and the seeds are its replicates. The seeds are none of those
the other results are made with. Writes temperatures.{csv,md,pdf,png} to OUT, by default
results/temperatures. The default in conf/method/, one for all relaxations, comes from here.
"""

import dataclasses
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from tqdm import tqdm

from topkbench import plots
from topkbench.callbacks import plain
from topkbench.choices import available, conf_dir
from topkbench.config import read
from topkbench.environment import command_line, commit
from topkbench.records import NONE, replacing
from topkbench.stats import iqm_interval, log_loss
from topkbench.train import Logging, train

TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = range(1000, 1004)
QUIET = Logging(points=2, samples=0)


def losses(task: str, name: str) -> pd.DataFrame:
    """The final hard loss of each temperature and seed; empty for a method without a temperature."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        node = plain(compose("config", [f"+method={name}", f"task={task}"]))
    experiment = read(node)
    if not hasattr(experiment.method, "temperature"):
        return pd.DataFrame()
    grid = torch.tensor(TEMPERATURES, dtype=torch.float64).repeat_interleave(len(SEEDS))
    method = dataclasses.replace(experiment.method, temperature=grid)
    seeds = list(SEEDS) * len(TEMPERATURES)
    result = train(method, experiment.task, experiment.optimizer, seeds, experiment.train, QUIET)
    loss = result.points[-1][2]["hard_loss"].masked_fill(result.diverged_at >= 0, torch.inf)
    operator = node["method"].get("operator", {}).get("_target_", NONE).rpartition(".")[2]
    return pd.DataFrame(
        {
            "task": task,
            "method": name,
            "operator": operator,
            "estimator": type(method).__name__,
            "temperature": np.float64(grid),
            "seed": seeds,
            "hard_loss": loss,
        }
    )


def panel(ax: matplotlib.axes.Axes, table: pd.DataFrame, looks: plots.Looks) -> None:
    """Final hard loss against temperature."""
    plots.draw(ax, table.assign(log10=log_loss(table["hard_loss"])), "temperature", looks)
    ax.set_xscale("log")
    ax.set(xlabel="temperature", ylabel="final hard loss")


def figure(table: pd.DataFrame) -> Figure:
    """A column for each task."""
    return plots.sheet(table, [panel], plots.PAGE)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Interquartile means, a column for each temperature."""
    groups = table.groupby(["task", "method", "temperature"], sort=False)["hard_loss"]
    means = groups.apply(lambda loss: f"{10 ** iqm_interval(log_loss(loss)).centre:.3g}")
    return means.unstack("temperature").reset_index()


def main(out: Path) -> None:
    """Run the grid, print and save it."""
    jobs = [(task, name) for task in available("task") for name in available("method")]
    table = pd.concat([losses(*job) for job in tqdm(jobs, desc="grid")], ignore_index=True)
    text = readable(table)
    print(text.to_string(index=False))
    plots.save(figure(table), out, "temperatures", {"commands": [command_line()], "commits": [commit()]})
    rows = [text.columns.map(str).tolist(), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    with replacing(out / "temperatures.md") as draft:
        draft.write_text("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    with replacing(out / "temperatures.csv") as draft:
        table.drop(columns=["operator", "estimator"]).to_csv(draft, index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/temperatures"))
