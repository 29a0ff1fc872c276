"""The tables that scikit-learn brings along: digits and breast_cancer.

scikit-learn is imported where it is needed: it takes a second, and most tasks do without.
"""

import functools

import numpy as np

from topkbench.tasks._csv import Table

GREY = 16  # pixels are whole numbers from 0 to this one


@functools.cache
def digits() -> Table:
    """1,797 images of 8 x 8 pixels in [0, 1], 10 classes."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    names = tuple(f"pixel {i}" for i in range(64))
    return Table(pixels / GREY, labels.astype(np.float64), 10, names, tuple("0123456789"))


@functools.cache
def breast_cancer() -> Table:
    """569 tumours, 30 measurements, 2 classes."""
    from sklearn.datasets import load_breast_cancer

    loaded = load_breast_cancer()
    names, labels = (tuple(map(str, each)) for each in (loaded.feature_names, loaded.target_names))
    return Table(loaded.data, loaded.target.astype(np.float64), 2, names, labels)
