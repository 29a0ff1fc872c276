"""The splitter selection network: comparators that sort out the k largest, and no more than those.

A splitter cascade on p lanes compares those p/2 apart, then p/4, ..., 1. After it, what lies on the lane at
place j of the list is no larger than what lies at any place whose binary digits are among those of j: it
has at least 2^(ones of j) - 1 above it. That number is added to the lane's least rank. A lane whose least
rank is k or more is out; as long as several lanes have the same least rank below k, they are split again.
In the end lane j holds rank j + 1, for all j < k.

What happens at ranks below k does not depend on k, which only says where to stop. Lanes are counted from the
largest down, wires from the smallest up.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from topkbench.operators._layers import Layer, Network

Lanes = NDArray[np.int64]
Pairs = tuple[Lanes, Lanes]  # wires (a, b): the larger value goes to b


def _cascade(lanes: Lanes) -> Iterator[Pairs]:
    """The layers of a cascade: places j and j + half, where that digit of j is 0 and both are there."""
    for digit in reversed(range((len(lanes) - 1).bit_length())):
        half = 1 << digit
        place = np.arange(len(lanes) - half)
        place = place[place >> digit & 1 == 0]
        yield lanes[place], lanes[place + half]


def selection_pairs(n: int, k: int) -> list[Pairs]:
    """Which lanes are compared, layer by layer: the larger value goes to the first lane of a pair.

    Args:
        n: How many lanes.
        k: How many are selected, in [1, n].
    """
    ones = np.array([j.bit_count() for j in range(n)])
    least, free = np.zeros((2, n), np.int64)
    layers: list[list[Pairs]] = []
    for settled in range(k):
        # Downwards, as those that are split move up, to ranks whose turn in this round is over.
        for rank in range(k - 1, settled - 1, -1):
            lanes = np.flatnonzero(least == rank)
            if len(lanes) < 2:
                continue
            start = layer = int(free[lanes].max())
            for layer, pairs in enumerate(_cascade(lanes), start):
                layers.extend([] for _ in range(layer + 1 - len(layers)))
                layers[layer].append(pairs)
            free[lanes] = layer + 1
            least[lanes] += (1 << ones[: len(lanes)]) - 1
    return [_joined(pairs) for pairs in layers]


def _joined(layer: Sequence[Pairs]) -> Pairs:
    first, second = zip(*layer, strict=True)
    return np.concatenate(first), np.concatenate(second)


@functools.cache
def splitter_network(n: int, k: int) -> Network:
    """The splitter selection network: its last k wires hold the k largest of n, the largest last."""
    layers = [(n - 1 - low, n - 1 - high) for high, low in selection_pairs(n, k)]
    return Network(n, 0, tuple(_laid_out(n, k, layers)))


def _laid_out(n: int, k: int, layers: Sequence[Pairs]) -> Iterator[Layer]:
    """The same with the wires of each layer moved to the end, where they are one block; at last in order.

    Wires that are done with stay in front, so that fewer and fewer have to be moved.
    """
    last = np.where(np.arange(n) < n - k, -1, len(layers))  # the last layer that needs a wire
    for number, pair in enumerate(layers):
        for wires in pair:
            last[wires] = np.maximum(last[wires], number)
    at = np.arange(n)  # which wire lies where
    for number, (a, b) in enumerate(layers):
        idle = at[~np.isin(at, np.concatenate([a, b]))]
        done = last[idle] < number
        new = np.concatenate([idle[done], idle[~done], a, b])
        yield Layer(n - 2 * len(a), n, len(a), order=_moved(at, new))
        at = new
    order = _moved(at, np.concatenate([at[at < n - k], np.arange(n - k, n)]))
    if order is not None:
        yield Layer(n, n, 1, order=order)


def _moved(at: Lanes, new: Lanes) -> Lanes | None:
    """From the first place on that changes: where what comes there was, counted from that place."""
    order = np.argsort(at)[new]
    changed = np.flatnonzero(order != np.arange(len(at)))
    return order[changed[0] :] - changed[0] if len(changed) else None
