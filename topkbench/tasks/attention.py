"""`attention`: which k of n slots hold what a cue recalls, by top-k attention with a planted association."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators import hard_mask
from topkbench.operators._contract import Part
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher
from topkbench.tasks.planted import AT_ONCE, START, half_squared_error
from topkbench.tasks.router import softmax_over_kept

Weights = Literal["uniform", "softmax"]


class Row(NamedTuple):
    """What a row of x holds."""

    cue: Float[Tensor, "R B d"]
    keys: Float[Tensor, "R B n d"]
    values: Float[Tensor, "R B n m"]


@dataclass(frozen=True)
class Attention:
    """Each row is a memory of n slots and one cue; the k slots that go with the cue are to be averaged.

        cue      u ~ N(0, I_d); what it is associated with is the unit vector a = W*^T u / |W*^T u|
        W*       Q `(d, d)`, orthogonal: a = Q^T u / |u|, known to nobody but the teacher
        slots    k of n, the right ones, chosen at random; each slot has a key and a value
        keys     c_j ~ N(0, I_d) without its component along a, plus strength * a in the right slots
        values   v_j ~ N(0, I_m)
        target   y* = the mean of the v_j of the right slots
        scores   q_j = u^T W c_j / sqrt(d),  W `(d, d)` learned,  m their top-k mask
        loss     |sum_j g_j v_j - y*|^2 / 2,   g_j = m_j / k                                 weights "uniform"
                                               g_j = m_j exp(q_j) / sum_l m_l exp(q_l)       weights "softmax"

    All slots are fresh in each row, so that nothing but the association, cue to key, can be learned. Under W*
    the right slots score strength |u| / sqrt(d) each and all others 0: they are the top k with a margin, all
    right slots weigh alike, and the loss is 0 with either kind of weights. W is identifiable up to a positive
    factor, in the sense that no W but those has loss 0 on all rows; the larger the strength, the
    less is lost near them, as a slot that is off by an angle t scores strength cos t against sin t times a
    normal.

    With uniform weights W acts through the choice alone: the hard gradient is exactly 0. With softmax weights
    it tells how to share attention among what is kept, and nothing about which slot to look at instead.
    Scores are not W x, so that the boundary flux of `Oracle` does not apply: there is no true gradient.

    `+method=scaled_softmax` with uniform weights is dense softmax attention over all n slots with 1 /
    temperature as the scale of its scores, the baseline without top-k: see its relaxed_loss.

    Metrics, on held-out rows with the hard top-k: `recall`, the share of the right slots attended to,
    in [0, 1], 1 at W*, k/n by chance. `accuracy`, the share of rows where all k are, in [0, 1], 1 at W*.

    Attributes:
        n: How many slots there are.
        d: The dimension of cues and keys, >= 2.
        k: How many are right and how many are averaged, in [1, n].
        m: The dimension of a value, >= 1.
        strength: How much of its key a right slot has along a, against standard normal noise across, > 0.
        weights: "uniform" or "softmax".

    Raises:
        ValueError: one of them out of range, or weights that are not one of the two.

    Cost: a row draws and reads n (d + m) numbers, where `gate` draws d and multiplies n d. At n = 64, d = 32,
    k = 8 and batches of 32, 8 replicates take 10 s for 1000 steps of `entropic` on one core; at n = 1,000,
    6.4 s of processor time for 50.

    Source: this project. After associative recall as in Arora et al. 2023, "Zoology: Measuring and Improving
    Recall in Efficient Language Models", and top-k attention as in Gupta, Dar, Goodman, Ciprut & Berant 2021,
    "Memory-efficient Transformers via Top-k Attention". Differs: continuous keys, a bilinear association that
    is planted, k right slots; neither paper's model.
    """

    n: int
    d: int
    k: int
    m: int = 8
    strength: float = 1.0
    weights: Weights = "uniform"
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        for name, size, least in (("n", self.n, 1), ("d", self.d, 2), ("m", self.m, 1)):
            if size < least:
                raise ValueError(f"{name} must be >= {least}, got {size}")
        if not 1 <= self.k <= self.n:
            raise ValueError(f"k must be in [1, n] = [1, {self.n}], got {self.k}")
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength must be > 0 and finite, got {self.strength}")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {self.weights}")

    def teacher(self, noise: Noise) -> Teacher:
        """W*: an orthogonal matrix, uniform but for signs."""
        return {"W": torch.linalg.qr(noise("W", self.d, self.d))[0]}

    def start(self, noise: Noise) -> Float[Tensor, "R d d"]:
        """Independent normal entries with standard deviation START / sqrt(d): so much has a first score."""
        return noise("W", self.d, self.d) * (START / self.d**0.5)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:  # noqa: ARG002
        """`rows` fresh memories with a cue each; x is the cue, the keys and the values, laid end to end."""
        cue = noise("cue", rows, self.d)
        keys, values = noise("keys", rows, self.n, self.d), noise("values", rows, self.n, self.m)
        right = hard_mask(noise("right", rows, self.n, law="uniform"), self.k).unsqueeze(-1)
        a = torch.nn.functional.normalize(cue @ teacher["W"], dim=-1).unsqueeze(-2)
        along = (keys * a).sum(-1, keepdim=True)
        keys = keys + (self.strength * right - along) * a
        x = torch.cat([cue, keys.flatten(-2), values.flatten(-2)], dim=-1)
        return Batch(x, (right * values).sum(-2) / self.k, teacher)

    def row(self, x: Float[Tensor, "R B w"]) -> Row:
        """The cue, the keys and the values in x."""
        cue, keys, values = x.split([self.d, self.n * self.d, self.n * self.m], dim=-1)
        return Row(cue, keys.unflatten(-1, (self.n, self.d)), values.unflatten(-1, (self.n, self.m)))

    def scores(self, W: Float[Tensor, "R d d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """`u^T W c_j / sqrt(d)` for each slot: so scaled, a step of W moves them as little as elsewhere."""
        row = self.row(batch.x)
        return (row.keys @ (row.cue @ W / self.d**0.5).unsqueeze(-1)).squeeze(-1)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """Half the squared error of what is recalled."""
        weights = part / self.k if self.weights == "uniform" else softmax_over_kept(part, scores)
        recalled = (weights.unsqueeze(-2) @ self.row(batch.x).values).squeeze(-2)
        return half_squared_error(recalled, batch.target)

    def metrics(self, W: Float[Tensor, "R d d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`recall` and `accuracy`."""
        found = torch.cat([self._found(W, piece) for piece in test.pieces(AT_ONCE)], dim=-1)
        return {"recall": found.mean(-1) / self.k, "accuracy": (found == self.k).to(W.dtype).mean(-1)}

    def _found(self, W: Float[Tensor, "R d d"], batch: Batch) -> Float[Tensor, "R B"]:
        """How many of the right slots are among the k."""
        ours, right = (hard_mask(self.scores(each, batch), self.k) for each in (W, batch.teacher["W"]))
        return (ours * right).sum(-1)
