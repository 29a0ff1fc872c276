"""The command line: compose, build, train, save, show. It knows no method and no task by name.

torch and the plotting packages are imported where they are needed: help, completion and errors in what was
typed are there at once, and drawing costs nothing before training ends.
"""

import datetime
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from topkbench.callbacks import Check, plain
from topkbench.choices import IncompatibleError, conf_dir, described
from topkbench.diagnose import line

INTERRUPTED = 130

OmegaConf.register_new_resolver("topkbench.choices", described, replace=True)


def main(config_name: str | None = None) -> None:
    """Run what the command line asks for; the exit code is 0 only if all of it was done.

    Args:
        config_name: The file of conf/ to start from if the command line names none; None for config.yaml.
    """
    if config_name:
        sys.argv[1:1] = ["--config-name", config_name]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra lets errors through, and diagnose.py words them
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # Hydra would print each glyph it embeds
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = _guarded(_run)
    # Hydra does not call a sweep's end where a job failed or Ctrl-C was pressed.
    if Check.sweep is not None:
        folder = Check.sweep
        code = _guarded(lambda: _end_sweep(folder)) or code
    sys.exit(code)


def _guarded(part: Callable[[], int | None]) -> int:
    """The exit code of a part; where it fails, a line says why."""
    try:
        return part() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        print(line(error), file=sys.stderr)
        return 1


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _run(config: DictConfig) -> None:
    choices = dict(HydraConfig.get().runtime.choices)
    if HydraConfig.get().mode == RunMode.RUN:
        try:
            path = _train(plain(config), choices, Path(config.results))
        except Exception as error:
            raise SystemExit(line(error)) from error  # or Hydra puts a line of its own before it

        from topkbench.records import load
        from topkbench.report import report  # the plotting packages: training is over

        print(report(path, [load(path)]))
        _stop_if_interrupted(path)
        return
    folder = Path(HydraConfig.get().sweep.dir)
    try:
        path = _train(plain(config), choices, folder)
    except IncompatibleError as error:
        print(f"topkbench: {choices['task']}-{choices['method']} is left out: {error}", file=sys.stderr)
        return
    except Exception as error:
        # The other jobs go on; the sweep says at its end what failed.
        name = f"{choices['task']}-{choices['method']}"
        (folder / f"failed-{name.replace('/', '-')}-{HydraConfig.get().job.num}.txt").write_text(
            traceback.format_exc()
        )
        print(f"topkbench: {name} failed: {error}", file=sys.stderr)
        return
    _stop_if_interrupted(path)


def _train(config: dict[str, Any], choices: Mapping[str, Any], folder: Path) -> Path:
    """One run, from its configuration to its record."""
    from topkbench import config as reader
    from topkbench.environment import environment
    from topkbench.work import stand, train

    experiment = reader.read(config)
    name = f"{choices['task']}-{choices['method']}"
    told = {"task": choices["task"], "method": choices["method"], **environment(experiment.device)}
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    result = (train if experiment.at is None else stand)(experiment, name)
    if not result.points:
        print(f"topkbench: {name}: interrupted before anything was logged", file=sys.stderr)
        raise KeyboardInterrupt
    told |= {
        "status": "interrupted" if result.interrupted else "done",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 3),
    }
    from topkbench.records import save

    return save(folder, name, config, told, result)


def _stop_if_interrupted(path: Path) -> None:
    from topkbench.records import load

    if load(path).environment["status"] == "interrupted":
        print(f"topkbench: interrupted; what was logged is in {path}", file=sys.stderr)
        raise KeyboardInterrupt


def _end_sweep(folder: Path) -> int:
    """Print and save the comparison of what a sweep has left, and say what failed."""
    from topkbench.records import find
    from topkbench.report import report

    runs = find(folder)
    if runs:
        print(report(folder, runs))
    failed = sorted(folder.glob("failed-*.txt"))
    for file in failed:
        print(f"topkbench: failed, see {file}", file=sys.stderr)
    return 1 if failed or not runs else 0
