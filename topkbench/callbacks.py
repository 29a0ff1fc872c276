"""Before a run or a sweep: every job is composed and checked, and nothing is written if one is wrong."""

import contextlib
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from topkbench.choices import ConfigError, IncompatibleError, available
from topkbench.diagnose import line
from topkbench.writable import check_writable


class Check(Callback):
    """Checks what is about to run before anything is written, and remembers where a sweep goes.

    Hydra turns an exception of a callback into a warning, and writes files before a job could object: so
    what is wrong ends the process from here.

    Attributes:
        sweep: The folder of the sweep that was started in this process, if any.
    """

    sweep: ClassVar[Path | None] = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a run for bad input.

        Raises:
            SystemExit: with the line to print.
        """
        try:
            check(config)
            check_writable(Path(config.results))
            check_writable(Path(config.hydra.run.dir), "hydra.run.dir")
        except Exception as error:
            raise SystemExit(line(error)) from error

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse the whole sweep for one bad job.

        Raises:
            SystemExit: with the line to print.
        """
        overrides: list[str] = []
        try:
            folder = Path(config.hydra.sweep.dir)
            check_writable(folder)
            # On a terminal alone: what is wrong is said in one line.
            for overrides in tqdm(jobs(config), "checking", unit="job", delay=2, leave=False, disable=None):
                with contextlib.suppress(IncompatibleError):  # that job will say so and be left out
                    check(GlobalHydra.instance().config_loader().load_sweep_config(config, overrides))
        except Exception as error:
            where = f" (in {' '.join(overrides)})" if overrides else ""
            raise SystemExit(line(error, overrides) + where) from error
        for file in folder.glob("failed-*.txt"):  # of an earlier sweep into the same folder
            file.unlink()
        Check.sweep = folder


def check(config: DictConfig) -> None:
    """Build all of a composed configuration, and let go of it again.

    Raises:
        ConfigError: it cannot be built.
    """
    from topkbench.config import read  # after this torch is there

    if not config.get("method"):
        raise ConfigError(f"choose a method: +method=NAME with NAME one of {', '.join(available('method'))}")
    if not isinstance(config.hydra.runtime.choices.get("method"), str):
        raise ConfigError("one method a run; several are a sweep: -m +method=hard,softmax")
    read(plain(config))


def jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job of a sweep; none for a sweeper that decides on them as it goes.

    Raises:
        ConfigError: the sweep is empty.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = [*given, *config.hydra.overrides.task]
    (batch,) = BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)
    if not batch:
        raise ConfigError(f"nothing to run: a glob in {' '.join(overrides)} matches no file")
    return batch


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as resolved dictionaries, without Hydra's own part."""
    without = {str(key): config._get_node(key) for key in config if key != "hydra"}
    resolved = OmegaConf.to_container(OmegaConf.create(without), resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
