"""Where a run ran and with what: enough to run it again, and nothing that names a person or a machine."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "topkbench",
    "torch",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "pandas",
    "seaborn",
    "matplotlib",
)


def environment(device: str) -> dict[str, Any]:
    """Versions, commit, device, threads and command line."""
    return {
        "command": command_line(),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }


def command_line() -> str:
    """What was typed, without the place of the interpreter or of the script."""
    script = Path(sys.argv[0])
    start = "python -m topkbench" if script.name == "__main__.py" else script.name
    return shlex.join([*shlex.split(start), *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the checkout this package runs from, or None outside one.

    A + says that the package or conf/ was changed since.
    """
    package = Path(__file__).resolve().parent
    here = str(package.parent)
    if _git(here, "ls-files", "--error-unmatch", __file__) is None:
        return None  # installed from a wheel, perhaps below somebody else's checkout
    head = _git(here, "rev-parse", "HEAD")
    changed = _git(here, "status", "--porcelain", "--", package.name, "conf")
    return head and head + ("+" if changed else "")


def _git(folder: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
