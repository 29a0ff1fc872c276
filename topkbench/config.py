"""From a composed configuration to objects, with every key, type and range checked on the way.

`_target_` names a class, its other keys are that class's arguments: they are compared with its signature,
and the class checks their ranges.
"""

import contextlib
import functools
import inspect
import pydoc
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor

from topkbench.choices import ConfigError, IncompatibleError, conf_dir, unknown
from topkbench.gradients import has_truth
from topkbench.methods import Method
from topkbench.methods._contract import answers_for
from topkbench.operators import Operator
from topkbench.operators._contract import bound
from topkbench.optimizers import Optimizer
from topkbench.randomness import Normals
from topkbench.schedules import Schedule
from topkbench.tasks import KnownInputs, Task
from topkbench.train import Logging, Training

DROPPED = {"_target_", "_partial_", "search"}  # `search` is where tuning looks
GIVEN_LATER = {"scores", "k", "temperature"}  # what an operator gets from its method


@dataclass(frozen=True)
class Experiment:
    """The root of a configuration, built; the fields are its keys.

    Attributes:
        method: How a gradient reaches W.
        task: What is learned.
        optimizer: How W moves.
        schedule: How the temperature changes.
        train: How long and how much at once.
        log: What is looked at on the way.
        n: How many scores; d: the dimension of x; k: how many scores are kept (what tasks refer to).
        seeds: How many replicates, >= 1.
        seed: That of the first replicate, >= 0; the others count up from it.
        device: "cpu", "cuda" or "cuda:0", ...
        dtype: "float32" or "float64".
        results: The folder records go to.
        at: Where W stands between its start (0) and the planted W* (1), to measure gradients there and not to
            train; None trains.
    """

    method: Method
    task: Task
    optimizer: Optimizer
    schedule: Schedule
    train: Training
    log: Logging
    n: int
    d: int
    k: int
    seeds: int
    seed: int
    device: str
    dtype: Literal["float32", "float64"]
    results: str
    at: list | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds must be >= 1, got {self.seeds}")
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}")
        _check_device(self.device)
        _check_options(self.method, self.k)
        reason = misfit(self.method, self.task)
        if reason:
            raise IncompatibleError(reason)
        _check_measurement(self)


def misfit(method: Method, task: Task) -> str | None:
    """Why a method and a task do not go together, in a line; None if they do."""
    name, other = type(method).__name__, type(task).__name__
    if task.wants not in answers_for(method):
        wanted = " or ".join(answers_for(method))
        return (
            f"{name} needs a task whose loss is a function of the {wanted}; that of {other} is one of the "
            f"{task.wants}"
        )
    if getattr(method, "needs_truth", False) and not has_truth(task):
        return f"{name} needs a task whose true gradient is known; that of {other} is not"
    with_sizes = getattr(method, "check_sizes", None)
    if with_sizes is not None:
        try:
            with_sizes(task.n, task.k)
        except ValueError as error:
            return str(error)
    return None


