"""Tables of numbers with a column to predict, and how one is read from a CSV file."""

import csv
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from topkbench.nearest import unknown

MOST_CLASSES = 20  # a target of more whole numbers than that is a quantity
SEPARATORS = {";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True, eq=False)
class Table:
    """N rows of p numbers, and what is to be predicted.

    Attributes:
        x: `(N, p)`.
        y: `(N,)`: the number of the class from 0 up, or a quantity.
        classes: How many there are; 0 where y is a quantity.
        names: Of the p columns.
        labels: Of the classes.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    classes: int
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()


@functools.lru_cache(maxsize=8)
def read(path: str, target: str) -> Table:
    """A CSV file: a header, commas, a number in every cell but those of the target column.

    The target is a class if more than half of its cells are no numbers, or if all are whole numbers of at
    most MOST_CLASSES different values; else it is a quantity. Classes are numbered in the order of their
    names. Blank lines are skipped. Rows are counted as lines of the file, the header being row 1.

    Raises:
        ValueError: in one line: no such file, no such column, a cell that is not a finite number, a row that
            is not as long as the header, no rows, columns of the same name, a quote that is not closed.
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
        raise ValueError(f"{path}: {unknown(target, names, 'column')}{_separated(names)}")
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
    y, labels = _target([cells[place].strip() for _, cells in rows], path, target, [row for row, _ in rows])
    return Table(x, y, len(labels), tuple(names[i] for i in others), labels)


def _lines(path: str) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:  # with or without a byte-order mark
            return [(row, cells) for row, cells in _rows(file, path) if any(cell.strip() for cell in cells)]
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from None


def _rows(file: TextIO, path: str) -> Iterator[tuple[int, list[str]]]:
    """A quoted cell may go over several lines."""
    reader = csv.reader(file, strict=True)
    while True:
        row = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            open_quote = "a quote is not closed" if "unexpected end" in str(error) else error
            raise ValueError(f"{path}: row {row} cannot be read as CSV: {open_quote}") from None
        yield row, cells


def _separated(names: Sequence[str]) -> str:
    """A question for a header that commas do not separate."""
    for sign, name in SEPARATORS.items():
        if len(names) == 1 and sign in names[0]:
            return f": is it separated by {name}? it must be by commas"
    return ""


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
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Numbers of classes and their names, or quantities and no names."""
    empty = [row for row, cell in zip(rows, cells, strict=True) if not cell]
    if empty:
        raise ValueError(f"{path}: row {empty[0]}, column {column!r} is empty")
    odd = [(row, cell) for row, cell in zip(rows, cells, strict=True) if not _is_number(cell)]
    if len(odd) > len(cells) // 2:
        return _numbered(np.array(cells), path, column)
    if odd:
        row, cell = odd[0]
        raise ValueError(
            f"{path}: row {row}, column {column!r}: {cell!r} is not a number, as {len(cells) - len(odd)} of "
            f"its {len(cells)} cells are; if they are classes, name all of them by words"
        )
    numbers = np.array([float(cell) for cell in cells])
    whole = np.isfinite(numbers).all() and (numbers == np.round(numbers)).all()
    if whole and len(np.unique(numbers)) <= MOST_CLASSES:
        return _numbered(numbers, path, column)
    for row, cell in zip(rows, cells, strict=True):
        _number(cell, path, row, column)
    if np.ptp(numbers) == 0:
        raise ValueError(f"{path}: column {column!r} has one value alone: there is nothing to predict")
    return numbers, ()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbered(labels: NDArray, path: str, column: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    names, numbers = np.unique(labels, return_inverse=True)
    if len(names) == 1:
        raise ValueError(f"{path}: column {column!r} has one value alone: there is nothing to predict")
    if len(names) > len(labels) // 2:
        raise ValueError(
            f"{path}: column {column!r} has {len(names)} different values in {len(labels)} rows: "
            "neither a class nor, in every row, a number"
        )
    return numbers.astype(np.float64), tuple(
        str(name) if labels.dtype.kind == "U" else f"{name:g}" for name in names
    )
