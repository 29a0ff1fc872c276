"""What each task is like without top-k, beside what is learned with it: from the records of a sweep.

    python -m topkbench +experiment=tasks hydra.sweep.dir=RUNS
    python experiments/baselines.py RUNS [OUT]

One metric for each task: before learning, by the hard gradient, by the best method of the sweep (by that
metric: an optimistic choice) with its 95 % interval, and by a baseline that keeps nothing back: all experts,
all columns, all slots, no learning, or cross-entropy. Saves to OUT, by default results/tasks, the scores of
the sweep (table and heat map), this table (baselines) and which pairs were left out (left_out). Two minutes.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from sklearn.decomposition import PCA
from tqdm import tqdm

from topkbench import plots, records, report, scores, tables
from topkbench.choices import ConfigError, available, conf_dir
from topkbench.config import read
from topkbench.methods import Relaxed
from topkbench.operators import scaled_softmax
from topkbench.randomness import Normals
from topkbench.records import Run
from topkbench.stats import mean_interval
from topkbench.tasks import features, knn
from topkbench.work import train

LOWER = ("hard_loss", "fvu", "error")
CAPTION = (
    "Held-out rows, hard top-k (subset_vae: the exact bound), mean over replicates ± half a 95 % interval "
    "(t), which on a bundled table covers starts and mini-batches, not its one split. best: the method of "
    "the sweep with the best mean, oracle excepted: chosen on what is shown, so optimistic; nothing is "
    "tuned. baseline: without top-k, by name; all under softmax(q) has its own dense loss."
)


def mixed(runs: dict[str, Run]) -> tuple[str, pd.Series]:
    """All of them under a softmax of the scores; its own loss."""
    experiment = read(runs["hard"].config)
    method = Relaxed(scaled_softmax, 1.0)
    last = records.summary(train(dataclasses.replace(experiment, method=method)))
    return "all under softmax(q)", last["relaxed_loss"]


def columns(runs: dict[str, Run]) -> tuple[str, pd.Series]:
    """The same predictor with all columns."""
    run = runs["hard"]
    experiment = read(run.config)
    task, rows = experiment.task, experiment.train.steps * experiment.train.batch
    assert isinstance(task, features.Features)
    return "all columns", pd.Series([features.baseline(task, seed, rows) for seed in run.summary["seed"]])


def neighbours(runs: dict[str, Run]) -> tuple[str, pd.Series]:
    """Neighbours in what a smooth loss over all candidates learns."""
    run = runs["hard"]
    task = read(run.config).task
    assert isinstance(task, knn.KNN)
    return "NCA", pd.Series([knn.baselines(task, seed)["nca"] for seed in run.summary["seed"]])


def entropy(runs: dict[str, Run]) -> tuple[str, pd.Series]:
    """The same model and training with cross-entropy in place of top-k."""
    run = runs["hard"]
    experiment = read(run.config)
    task = dataclasses.replace(experiment.task, objective="cross_entropy")  # type: ignore[type-var]
    last = records.summary(train(dataclasses.replace(experiment, task=task)))
    return "cross-entropy", last[MEASURED[run.environment["task"]][0]]


def principal(runs: dict[str, Run]) -> tuple[str, pd.Series]:
    """As many principal components as a code has numbers."""
    run = runs["hard"]
    task = read(run.config).task
    left = []
    for seed in run.summary["seed"]:
        normals = Normals([int(seed)])
        teacher = task.teacher(normals.child("teacher"))
        seen, test = (
            task.sample(teacher, normals.child(name), 2048, clean=name == "test").x[0].numpy()
            for name in ("train", "test")
        )
        pca = PCA(task.k).fit(seen)
        rest = test - pca.inverse_transform(pca.transform(test))
        left.append(float((rest**2).sum() / ((test - test.mean(0)) ** 2).sum()))
    return f"{task.k} principal components", pd.Series(left)


def unconditional(runs: dict[str, Run]) -> tuple[str, pd.Series]:
    """Independent pixels with their own means: no latent subset at all, and so no gap."""
    return "independent pixels", runs["hard"].summary["baseline_nll"]


MEASURED = {  # the metric of each task, and its baseline
    "router": ("hard_loss", mixed),
    "features": ("error", columns),
    "knn": ("accuracy", neighbours),
    "classification": ("top_2", entropy),
    "retrieval": ("recall", entropy),
    "autoencoder": ("fvu", principal),
    "attention": ("hard_loss", mixed),
    "subset_vae": ("hard_loss", unconditional),
}


def row(task: str, runs: dict[str, Run]) -> dict[str, object]:
    """The table's row of a task."""
    metric, baseline = MEASURED[task]
    done = {
        name: run.summary[metric]
        for name, run in runs.items()
        if (run.summary["status"] == "done").all() and name != "oracle"
    }
    choose = min if metric in LOWER else max
    best = choose(done, key=lambda name: done[name].mean())
    start = runs["hard"].curves.query("step == 0")[metric]
    what, without = baseline(runs)
    settings = runs["hard"].config["task"]
    return {
        "task": task,
        "size": ", ".join(f"{name} = {settings[name]}" for name in ("n", "k", "data") if name in settings),
        "metric": f"{metric} ({'lower' if metric in LOWER else 'higher'} is better)",
        "untrained": words(start),
        "hard": words(done["hard"]),
        "best": f"{best}: {words(done[best])}",
        "baseline": f"{what}: {words(without)}",
    }


