"""What a run leaves on disk, and how it is read back.

One folder a run, `<task>-<method>-<id of the config>`, complete or not there at all:

    config.yaml        the resolved configuration
    environment.json   versions, commit, device, threads, command line, status
    curves.csv         one row for each replicate and log point
    summary.csv        one row for each replicate: its last log point and how it ended

The columns of both tables are those of COLUMNS, `<column>_se` for the standard error of a gradient statistic,
and the metrics of a task, which its docstring names; `load` adds those of LOADED.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from topkbench.train import Result

COLUMNS = {
    "replicate": "its index in the run, from 0",
    "seed": "what everything random in it was drawn from",
    "status": "summary only: done, diverged or interrupted",
    "diverged": "curves only: 1 from the step on at which it was given up; its W stays where it was",
    "step": "optimizer steps taken (of a diverged one: before it diverged)",
    "seconds": "wall time of training alone, of all replicates of the run together, without the logging",
    "hard_loss": "mean loss on the held-out rows with the hard top-k, without target noise",
    "relaxed_loss": "the same with the method's own forward pass",
    "at": "gradients alone: where W was put, from its start (0) to the planted W* (1)",
    "recall": "share of the teacher's top k found, in [0, 1]",
    "distance": "|W - W*| / |W*| up to what the loss cannot tell apart (see the task)",
    "rows_with_gradient": "share of the rows of W that ever got a gradient that is not 0, in [0, 1]",
    "softness": "mean of 4 m (1 - m), m the mask of the method's operator: 0 if hard",
    "grad_norm": "norm of the mean gradient over M fresh mini-batches at this W",
    "grad_variance": "trace of the covariance of one mini-batch gradient",
    "grad_variance_data": "its part that comes from the mini-batch",
    "grad_variance_method": "its part that comes from the method's own noise",
    "grad_snr": "squared norm of the mean, less its sampling bias, over grad_variance; empty if both are 0",
    "grad_zero_rows": "share of the rows of W whose gradient is exactly 0, a mean over samples",
    "true_norm": "norm of the true gradient, that of the mean hard loss",
    "true_error": "standard error of its estimate over its norm, 0 where it is exact",
    "grad_bias2": "squared norm of the bias, less its sampling bias: below 0 where it is lost in the noise",
    "grad_mse": "mean squared distance of one sample from the true gradient",
    "rel_bias2": "grad_bias2 over true_norm^2",
    "rel_variance": "grad_variance over true_norm^2",
    "rel_mse": "grad_mse over true_norm^2",
    "cos_mean": "cosine of the mean gradient with the true one; empty where the mean is lost in the noise",
    "cos_sample": "mean cosine of one sample with the true gradient",
    "rho": "descent efficiency: share of the true gradient's decrease in a step that one sample's keeps",
}
LOADED = {
    "task": "the file in conf/task",
    "method": "the file in conf/method",
    "operator": "the method's relaxation, or none",
    "estimator": "the class of the method",
    "temperature": "the method's, empty where it has none",
    "run": "the folder of the record",
}
NONE = "none"


@dataclass(frozen=True)
class Run:
    """A record, read back.

    Attributes:
        path: Its folder.
        config: The resolved configuration.
        environment: Where and how it ran.
        curves: `curves.csv` with the columns of LOADED.
        summary: `summary.csv` with the columns of LOADED.
    """

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    curves: pd.DataFrame
    summary: pd.DataFrame


def identity(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name a configuration, wherever its results go."""
    told = {key: value for key, value in config.items() if key != "results"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` once it is complete, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def save(
    folder: Path, name: str, config: Mapping[str, Any], environment: Mapping[str, Any], result: Result
) -> Path:
    """Write a record below `folder`, all of it or nothing, and never over another one.

    Returns:
        The record's own folder; its name ends in -2, -3, ... where the plain one is taken.
    """
    name = name.replace("/", "-")  # a choice in a folder of its own
    folder.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        staged.chmod(0o755)
        OmegaConf.save(OmegaConf.create(dict(config)), staged / "config.yaml")
        (staged / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        curves(result).to_csv(staged / "curves.csv", index=False)
        summary(result).to_csv(staged / "summary.csv", index=False)
        return _claim(staged, folder / f"{name}-{identity(config)}")
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def curves(result: Result) -> pd.DataFrame:
    """One row for each replicate and log point."""
    frames = []
    for step, seconds, columns in result.points:
        diverged = (result.diverged_at >= 0) & (result.diverged_at <= step)
        ids = {"replicate": range(len(result.seeds)), "seed": result.seeds, "step": step, "seconds": seconds}
        frame = pd.DataFrame(ids)
        frame["diverged"] = diverged.int().numpy()
        frames.append(frame.assign(**{name: column.numpy() for name, column in columns.items()}))
    return pd.concat(frames, ignore_index=True)


def summary(result: Result) -> pd.DataFrame:
    """One row for each replicate: its last log point."""
    last = curves(dataclasses.replace(result, points=result.points[-1:])).drop(columns="diverged")
    diverged = (result.diverged_at >= 0).numpy()
    last.insert(2, "status", "interrupted" if result.interrupted else "done")
    last.loc[diverged, "status"] = "diverged"
    last.loc[diverged, "step"] = result.diverged_at.numpy()[diverged]
    return last


def load(path: Path) -> Run:
    """Read one record.

    Raises:
        FileNotFoundError: a file of it is missing.
    """
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    assert isinstance(config, dict)
    environment = json.loads((path / "environment.json").read_text())
    method = config["method"]
    estimator = method["_target_"].rpartition(".")[2]
    operator = method.get("operator", {}).get("_target_", NONE).rpartition(".")[2]
    names = {
        "task": environment["task"],
        "method": environment["method"],
        "operator": operator,
        "estimator": estimator,
        "temperature": method.get("temperature"),
        "run": path.name,
    }
    curves, summary = (pd.read_csv(path / name).assign(**names) for name in ("curves.csv", "summary.csv"))
    return Run(path, {str(key): value for key, value in config.items()}, environment, curves, summary)


def find(folder: Path) -> list[Run]:
    """The records in `folder` and below, by task and method.

    Of a configuration that was run more than once, the newest that was not interrupted.
    """
    files = [file for file in folder.rglob("summary.csv") if not file.parent.name.startswith(".")]
    runs = [load(file.parent) for file in files]
    runs.sort(key=lambda run: (run.environment["status"] == "done", run.environment["started"]))
    newest = {(run.environment["task"], run.environment["method"], identity(run.config)): run for run in runs}
    return [newest[key] for key in sorted(newest)]


def together(runs: Sequence[Run], table: str, beside: Sequence[str] = ()) -> pd.DataFrame:
    """The "curves" or the "summary" of all of them, one below the other.

    Where a method stands there more than once on a task, its name is followed by the settings it differs in;
    not by those in `beside`, which have a column or need none.
    """
    names = _names(runs, beside)
    frames = [getattr(run, table).assign(method=name) for run, name in zip(runs, names, strict=True)]
    return pd.concat(frames, ignore_index=True)


def _names(runs: Sequence[Run], beside: Sequence[str]) -> list[str]:
    """Each run's method, with what tells it from the other runs of that method on that task."""
    flat: list[dict[str, str]] = [
        {str(name): str(value) for name, value in pd.json_normalize(dict(run.config)).iloc[0].items()}
        for run in runs
    ]
    keys = [(run.environment["task"], run.environment["method"]) for run in runs]
    names = []
    for key, own in zip(keys, flat, strict=True):
        others = [config for other, config in zip(keys, flat, strict=True) if other == key]
        told = sorted(name for name in own if any(config.get(name) != own[name] for config in others))
        # A task's n, d and k are those of the root.
        told = [
            name
            for name in told
            if name not in ("results", *beside) and name.removeprefix("task.") not in {*told} - {name}
        ]
        settings = ", ".join(_setting(name, own[name]) for name in told)
        names.append(f"{key[1]} {settings}".strip())
    return names


def _setting(name: str, value: str) -> str:
    *_, group, last = ["", *name.split(".")]
    return f"{group}={value.rpartition('.')[2]}" if last == "_target_" else f"{last}={value}"


def _claim(staged: Path, wanted: Path) -> Path:
    """Give a folder its name, or the next one that is free; a rename onto a full folder fails, so no race."""
    target, count = wanted, 1
    while True:
        try:
            os.rename(staged, target)
            return target
        except OSError:
            if not target.exists():
                raise
            count += 1
            target = wanted.with_name(f"{wanted.name}-{count}")
