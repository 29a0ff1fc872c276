"""What can be chosen: the listing of conf/, here and nowhere else; and the line for what cannot."""

from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from topkbench.nearest import unknown

__all__ = ["GROUPS", "ConfigError", "IncompatibleError", "available", "conf_dir", "described", "unknown"]

GROUPS = ("method", "task", "optimizer", "schedule", "experiment")


class ConfigError(ValueError):
    """Bad input: one line that says what was given, what is allowed, and the nearest that is."""


class IncompatibleError(ConfigError):
    """A method and a task that do not go together: a sweep leaves the pair out, and says so."""


def conf_dir() -> str:
    """The folder of conf/: in the package of a wheel, beside it in a checkout.

    Raises:
        FileNotFoundError: it is at neither place.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"topkbench is installed without its conf folder (looked beside {here})")


def available(group: str) -> list[str]:
    """The files of a group, in conf/ and in whatever else stands on Hydra's search path."""
    if GlobalHydra.instance().is_initialized():
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group))
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return available(group)


def described(group: str) -> str:
    """The choices of a group, one a line, each with the first comment of its file."""
    names = available(group)
    width = max(map(len, names), default=0)
    return "\n".join(f"  {name:<{width}}  {_comment(f'{group}/{name}')}".rstrip() for name in names)


def _comment(path: str) -> str:
    """The first comment of a file on the search path that is not a directive to Hydra."""
    for source in GlobalHydra.instance().config_loader().get_sources():
        file = Path(source.path) / f"{path}.yaml"
        if file.is_file():
            comments = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
            return next((comment for comment in comments if not comment.startswith("@")), "")
    return ""
