"""The tables that scikit-learn brings along: digits and breast_cancer.

scikit-learn is imported where it is needed: it takes a second, and most tasks do without.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from topkbench.tasks._csv import Table

GREY = 16  # pixels are whole numbers from 0 to this one
HELD_OUT = 0.3


@functools.cache
def digits() -> Table:
    """1,797 images of 8 x 8 pixels in [0, 1], 10 classes."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Table(pixels / GREY, labels.astype(np.float64), 10, tuple(f"pixel {i}" for i in range(64)))


@functools.cache
def breast_cancer() -> Table:
    """569 tumours, 30 measurements, 2 classes."""
    from sklearn.datasets import load_breast_cancer

    loaded = load_breast_cancer()
    return Table(loaded.data, loaded.target.astype(np.float64), 2, tuple(map(str, loaded.feature_names)))


def split(table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows to train on and which are held out, the same share of each class; random_state 0.

    Raises:
        ValueError: a class has a single row.
    """
    from sklearn.model_selection import train_test_split

    if np.bincount(table.y.astype(np.int64)).min() < 2:
        raise ValueError("every class must have at least 2 rows, to train on and to hold out")
    rows = np.arange(len(table.y))
    train, held_out = train_test_split(rows, test_size=HELD_OUT, stratify=table.y, random_state=0)
    return train, held_out
