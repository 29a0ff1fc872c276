"""Which rows of a table are trained on and which are held out: to evaluate at the end, or to tune before.

    evaluation    train on 70 %, hold out 30 %
    tuning        the same 30 % are set aside; of the others, train on 70 % and hold out 30 %

So whoever chooses settings on what "tuning" holds out has seen none of the rows that they are judged by.
"""

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from topkbench.randomness import Noise
from topkbench.tasks._csv import Table

HELD_OUT = 0.3
LEAST = 4  # rows of a class: one at least is held out
LEAST_IN_ALL = 5  # rows with a quantity: two at least are held out, so that it can vary there
Split = Literal["evaluation", "tuning"]


def check_split(split: str, of_table: bool) -> None:
    """Refuse what is no split, and a split for tuning where no rows are limited.

    Args:
        split: What was asked for.
        of_table: Whether rows come from a table; planted held-out rows are new ones for each seed.

    Raises:
        ValueError: as said.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if split != "evaluation" and not of_table:
        raise ValueError(f"split must be evaluation for planted data (tune with other seeds), got {split!r}")


def common(table: Table, split: Split, data: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows held out, the same for every replicate and the same share of each class.

    scikit-learn's `train_test_split` with random_state 0, and for tuning its training rows once more with 1.

    Raises:
        ValueError: a class with too few rows.
    """
    train, held_out = _parted(table, np.arange(len(table.y)), 0, data)
    return (train, held_out) if split == "evaluation" else _parted(table, train, 1, data)


def _parted(
    table: Table, rows: NDArray[np.int64], seed: int, data: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from sklearn.model_selection import train_test_split

    _check_counts(table, np.bincount(table.y[rows].astype(np.int64), minlength=table.classes), data)
    train, held_out = train_test_split(rows, test_size=HELD_OUT, stratify=table.y[rows], random_state=seed)
    return train, held_out


def own(noise: Noise, table: Table, split: Split) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R H"]]:
    """Rows to train on and rows held out, drawn for each replicate, the same share of each class.

    A replicate's own rows for evaluation are the ones that are set aside when its seed tunes.
    """
    u = noise("rows", len(table.y), law="uniform").double()
    group, train, held_out = (torch.as_tensor(each, device=u.device) for each in _places(table, split))
    by_group = (group + u).argsort(dim=-1, stable=True)  # at random within a class
    return _shuffled(by_group[:, train], u), _shuffled(by_group[:, held_out], u)


def check_own(table: Table, split: Split, data: str) -> None:
    """Refuse a table that `own` cannot split.

    Raises:
        ValueError: a class with too few rows.
    """
    counts = np.bincount(_group(table))
    _check_counts(table, counts, data)
    if split == "tuning":
        _check_counts(table, counts - _share(counts), data)


def _places(table: Table, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The class of every row; and where rows ordered by class are trained on, and where held out."""
    group = _group(table)
    counts = np.bincount(group)
    within = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    aside = np.zeros_like(counts) if split == "evaluation" else _share(counts)
    last = aside + _share(counts - aside)
    low, high = (np.repeat(each, counts) for each in (aside, last))
    return group, np.flatnonzero(within >= high), np.flatnonzero((within >= low) & (within < high))


def again(noise: Noise, rows: int, count: int) -> Int[Tensor, "R B"]:
    """Places in [0, count), drawn with replacement for each replicate."""
    return (noise("row", rows, law="uniform") * count).long().clamp(max=count - 1)


def _shuffled(rows: Int[Tensor, "R N"], u: Tensor) -> Int[Tensor, "R N"]:
    return rows.gather(1, u.gather(1, rows).argsort(dim=-1, stable=True))


def _group(table: Table) -> NDArray[np.int64]:
    return table.y.astype(np.int64) if table.classes else np.zeros(len(table.y), np.int64)


def _share(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.round(HELD_OUT * counts).astype(np.int64)


def _check_counts(table: Table, counts: NDArray[np.int64], data: str) -> None:
    """Of the rows that are about to be split; fewer than the table has where others are set aside."""
    place, least = int(counts.argmin()), LEAST if table.classes else LEAST_IN_ALL
    if counts[place] >= least:
        return
    aside = " beside those set aside" if counts.sum() < len(table.y) else ""
    who = f"class {table.labels[place]!r}" if table.classes else "the table"
    raise ValueError(
        f"{data}: {who} has {counts[place]} row{'s' * int(counts[place] != 1)}{aside}: {least} are needed, "
        f"to train on 70 % and hold out 30 %"
    )
