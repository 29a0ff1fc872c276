"""Where the columns of `features` come from: planted, bundled with scikit-learn, or in a CSV file."""

import functools
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.nearest import unknown
from topkbench.randomness import Noise
from topkbench.tasks import _csv, _digits, _split
from topkbench.tasks._contract import Teacher

TRUE = {"xor": 2, "orange": 4, "additive": 4}  # how many columns matter; k in `linear`
PLANTED = ("linear", *TRUE)
TINY = 1e-10  # a column of a relative variance below it is constant
TABLES = {"breast_cancer": _digits.breast_cancer, "digits": _digits.digits}


def check(data: str, target: str | None, n: int, split: _split.Split) -> None:
    """Refuse data that is not there, that has more columns than n, or that cannot be split.

    Raises:
        ValueError: one of these, or what `_csv.read` refuses.
    """
    check_source(data, target, (*PLANTED, *TABLES))
    _split.check_split(split, data not in PLANTED)
    if data in PLANTED:
        least, what = TRUE.get(data, 1), "columns that matter"
    else:
        least, what = len(table(data, target).names), "columns"
        _split.check_own(table(data, target), split, data)
    if n < least:
        raise ValueError(f"n must be >= {least}, the {what} of {data}, got {n}")


def check_source(data: str, target: str | None, known: Iterable[str]) -> None:
    """Refuse data that is neither known nor a file, and a target for what is no file.

    Raises:
        ValueError: one of these.
    """
    file = data.lower().endswith(".csv")
    if not file and data not in known:
        raise ValueError(f"{unknown(data, known, 'data')}, or the path of a .csv file")
    if file != (target is not None):
        raise ValueError(f"target names a column of a .csv file, got target {target} for {data}")


def table(data: str, target: str | None) -> _csv.Table:
    """What is not planted."""
    return TABLES[data]() if data in TABLES else _csv.read(data, str(target))


@functools.lru_cache(maxsize=8)
def numbers(
    data: str, target: str | None, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "N n"], Float[Tensor, "N m"]]:
    """A table's columns, with decoys up to n, and its classes one-hot, or its quantity."""
    found, draw = table(data, target), np.random.default_rng(0)
    count = len(found.names)
    decoys = [draw.permutation(found.x[:, j % count]) for j in range(n - count)]
    x, y = torch.as_tensor(np.column_stack([found.x, *decoys])), torch.as_tensor(found.y)
    # Centred here, in float64, so that large numbers that vary little keep their digits in float32.
    x = x - x.mean(0)
    y = (
        torch.nn.functional.one_hot(y.long(), found.classes)
        if found.classes
        else (y - y.mean()).unsqueeze(-1)
    )
    return x.to(device, dtype), y.to(device, dtype)


def split(noise: Noise, data: str, target: str | None, n: int, which: _split.Split) -> Teacher:
    """A table's rows to train on and its rows held out; mean and spread of the former; what is no decoy."""
    like = noise("like")
    x, y = numbers(data, target, n, like.dtype, like.device)
    train, held_out = _split.own(noise, table(data, target), which)
    inside = x.new_zeros(len(train), len(x)).scatter(1, train, 1 / train.shape[1])
    told: dict[str, Tensor] = {"train": train, "held_out": held_out}
    for name, values in (("x", x), ("y", y)):
        mean = inside @ values
        variance = (inside @ values.square() - mean.square()).clamp(min=0)
        spread = torch.where(variance > TINY * values.square().mean(0), variance.sqrt(), 1.0)
        told |= {f"{name} mean": mean.unsqueeze(1), f"{name} spread": spread.unsqueeze(1)}
    real = torch.arange(n, device=x.device) < len(table(data, target).names)
    return {**told, "support": real.to(x.dtype).expand(len(train), -1)}


def log_odds(data: str, x: Float[Tensor, "R B s"]) -> Float[Tensor, "R B"]:
    """Of the first class, from the columns that matter."""
    if data == "xor":
        return x.prod(-1)
    if data == "orange":
        return x.square().sum(-1) - 4
    first, second, third, fourth = x.unbind(-1)
    return -100 * (0.2 * first).sin() + second.abs() + third + (-fourth).exp() - 2.4


@functools.lru_cache(maxsize=8)
def correlating(n: int, rho: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n n"]:
    """The Cholesky factor of rho^|i - j|: what each of n independent normals brings into each column."""
    i = torch.arange(n, dtype=torch.float64)
    lag = i.unsqueeze(-1) - i
    factor = (rho ** lag.clamp(min=0)).tril()
    factor[:, 1:] *= (1 - rho**2) ** 0.5
    return factor.to(device, dtype)
