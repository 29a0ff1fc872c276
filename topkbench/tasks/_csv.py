"""Tables of numbers with a column to predict, and how one is read from a CSV file."""

import csv
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topkbench.nearest import unknown

MOST_CLASSES = 20  # a target of more whole numbers than that is a quantity


@dataclass(frozen=True, eq=False)
class Table:
    """N rows of p numbers, and what is to be predicted.

    Attributes:
        x: `(N, p)`.
        y: `(N,)`: the number of the class from 0 up, or a quantity.
        classes: How many there are; 0 where y is a quantity.
        names: Of the p columns.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    classes: int
    names: tuple[str, ...]


@functools.lru_cache(maxsize=8)
def read(path: str, target: str) -> Table:
    """A CSV file: a header, commas, a number in every cell but those of the target column.

    The target is a class if a cell of its is no number, or if all are whole numbers of at most MOST_CLASSES
    different values; else it is a quantity. Classes are numbered in the order of their names. Blank lines are
    skipped. Rows are counted as lines of the file, the header being row 1.

    Raises:
        ValueError: in one line: no such file, no such column, a cell that is not a finite number, a row that
            is not as long as the header, no rows, columns of the same name.
    """
    lines = _lines(path)
    if not lines:
        raise ValueError(f"{path} is empty: it must have a header and rows")
    (_, header), *rows = lines
    names = [name.strip() for name in header]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}")
    if target not in names:
        raise ValueError(f"{path}: {unknown(target, names, 'column')}")
    if len(rows) < 2:
        raise ValueError(f"{path} must have at least 2 rows under its header, got {len(rows)}")
    place = names.index(target)
    others = [i for i in range(len(names)) if i != place]
    if not others:
        raise ValueError(f"{path} has no column beside {target!r}")
    for row, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"{path}: row {row} has {len(cells)} cells, the header {len(names)}")
    x = np.array([[_number(cells[i], path, row, names[i]) for i in others] for row, cells in rows])
    y, classes = _target([cells[place].strip() for _, cells in rows], path, target, [row for row, _ in rows])
    return Table(x, y, classes, tuple(names[i] for i in others))


def _lines(path: str) -> list[tuple[int, list[str]]]:
    """The lines that are not blank, each with its number."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:  # with or without a byte-order mark
            reader = csv.reader(file)
            return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from None


def _number(cell: str, path: str, row: int, column: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{path}: row {row}, column {column!r}: {cell!r} is not a finite number")
    return number


def _target(
    cells: Sequence[str], path: str, column: str, rows: Sequence[int]
) -> tuple[NDArray[np.float64], int]:
    """Numbers of classes and how many, or quantities and 0."""
    empty = [row for row, cell in zip(rows, cells, strict=True) if not cell]
    if empty:
        raise ValueError(f"{path}: row {empty[0]}, column {column!r} is empty")
    try:
        numbers = np.array([float(cell) for cell in cells])
    except ValueError:
        return _numbered(np.array(cells), path, column)
    whole = np.isfinite(numbers).all() and (numbers == np.round(numbers)).all()
    if whole and len(np.unique(numbers)) <= MOST_CLASSES:
        return _numbered(numbers, path, column)
    for row, cell in zip(rows, cells, strict=True):
        _number(cell, path, row, column)
    if np.ptp(numbers) == 0:
        raise ValueError(f"{path}: column {column!r} has one value alone: there is nothing to predict")
    return numbers, 0


def _numbered(labels: NDArray, path: str, column: str) -> tuple[NDArray[np.float64], int]:
    names, numbers = np.unique(labels, return_inverse=True)
    if len(names) == 1:
        raise ValueError(f"{path}: column {column!r} has one value alone: there is nothing to predict")
    if len(names) > len(labels) // 2:
        raise ValueError(
            f"{path}: column {column!r} has {len(names)} different values in {len(labels)} rows: "
            "neither a class nor, in every row, a number"
        )
    return numbers.astype(np.float64), len(names)