def read(config: Mapping[str, Any]) -> Experiment:
    """Build the whole of a resolved configuration.

    Raises:
        ConfigError: a key that is unknown or missing, a wrong type, a value out of range.
    """
    allowed = [field.name for field in fields(Experiment)]
    for key in config:
        if key not in allowed:
            raise ConfigError(unknown(key, allowed))
    plain = {"train": Training, "log": Logging}
    parts = {
        key: build(value, key, plain.get(key)) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    return Experiment(**_checked(Experiment, parts, ""))


def built(group: str, name: str) -> Any:
    """What a file of conf/ describes that refers to nothing outside itself, as those of method/ do.

    Raises:
        ConfigError: as `read`.
    """
    node = OmegaConf.to_container(OmegaConf.load(f"{conf_dir()}/{group}/{name}.yaml"))
    assert isinstance(node, dict)
    return build({str(key): value for key, value in node.items()}, group)


def build(node: Mapping[str, Any], where: str, target: Any = None) -> Any:
    """What a node describes: `target(**node)`, by default the node's own `_target_`.

    Args:
        node: Arguments by name, themselves nodes where they hold a `_target_`; `_partial_: true` leaves the
            call to others.
        where: The node's path in the configuration, for errors.
        target: What to call where the node does not say.

    Raises:
        ConfigError: as `read`.
    """
    arguments = {key: value for key, value in node.items() if key not in DROPPED}
    target = target or _locate(node.get("_target_"), where)
    arguments = {
        key: build(value, f"{where}.{key}") if isinstance(value, Mapping) else value
        for key, value in arguments.items()
    }
    arguments = _checked(target, arguments, f"{where}.", partial=bool(node.get("_partial_")))
    if node.get("_partial_"):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _locate(path: Any, where: str) -> Any:
    if not isinstance(path, str):
        raise ConfigError(f"{where}: _target_ must name a class, got {path!r}")
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise ConfigError(f"{where}._target_: {path} cannot be imported: {error.value}") from error
    if callable(found) and not _has_signature(found):
        raise ConfigError(f"{where}._target_: {path} does not tell its arguments: give a Python function")
    if found is None:
        module = pydoc.locate(path.rpartition(".")[0])
        names = [f"{path.rpartition('.')[0]}.{name}" for name in getattr(module, "__all__", [])]
        reason = unknown(path, names, "object") if names else f"nothing is called {path}"
        raise ConfigError(f"{where}._target_: {reason}")
    return found


def _has_signature(target: Any) -> bool:
    try:
        inspect.signature(target)
    except ValueError:  # built-in functions, torch's among them
        return False
    return True


def _checked(target: Any, arguments: Mapping[str, Any], prefix: str, partial: bool = False) -> dict[str, Any]:
    """The arguments with the types of a signature, or a ConfigError."""
    parameters = dict(inspect.signature(target).parameters)
    if isinstance(target, Operator):
        parameters = {name: each for name, each in parameters.items() if name not in GIVEN_LATER}
    hinted = target.function if isinstance(target, Operator) else target
    hints = typing.get_type_hints(hinted) if inspect.isclass(target) or hinted is not target else {}
    checked = {}
    for name, value in arguments.items():
        if name not in parameters:
            raise ConfigError(unknown(prefix + name, [prefix + each for each in parameters]))
        try:
            checked[name] = _as(value, hints.get(name, Any))
        except TypeError:
            lacks = _lacks(value, hints[name])
            if lacks:
                raise ConfigError(f"{prefix}{name}: {type(value).__name__} lacks {lacks}") from None
            allowed = _describe(hints[name])
            raise ConfigError(f"{prefix}{name} must be {allowed}, got {value!r}") from None
    missing = [
        name for name, each in parameters.items() if each.default is each.empty and name not in checked
    ]
    if missing and not partial:
        raise ConfigError(f"{prefix}{missing[0]} is missing")
    return checked


def _as(value: Any, hint: Any) -> Any:
    """A value from YAML, or an object built from it, as what an annotation asks for; else a TypeError."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for each in typing.get_args(hint):
            with contextlib.suppress(TypeError):
                return _as(value, each)
        raise TypeError
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is Literal:
        fits = value in typing.get_args(hint)
    elif hint in (int, float, str, bool, type(None)):
        fits = type(value) is hint
    else:
        fits = hint is Any or not inspect.isclass(hint) or isinstance(value, hint)
    if not fits:
        raise TypeError
    return value


def _lacks(value: Any, protocol: Any) -> str:
    """The members of a protocol that an object does not have; nothing for a plain value."""
    if not getattr(protocol, "_is_protocol", False) or isinstance(
        value, int | float | str | list | type(None)
    ):
        return ""
    members = [name for name in {**protocol.__annotations__, **vars(protocol)} if not name.startswith("_")]
    return ", ".join(name for name in members if not hasattr(value, name))


def _describe(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        list: "a list",
        type(None): "null",
    }
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # Tensors come from code: nobody can write one on a command line.
        words = (_describe(each) for each in typing.get_args(hint) if each is not Tensor)
        return " or ".join(dict.fromkeys(words))
    return names.get(hint, "a group of settings")


def _check_options(method: Method, k: int) -> None:
    """Whether the operator of a method takes its options and k: tried on the fewest scores that have a k."""
    if hasattr(method, "operator"):
        operator, options = bound(method.operator)
        try:
            operator(torch.zeros(k + 1), k, 1.0, **options)
        except ValueError as error:
            raise ConfigError(f"method.operator: {error}") from error


def _check_measurement(experiment: Experiment) -> None:
    """What is asked of gradients: a truth that is there, places that are."""
    if experiment.log.truth is not None and not has_truth(experiment.task):
        raise ConfigError(
            f"log.truth: {type(experiment.task).__name__} has no true gradient; log.truth must be null"
        )
    if experiment.at is not None and (not experiment.at or len({*experiment.at}) < len(experiment.at)):
        raise ConfigError(f"at must hold places, each once, e.g. [0, 0.5, 0.9]; got {experiment.at}")
    for place in experiment.at or []:
        if isinstance(place, bool) or not isinstance(place, int | float) or not 0 <= place <= 1:
            raise ConfigError(f"at must hold numbers in [0, 1], got {place!r}")
    if any(experiment.at or []) and "W" not in experiment.task.teacher(Normals([experiment.seed])):
        name = f"at: {type(experiment.task).__name__}"
        raise ConfigError(
            f"{name} has no planted W* to go to: at must be [0], its start, got {experiment.at}"
        )
    kinked = isinstance(experiment.task, KnownInputs) and experiment.task.wants != "values"
    if kinked and experiment.log.truth is not None and 1 in (experiment.at or []):
        raise ConfigError("at: at 1, W*, the mean loss has a kink: places must be < 1, or log.truth=null")
    for name, given in {"at": experiment.at, "log.truth": experiment.log.truth}.items():
        if given is not None and not experiment.log.samples:
            raise ConfigError(f"{name} is for gradient statistics: log.samples must be >= 2, got 0")


def _check_device(name: str) -> None:
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise ConfigError(unknown(name, there, "device"))