def left_out(found: dict[str, dict[str, Run]]) -> pd.DataFrame:
    """Which methods have no record on a task, and why: what a sweep says as it leaves a pair out."""
    rows = []
    for task, runs in found.items():
        settings = next(iter(runs.values())).config
        for method in sorted(set(available("method")) - set(runs)):
            node = OmegaConf.to_container(OmegaConf.load(f"{conf_dir()}/method/{method}.yaml"))
            try:
                read({**settings, "method": node})
                why = "left out of the sweep, or it failed"
            except ConfigError as error:
                why = str(error)
            rows.append({"method": method, "task": task, "reason": why})
    table = pd.DataFrame(rows, columns=["method", "task", "reason"])
    return table.groupby(["method", "reason"], sort=False, as_index=False)["task"].agg(", ".join)


def words(values: pd.Series) -> str:
    """The mean with half its interval."""
    interval = mean_interval(np.asarray(values, float))
    return tables.plus_minus(interval.centre, interval.high - interval.centre)


def main(folder: Path, out: Path) -> None:
    """Read, train the baselines, save and print."""
    runs = records.find(folder)
    if not runs:
        sys.exit(f"no records below {folder}\n\n{__doc__}")
    found = {
        task: {r.environment["method"]: r for r in runs if r.environment["task"] == task} for task in MEASURED
    }
    lacking = [task for task, own in found.items() if "hard" not in own]
    if lacking:
        sys.exit(f"{folder} has no record of hard on {', '.join(lacking)}\n\n{__doc__}")
    table = pd.DataFrame([row(task, own) for task, own in tqdm(found.items(), "baselines")])
    caption, provenance = report.caption(runs), report.provenance(runs)
    tables.write_plain(table, out, "baselines", f"{caption} {CAPTION}")
    tables.write_plain(left_out(found), out, "left_out", "Methods without a record on a task of the sweep.")
    across = scores.scores(*(records.together(runs, name) for name in ("curves", "summary")))
    scores.write(across, out, caption)
    plots.save(scores.heat_map(across), out, "scores", provenance)
    with records.replacing(out / "scores.json") as draft:
        draft.write_text(json.dumps(provenance, indent=2) + "\n")
    print(table.to_string(index=False), scores.readable(across).to_string(index=False), sep="\n\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "results/tasks"))
