"""`polynomial`: many independent binary choices that one loss sees together."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher

START = 0.01  # W starts uniform on [-START, START]


class Samples(Batch):
    """A batch that is cut between samples only: d rows in a row are one sample."""

    def pieces(self, rows: int) -> Iterator[Batch]:
        """The batch, so many rows at a time, rounded up to whole samples."""
        each = self.x.shape[-1]
        yield from super().pieces(-(-rows // each) * each)


@dataclass(frozen=True)
class Polynomial:
    """f = mean_l |z_l - c|^power of d independent binary latents z_l, each drawn with log-odds of its own.

    A latent is one of n = 2 scores taken (k = 1), and z_l is 1 where the first is. A sample of all d latents
    is d rows of the batch: x of row l is the l-th unit vector, so that its scores are column l of W
    `(R, 2, d)`. `batch` counts samples: `sample(rows)` returns rows * d rows. (Held out, rows are rows:
    what is evaluated is exact, and does not get better with more of them.)

    The loss of row l is `|z_l - c|^power` plus the sum of those of the other latents of its sample, held
    constant. Its derivative in z_l is that of its own term, so the mean gradient over rows is that
    of f, for all that differentiates the loss. Its value is d times f, the same for all rows of a sample, so
    the mean over rows of value times score, (1/d) sum_l d f dlog p(z_l), is the score-function gradient
    of f, with the noise that all latents together bring into it. So what a method calls its loss
    (`relaxed_loss`) is d f: the others' terms, d - 1 times as large, are in it. `population_loss`, and with
    it `hard_loss`, the truth and the oracle, are f itself.

    c is the same for all latents: |c| < |1 - c| where c < 1/2, so the optimum is z = 0, with f = |c|^power;
    near c = 1/2 the difference is small against the noise.

    Attributes:
        n: 2.
        k: 1.
        d: How many latents, >= 1.
        power: >= 1.
        c: In [0, 1].

    Raises:
        ValueError: one of them out of range.

    Source: Liu, Dong, Liu, Yu & Gao 2023, "Bridging Discrete and Backpropagation: Straight-Through and
    Beyond", polynomial programming, and its published code (d = 128, c = 0.45, power 1.5, 2, 3, batches
    of 64).
    """

    n: int = 2
    k: int = 1
    d: int = 128
    power: float = 2.0
    c: float = 0.45
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        if self.d < 1:
            raise ValueError(f"d must be >= 1, got {self.d}")
        if (self.n, self.k) != (2, 1):
            raise ValueError(f"n must be 2 and k 1 (latents are binary), got n = {self.n}, k = {self.k}")
        if not 1 <= self.power < math.inf:
            raise ValueError(f"power must be >= 1 and finite, got {self.power}")
        if not 0 <= self.c <= 1:
            raise ValueError(f"c must be in [0, 1], got {self.c}")

    def teacher(self, noise: Noise) -> Teacher:
        """C, for every replicate."""
        return {"c": torch.full_like(noise("c"), self.c)}

    def start(self, noise: Noise) -> Float[Tensor, "R 2 d"]:
        """Uniform on [-START, START]."""
        return START * (2 * noise("W", 2, self.d, law="uniform") - 1)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:  # noqa: ARG002
        """`rows` samples of d rows each; held out, as many samples as make `rows` rows."""
        c = teacher["c"]
        samples = -(-rows // self.d) if clean else rows
        x = _unit_vectors(samples, self.d, c.dtype, c.device).expand(len(c), -1, -1)
        return Samples(x, c[:, None, None].expand(-1, x.shape[1], 1), teacher)

    def scores(self, W: Float[Tensor, "R 2 d"], batch: Batch) -> Float[Tensor, "R B 2"]:
        """W x, that is the columns of W, once for every sample."""
        return W.mT.repeat(1, batch.x.shape[1] // self.d, 1)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B 2"], batch: Batch) -> Float[Tensor, "*losses"]:  # noqa: ARG002
        """A row's own term, and those of the rest of its sample held constant."""
        own = (part[..., 0] - batch.target[..., 0]).abs().pow(self.power)
        fixed = own.detach()
        together = fixed.unflatten(-1, (-1, self.d)).sum(-1).repeat_interleave(self.d, -1)
        return own + (together - fixed)

    def population(self, teacher: Teacher) -> Batch:
        """One sample."""
        c = teacher["c"]
        x = _unit_vectors(1, self.d, c.dtype, c.device).expand(len(c), -1, -1)
        return Samples(x, c[:, None, None].expand(-1, self.d, 1), teacher)

    def population_loss(self, W: Float[Tensor, "R 2 d"], batch: Batch) -> Float[Tensor, " R"]:
        """The mean of f over all 2^d samples, differentiable in W; f itself, not d times it."""
        zero, one = self._zero_and_one(batch.teacher)
        p = (W[:, 0] - W[:, 1]).sigmoid().mean(-1)
        return zero + p * (one - zero)

    def metrics(self, W: Float[Tensor, "R 2 d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`gap`: the mean of f less the smallest f there is."""
        least = torch.minimum(*self._zero_and_one(test.teacher))
        return {"gap": self.population_loss(W, test) - least}

    def _zero_and_one(self, teacher: Teacher) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """What a latent that is 0 costs, and one that is 1."""
        return teacher["c"].pow(self.power), (1 - teacher["c"]).pow(self.power)


@functools.lru_cache(maxsize=8)
def _unit_vectors(samples: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The d unit vectors, once for every sample: `(1, samples * d, d)`. The same at every step."""
    return torch.eye(d, dtype=dtype, device=device).repeat(1, samples, 1)
