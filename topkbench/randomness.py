"""One generator a replicate, drawn ahead in chunks of steps.

What a replicate draws depends on its seed, on what the draw is for and on its shape alone: not on the
other replicates, on the device, or on how many draws are made at once. NumPy's generators give that
(their streams are documented and stable); a draw per replicate per step would cost more than the step,
so each replicate fills the numbers of many steps in one call.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float32]
Noise = Callable[..., Tensor]
"""`noise(name, *shape)` draws standard normals `(R, *shape)`; each name and shape is a stream of its own.

Another law is asked for by name: `law="uniform"` on (0, 1), `"gumbel"`, `"exponential"`, or `"gamma"` with
its shape parameter `a`, all standard.
"""

AHEAD = 1 << 20  # numbers drawn in one go: 4 MB
PRECISION = np.float32  # for every dtype: a float64 run sees the same data


def _normal(generator: np.random.Generator, size: tuple[int, ...], a: float) -> FloatArray:  # noqa: ARG001
    return generator.standard_normal(size, dtype=PRECISION)


def _uniform(generator: np.random.Generator, size: tuple[int, ...], a: float) -> FloatArray:  # noqa: ARG001
    # Neither 0 nor 1 in float32: their logarithms are infinite.
    return (generator.random(size).clip(2.0**-60, 1 - 2.0**-24)).astype(PRECISION)


def _exponential(generator: np.random.Generator, size: tuple[int, ...], a: float) -> FloatArray:  # noqa: ARG001
    return np.maximum(generator.standard_exponential(size), 2.0**-60).astype(PRECISION)


def _gumbel(generator: np.random.Generator, size: tuple[int, ...], a: float) -> FloatArray:
    return -np.log(_exponential(generator, size, a))


def _gamma(generator: np.random.Generator, size: tuple[int, ...], a: float) -> FloatArray:
    return generator.standard_gamma(a, size).astype(PRECISION)


LAWS = {
    "normal": _normal,
    "uniform": _uniform,
    "gumbel": _gumbel,
    "exponential": _exponential,
    "gamma": _gamma,
}


@dataclass
class Normals:
    """Standard normals for each replicate from its own generator.

    Attributes:
        seeds: One non-negative integer a replicate.
        purpose: What the draws are for, e.g. `("gradients", 500)`; other purposes are independent streams.
        device: Where the tensors go.
        dtype: Of the tensors; the numbers are those of float32.
    """

    seeds: Sequence[int]
    purpose: tuple[str | int, ...] = ()
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    _streams: dict[tuple[str | int | float, ...], "_Stream"] = field(default_factory=dict, repr=False)

    def child(self, *purpose: str | int) -> "Normals":
        """Draws of the same seeds for a purpose within this one, from their beginning."""
        return Normals(self.seeds, (*self.purpose, *purpose), self.device, self.dtype)

    def __call__(self, name: str, *shape: int, law: str = "normal", a: float = 1.0) -> Tensor:
        """The next draw of this name and shape: `(R, *shape)`."""
        return self.take(1, name, *shape, law=law, a=a)[0]

    def take(self, count: int, name: str, *shape: int, law: str = "normal", a: float = 1.0) -> Tensor:
        """The next `count` draws of this name and shape: `(count, R, *shape)`.

        Raises:
            KeyError: a law that is not in LAWS.
        """
        key: tuple[str | int | float, ...] = (name, law, a, *shape)
        if key not in self._streams:
            draw = functools.partial(LAWS[law], a=a)
            self._streams[key] = _Stream(self.seeds, (*self.purpose, name), shape, self.device, draw)
        return self._streams[key].take(count).to(self.dtype)


@dataclass(frozen=True)
class Repeated:
    """Draws for `count` copies of every replicate side by side: `(count * R, *shape)`."""

    normals: Normals
    count: int

    def __call__(self, name: str, *shape: int, law: str = "normal", a: float = 1.0) -> Tensor:
        """The next `count` draws of this name and shape; copy 0 of all replicates comes first."""
        return self.normals.take(self.count, name, *shape, law=law, a=a).flatten(0, 1)


class _Stream:
    """Draws of one shape, with those ahead of what was asked for kept."""

    def __init__(
        self,
        seeds: Sequence[int],
        purpose: tuple[str | int, ...],
        shape: tuple[int, ...],
        device: torch.device | str,
        draw: Callable[[np.random.Generator, tuple[int, ...]], FloatArray],
    ) -> None:
        words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in purpose]
        # The count of words keeps (..., 3) with shape () apart from (...) with shape (3,).
        key = (len(words), *words, *shape)
        self.generators = [
            np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=key)))
            for seed in seeds
        ]
        self.shape, self.device, self.draw = shape, device, draw
        self.ahead, self.chunk = self._draw(0), 1

    def take(self, count: int) -> Tensor:
        short = count - len(self.ahead)
        if short > 0:
            size = max(1, len(self.generators) * int(np.prod(self.shape)))
            self.chunk = min(2 * self.chunk, max(1, AHEAD // size))  # short runs do not draw for long ones
            self.ahead = torch.cat([self.ahead, self._draw(max(short, self.chunk))])
        taken, self.ahead = self.ahead[:count], self.ahead[count:]
        return taken

    def _draw(self, count: int) -> Tensor:
        draws = np.empty((count, len(self.generators), *self.shape), dtype=PRECISION)
        for i, generator in enumerate(self.generators):
            draws[:, i] = self.draw(generator, (count, *self.shape))
        return torch.from_numpy(draws).to(self.device)
