"""Sorting networks as layers of comparators: which wires meet, in the order in which they do."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Layer(NamedTuple):
    """Wires i and i + half are compared, i in the first half of each block of 2 half of wires[start:stop].

    Attributes:
        start: The first wire.
        stop: One past the last.
        half: The distance of a pair.
        still: So many of the first comparators have a padding wire and exchange nothing.
        turn: `(size, low, high)`: before the layer, wires low to high of each block of that size change sign.
            Where a bitonic network sorts downwards, that is sorting upwards.
        order: Before the layer, the last `len(order)` wires are put in this order. So comparators of wires
            that lie anywhere become a block.
    """

    start: int
    stop: int
    half: int
    still: int = 0
    turn: tuple[int, int, int] | None = None
    order: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Network:
    """Layers over `wires` wires, of which the first `padding` hold no score."""

    wires: int
    padding: int
    layers: tuple[Layer, ...]

    @property
    def comparators(self) -> int:
        """How many there are in all layers."""
        return sum((layer.stop - layer.start) // 2 for layer in self.layers)


@functools.cache
def odd_even_network(n: int) -> Network:
    """Neighbours: (0, 1), (2, 3), ... and (1, 2), (3, 4), ... in turn, n layers in all."""
    layers = (Layer(odd, odd + (n - odd) // 2 * 2, 1) for odd in (layer % 2 for layer in range(n)))
    return Network(n, 0, tuple(layer for layer in layers if layer.stop > layer.start))


@functools.cache
def bitonic_network(n: int) -> Network:
    """Batcher's bitonic sorter of the next power of two; the wires in front hold no score and stay still."""
    blocks = (n - 1).bit_length()
    wires, layers = 1 << blocks, []
    padding = wires - n
    for block in range(blocks):
        for half in (1 << j for j in range(block, -1, -1)):
            start = padding // (2 * half) * 2 * half
            still = min(half, padding - start)
            if still == half:
                start, still = start + 2 * half, 0
            turn = _turn_of(block, blocks) if half == 1 << block else None
            layers.append(Layer(start, wires, half, still, turn))
    return Network(wires, padding, tuple(layers))


def _turn_of(block: int, blocks: int) -> tuple[int, int, int] | None:
    """Block b sorts downwards the wires with bit b + 1 set; those turn where bits b and b + 1 differ."""
    half = 1 << block
    if blocks == 1:
        return None
    if block == blocks - 1:
        return 2 * half, half, 2 * half
    return (4, 2, 4) if block == 0 else (4 * half, half, 3 * half)
