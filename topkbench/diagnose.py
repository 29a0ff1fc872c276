"""One line for whatever went wrong: what was given, what is allowed, and the nearest that is."""

import os
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from topkbench.choices import GROUPS, ConfigError, available, conf_dir, unknown

SWEEP = ("-m", "--multirun")
TRACES = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as the person set it: the command line sets it too


def line(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """The line for an error of a run with these overrides, by default those of the command line.

    Shows the traceback first where HYDRA_FULL_ERROR=1 asks for it. After this Hydra is no longer
    initialized: the process is about to end.
    """
    if TRACES:
        traceback.print_exception(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"topkbench: {_of_overrides(overrides or sys.argv[1:]) or _shortened(error)}"
    if isinstance(error, ConfigError | OSError):
        return f"topkbench: {error}"
    return f"topkbench: {type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)"


def _of_overrides(arguments: Sequence[str]) -> str | None:
    """The first override that cannot be, as a line; None if it is not to be found here."""
    overrides = []
    for argument in arguments:
        if argument.startswith("-") or argument in (*_folders(arguments), *_started(arguments)):
            continue
        if "=" not in argument and not argument.startswith("~"):
            return f"cannot read {argument!r}: a setting is typed as name=value"
        try:
            overrides.append(OverridesParser.create().parse_override(argument))
        except HydraException as error:
            return f"cannot read {argument!r}: {_shortened(error)}"
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return _of_choices(overrides, arguments) or _of_keys(overrides, arguments)


def _of_choices(overrides: list[Override], arguments: Sequence[str]) -> str | None:
    for override in overrides:
        group = override.key_or_group
        for choice in _choices(override) if group in GROUPS else []:
            there = [*available(group), *_own(group, _folders(arguments))]
            if choice not in there:
                return unknown(choice, there, group)
        if override.is_sweep_override() and not set(SWEEP) & set(arguments):
            return f"{override.input_line}: several values are a sweep: put -m before the settings"
    groups = [override.key_or_group for override in overrides if override.key_or_group in GROUPS]
    twice = next((group for group in groups if groups.count(group) > 1), None)
    return f"{twice} is given twice" if twice else None


def _of_keys(overrides: list[Override], arguments: Sequence[str]) -> str | None:
    """The keys of several methods are taken to be those of the first one."""
    chosen = [
        f"{'+' if group == 'method' else ''}{group}={_choices(override)[0]}"
        for override in overrides
        if (group := override.key_or_group) in GROUPS and group != "experiment" and _choices(override)
    ]
    path = ",".join(f"file://{Path(folder).resolve()}" for folder in _folders(arguments))
    start = (*_started(arguments), "config")[0]
    keys = _flat(compose(start, [*chosen, f"hydra.searchpath=[{path}]"]))
    for override in overrides:
        key = override.key_or_group
        if key not in (*keys, *GROUPS) and key.partition(".")[0] != "hydra":
            named = [name for name in keys if "._" not in name]
            group = key.rpartition(".")[0]
            siblings = [name for name in named if name.rpartition(".")[0] == group]
            return unknown(key, siblings if group in ("", *keys) else named)
    return None


def _folders(arguments: Sequence[str]) -> list[str]:
    """What was given by --config-dir."""
    return _given(arguments, "--config-dir", "-cd")


def _started(arguments: Sequence[str]) -> list[str]:
    """The file of conf/ that was named to start from, by --config-name or by another entry."""
    return _given(arguments, "--config-name", "-cn")


def _given(arguments: Sequence[str], *flags: str) -> list[str]:
    """What follows one of these flags, in an argument of its own or after "="."""
    after = [after for flag, after in pairwise(arguments) if flag in flags]
    joined = [argument.partition("=") for argument in arguments]
    return after + [value for flag, sign, value in joined if sign and flag in flags]


def _own(group: str, folders: list[str]) -> list[str]:
    return [file.stem for folder in folders for file in Path(folder, group).glob("*.yaml")]


def _choices(override: Override) -> list[str]:
    """What an override of a group chooses; nothing for a glob, which takes what there is."""
    if override.is_choice_sweep():
        return [str(choice) for choice in override.sweep_iterator()]
    return [] if override.is_sweep_override() else [str(override.value())]


def _flat(config: DictConfig, prefix: str = "") -> list[str]:
    names = []
    for key in config:
        names.append(prefix + str(key))
        node = config._get_node(key)
        if isinstance(node, DictConfig):
            names += _flat(node, prefix + str(key) + ".")
    return names


def _shortened(error: BaseException) -> str:
    """Hydra's own words in one line."""
    words = " ".join(str(error).split())
    return words if len(words) < 300 else f"{words[:300]} ..."
